import json

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tandem.data.media.text import SPECIALS, Tokenizer, build_byte_tokenizer, parse_sample, texts_of
from tandem.data.media.tokenizer_files import SpecialTokens
from tandem.data.media.turns import SampleError


def turns(*pairs):
    return [{"role": role, "text": text} for role, text in pairs]


def streamed(*entries, text="<video>look"):
    stream = [{"time": time, "role": role, "text": said} for time, role, said in entries]
    return [{"role": "user", "text": text, "stream": stream}]


def test_a_sample_is_role_text_eos_with_images_wrapped(tokenizer):
    conversation = turns(("system", "Be brief."), ("user", "<image>What number?"), ("assistant", "42"))
    sample = tokenizer.encode_sample(conversation, {"assistant"}, ["image"], "sample a")
    text = "<system>Be brief.<eos><user>[SOI][EOI]What number?<eos><assistant>42<eos>"
    assert tokenizer.decode(sample.tokens_T) == text
    assert tokenizer.decode(sample.tokens_T[: sample.media_at_M[0]]).endswith("<user>[SOI]")
    assert tokenizer.decode(sample.tokens_T[sample.trained_T]) == "42<eos>"
    assert sample.tokens_T.dtype == np.int32 and sample.kinds_M == ("image",) and sample.events_M == ((),)


def test_a_video_takes_no_place_in_the_base_text(tokenizer):
    sample = tokenizer.encode_sample(turns(("user", "a<video>b<image><video>")), (), ["video", "image", "video"], "s")
    assert tokenizer.decode(sample.tokens_T) == "<user>ab[SOI][EOI]<eos>"
    assert sample.media_at_M.tolist() == [2, 4, 5]
    assert sample.kinds_M == ("video", "image", "video")


def test_events_say_role_text_eos_and_go_on_with_the_turn(tokenizer):
    conversation = streamed((2.5, "assistant", "now a 7"), (0, "user", "begin"), (2.5, "assistant", "<bbox>1</bbox>"))
    sample = tokenizer.encode_sample(conversation, {"assistant"}, ["video"], "s")
    assert tokenizer.decode(sample.tokens_T) == "<user>look<eos>"
    (events,) = sample.events_M
    assert [event.time_ms for event in events] == [0, 2500, 2500]
    said = [tokenizer.decode(event.tokens) for event in events]
    box = "<assistant><bbox>1</bbox><eos><user>"
    assert said == ["<user>begin<eos><user>", "<assistant>now a 7<eos><user>", box]
    assert not events[0].trained.any()
    assert tokenizer.decode(events[1].tokens[events[1].trained]) == "now a 7<eos>"


def test_only_the_video_of_the_streamed_turn_has_its_events(tokenizer):
    conversation = turns(("user", "<video>")) + streamed((1, "assistant", "x"), text="<image><video>")
    sample = tokenizer.encode_sample(conversation, (), ["video", "image", "video"], "s")
    assert [len(events) for events in sample.events_M] == [0, 0, 1]


def test_train_roles_choose_targets_and_change_nothing_else(tokenizer):
    conversation = turns(("user", "a<image>b"), ("assistant", "c<image>d"))
    both = tokenizer.encode_sample(conversation, {"user", "assistant"}, ["image"] * 2, "s")
    none = tokenizer.encode_sample(conversation, (), ["image"] * 2, "s")
    assert np.array_equal(both.tokens_T, none.tokens_T) and np.array_equal(both.media_at_M, none.media_at_M)
    assert not none.trained_T.any()
    assert tokenizer.decode(both.tokens_T[both.trained_T]) == "ab<eos>cd<eos>"


def test_text_cannot_spell_special_tokens_except_box_tags(tokenizer):
    text = "<eos><assistant><system>[SOI]<pad> <bbox>1 2 3 4</bbox> naïve 漢字"
    ids = tokenizer.encode_sample(turns(("user", text)), (), [], "s").tokens_T.tolist()
    assert tokenizer.decode(ids[1:-1]) == text
    special = [i for i in ids if i in tokenizer.ids.values()]
    assert special == [tokenizer.ids[name] for name in ("<user>", "<bbox>", "</bbox>", "<eos>")]


def test_stamps_are_tenths_of_a_second_rounded_half_up(tokenizer):
    times = {0: "0.0", 49: "0.0", 50: "0.1", 1000: "1.0", 1449: "1.4", 1450: "1.5", 59_999: "60.0", 3_600_000: "3600.0"}
    for time, text in times.items():
        assert tokenizer.decode(tokenizer.stamp(time)) == f"[{text} second]"
    lengths = tokenizer.stamp_lengths(np.array([*times, *reversed(times)]))
    assert lengths.tolist() == [len(tokenizer.stamp(time)) for time in (*times, *reversed(times))]
    assert lengths.dtype == np.int64 and tokenizer.stamp_lengths(np.array([], np.int64)).shape == (0,)


