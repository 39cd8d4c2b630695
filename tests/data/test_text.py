import json

import numpy as np
import pytest

from data.text import SPECIALS, SampleError, Tokenizer, build_byte_tokenizer


def turns(*pairs):
    return [{"role": role, "text": text} for role, text in pairs]


def test_a_sample_is_role_text_eos_with_images_wrapped(tokenizer):
    sample = tokenizer.encode_sample(
        turns(("user", "<image>What number?"), ("assistant", "42")), {"assistant"}, 1, "sample a"
    )
    assert tokenizer.decode(sample.tokens_T) == "<user>[SOI][EOI]What number?<eos><assistant>42<eos>"
    assert sample.image_at_I.tolist() == [2]  # after <user> and [SOI]
    assert tokenizer.decode(sample.tokens_T[sample.trained_T]) == "42<eos>"
    assert sample.tokens_T.dtype == np.int32


def test_train_roles_choose_targets_and_change_nothing_else(tokenizer):
    conversation = turns(("user", "a<image>b"), ("assistant", "c<image>d"))
    both = tokenizer.encode_sample(conversation, {"user", "assistant"}, 2, "s")
    none = tokenizer.encode_sample(conversation, (), 2, "s")
    assert np.array_equal(both.tokens_T, none.tokens_T) and np.array_equal(both.image_at_I, none.image_at_I)
    assert not none.trained_T.any()
    assert tokenizer.decode(both.tokens_T[both.trained_T]) == "ab<eos>cd<eos>"


def test_text_cannot_spell_special_tokens_except_box_tags(tokenizer):
    text = "<eos><assistant>[SOI]<pad> <bbox>1 2 3 4</bbox> naïve 漢字"
    ids = tokenizer.encode_sample(turns(("user", text)), (), 0, "s").tokens_T.tolist()
    assert tokenizer.decode(ids[1:-1]) == text
    special = [i for i in ids if i in tokenizer.ids.values()]
    assert special == [tokenizer.ids[name] for name in ("<user>", "<bbox>", "</bbox>", "<eos>")]


@pytest.mark.parametrize(
    "bad, reason",
    [
        (turns(("user", "<image>")), "placeholder mismatch"),
        (turns(("system", "x")), "bad turns"),
        ([{"role": "user"}], "bad turns"),
        ([], "bad turns"),
        (turns(("user", "\ud800")), "bad turns"),
    ],
)
def test_unusable_samples_are_named(tokenizer, bad, reason):
    with pytest.raises(SampleError, match="sample 17") as raised:
        tokenizer.encode_sample(bad, (), 3, "sample 17")
    assert raised.value.reason == reason
    if reason == "placeholder mismatch":
        assert "1 <image> placeholders" in str(raised.value) and "3 images" in str(raised.value)


@pytest.mark.parametrize("name", SPECIALS)
def test_a_tokenizer_without_a_special_token_is_refused(tmp_path, name):
    path = tmp_path / "tokenizer.json"
    build_byte_tokenizer(path)
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != name]
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no special token") as raised:
        Tokenizer(path)
    assert name in str(raised.value)


def test_a_token_that_text_could_spell_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    build_byte_tokenizer(path)
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = token["content"] != "<user>"
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="<user> but not as a special token"):
        Tokenizer(path)


def test_an_unreadable_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="none.json cannot be read"):
        Tokenizer(tmp_path / "none.json")