@pytest.mark.parametrize(
    "bad, reason",
    [
        (turns(("user", "<image>")), "placeholder mismatch"),
        (turns(("user", "<image><image><image>")), "placeholder mismatch"),
        (turns(("user", "<image><image><video><image>")), "placeholder mismatch"),
        (turns(("tool", "x")), "bad turns"),
        ([{"role": ["user"], "text": "x"}], "bad turns"),
        ([{"role": "user"}], "bad turns"),
        (["x"], "bad turns"),
        ([], "bad turns"),
        (turns(("user", "\ud800")), "bad turns"),
        (streamed((1, "assistant", "x"), text="no video"), "bad stream"),
        (streamed((1, "assistant", "x"), text="<video><video>"), "bad stream"),
        (streamed((-1, "assistant", "x")), "bad stream"),
        (streamed((float("nan"), "assistant", "x")), "bad stream"),
        (streamed((10**400, "assistant", "x")), "bad stream"),
        (streamed((True, "assistant", "x")), "bad stream"),
        (streamed(("1", "assistant", "x")), "bad stream"),
        (streamed((1, "tool", "x")), "bad stream"),
        (streamed((1, "assistant", "<image>")), "bad stream"),
        (streamed((1, "assistant", "\udfff")), "bad stream"),
        ([{"role": "user", "text": "<video>", "stream": {"time": 1}}], "bad stream"),
        ([{"role": "user", "text": "<video>", "stream": ["x"]}], "bad stream"),
    ],
)
def test_unusable_samples_are_named(tokenizer, bad, reason):
    with pytest.raises(SampleError, match="sample 17") as raised:
        tokenizer.encode_sample(bad, (), ["image", "image", "image", "video"], "sample 17")
    assert raised.value.reason == reason


def test_a_placeholder_mismatch_says_what_was_found(tokenizer):
    with pytest.raises(SampleError, match="1 <image> placeholders in its text but 3 images"):
        tokenizer.encode_sample(turns(("user", "<image>")), (), ["image"] * 3, "s")
    with pytest.raises(SampleError, match="image number 1 where its text has <video>"):
        tokenizer.encode_sample(turns(("user", "<image><video><image>")), (), ["image", "image", "video"], "s")


def test_a_sample_is_parsed_with_its_domain_and_entity():
    assert parse_sample(b'{"turns": []}', "s") == {"turns": [], "domain": "unlabelled", "entity": None}
    content = {"turns": [], "domain": "birds", "entity": "a wren", "more": 1}
    assert parse_sample(json.dumps(content).encode(), "s") == content


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"\xff",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"turns": [], "domain": 1}',
        b'{"turns": [], "domain": null}',
        b'{"turns": [], "entity": ["x"]}',
        b'{"turns": [], "entity": "\\ud800"}',
    ],
)
def test_an_unusable_json_is_named(data):
    with pytest.raises(SampleError, match="sample 17") as raised:
        parse_sample(data, "sample 17")
    assert raised.value.reason == "bad json"


def test_the_texts_of_a_sample_leave_out_its_marks():
    conversation = streamed((1, "assistant", "x<bbox>1 2</bbox>"), text="a<image>b<video>")
    assert texts_of(conversation, "s") == ["a", "b", "x", "1 2"]


@pytest.mark.parametrize("name", SPECIALS)
def test_a_special_token_that_is_missing_gets_an_id_behind_all_others(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    build_byte_tokenizer(path)
    content = json.loads(path.read_text())
    whole = Tokenizer(path)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != name]
    path.write_text(json.dumps(content))
    found = Tokenizer(path)
    assert found.added == {name: found.known} and found.vocab_size == found.known + 1 and not whole.added
    assert found.sha256 != found.file_sha256 and whole.sha256 == whole.file_sha256


def test_a_token_that_text_could_spell_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    build_byte_tokenizer(path)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<user>"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="<user> but not as a special token"):
        Tokenizer(path)


def test_other_tokens_can_have_the_meanings_of_ours(tmp_path):
    path = tmp_path / "tokenizer.json"
    build_byte_tokenizer(path)
    path.write_text(path.read_text().replace("<user>", "<human>").replace("[SOI]", "<picture>"))
    sample = Tokenizer(path, SpecialTokens(user="<human>", start_of_image="<picture>")).encode_sample(
        turns(("user", "<image><user>")), (), ["image"], "s"
    )
    own = tmp_path / "own.json"
    build_byte_tokenizer(own)
    assert np.array_equal(
        sample.tokens_T, Tokenizer(own).encode_sample(turns(("user", "<image><user>")), (), ["image"], "s").tokens_T
    )


@pytest.mark.parametrize("text", ["ab <bbox>a b</bbox> ab", "<bbox>ab</bbox>", "ab<image>ab", "ab <eos> ab"])
def test_text_is_encoded_as_a_whole(tmp_path, text):
    """A tokenizer that begins a string otherwise than it goes on gives the ids of the whole conversation."""
    words = ["▁ab", "▁a", "▁b", "ab", *"▁ab<eos>"]
    vocabulary = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(words)])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [("▁", "a"), ("a", "b"), ("▁a", "b")], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.add_special_tokens(list(SPECIALS))
    inner.save(str(tmp_path / "tokenizer.json"))
    kinds = ["image"] * text.count("<image>")
    sample = Tokenizer(tmp_path / "tokenizer.json").encode_sample(turns(("user", text)), (), kinds, "s")
    spelled = text.replace("<image>", "[SOI][EOI]")
    if "<eos>" not in text:  # which the whole would take for the token
        assert sample.tokens_T.tolist() == inner.encode(f"<user>{spelled}<eos>", add_special_tokens=False).ids
    assert (sample.tokens_T == inner.token_to_id("<eos>")).sum() == 1
    assert sample.tokens_T[1] != vocabulary["▁ab"]


def test_an_unreadable_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.json cannot be read"):
        Tokenizer(tmp_path / "none.json")


def test_the_byte_tokenizer_is_small(tokenizer):
    assert tokenizer.vocab_size == 256 + len(SPECIALS) <= 384
