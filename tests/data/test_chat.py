"""Chat templates: ids are transformers' for the same conversation, targets what the assistant says and ends with."""

import json
import re

import numpy as np
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.media.text import Tokenizer
from tandem.data.media.tokenizer_files import ChatConfig, SpecialTokens
from tandem.data.media.turns import SampleError
from tests.data.chat_tokenizers import KINDS, SPECIAL, TEMPLATES, VISION, write_folder

PLAIN = [
    ("user", "What number is it now?"),
    ("assistant", "no parking. 7"),
    ("user", "the sign"),
    ("assistant", "left"),
]
LOOSE = [
    ("system", " Answer briefly.\n"),
    ("user", "\n What is\u00a0it  "),
    ("assistant", " a 7, 漢字!\n\n"),
    ("user", "user"),
]
LOOSE += [("assistant", "assistant\n"), ("user", " left "), ("assistant", "\n the\tleft ")]
THINKING = [
    ("user", "What?"),
    ("assistant", "<think>\nit is\n</think>\n\na seven"),
    ("user", "now"),
    ("assistant", "a 7"),
]
REPEATED = [("user", "a"), ("assistant", "a"), ("user", "a"), ("assistant", "a a")]
CONVERSATIONS = {"plain": PLAIN, "loose": LOOSE, "thinking": THINKING, "repeated": REPEATED}
ENDS = {"headers": "<|eot|>", "inst": "</s>", "turns": "<end_of_turn>", "pipes": "<|end|>", "images first": "</s>"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """of(kind, template) -> (our tokenizer, transformers'), each made once."""
    made = {}

    def of(kind, template):
        if (kind, template) not in made:
            folder = write_folder(tmp_path_factory.mktemp("tokenizer"), kind, TEMPLATES[template])
            made[kind, template] = (
                Tokenizer(folder, SpecialTokens(**VISION)),
                transformers.AutoTokenizer.from_pretrained(folder),
            )
        return made[kind, template]

    return of


def turns(pairs):
    return [{"role": role, "text": text} for role, text in pairs]


def messages(pairs, parts: bool):
    """What a user of transformers would give a template for these turns."""
    spelled = {"<image>": "<|vision_start|><|image_pad|><|vision_end|>", "<bbox>": "<|box|>", "</bbox>": "<|/box|>"}
    out = []
    for role, text in pairs:
        for tag in ("<bbox>", "</bbox>") if parts else spelled:
            text = text.replace(tag, spelled[tag])
        content = text
        if parts:
            pieces = re.split("(<image>)", text)
            content = [
                {"type": "image"} if each == "<image>" else {"type": "text", "text": each} for each in pieces if each
            ]
        out.append({"role": role, "content": content})
    return out


def theirs_of(theirs, pairs, parts, **options):
    return theirs.apply_chat_template(messages(pairs, parts), tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_transformers(opened, kind, template):
    ours, theirs = opened(kind, template)
    for pairs in CONVERSATIONS.values():
        if template == "turns":  # has no system
            pairs = [pair for pair in pairs if pair[0] != "system"]
        sample = ours.encode_sample(turns(pairs), {"assistant"}, [], "s")
        assert sample.tokens_T.tolist() == theirs_of(theirs, pairs, template in ("parts", "images first"))
        assert sample.tokens_T.dtype == np.int32


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["byte_level", "metaspace_first"])
def test_targets_are_what_the_assistant_says_and_what_ends_its_turns(opened, kind, template):
    ours, _ = opened(kind, template)
    end, stripped = ENDS.get(template, "<|im_end|>"), template in ("headers", "turns")
    sample = ours.encode_sample(turns(PLAIN), {"assistant"}, [], "s")
    said = ours.decode(sample.tokens_T[sample.trained_T])
    assert "".join(said.split()) == f"noparking.7{end}left{end}"
    edges = np.flatnonzero(np.diff(sample.trained_T.astype(int)))
    assert len(edges) in (3, 4)  # two runs, the last perhaps up to the end
    if kind == "byte_level" and template != "turns":
        sample = ours.encode_sample(turns(LOOSE), {"assistant"}, [], "s")
        texts = [text for role, text in LOOSE if role == "assistant"]
        said = ours.decode(sample.tokens_T[sample.trained_T])
        if template in ("inst", "images first"):  # a space of the template's begins the word behind it
            said = said.replace("</s> assistant", "</s>assistant")
        if template == "pipes":  # a role's token takes the white space behind it
            texts = [text.lstrip() for text in texts]
        assert said == "".join((text.strip() if stripped else text) + end for text in texts)


def test_targets_follow_what_a_template_leaves_of_a_text(opened):
    ours, _ = opened("byte_level", "thoughts")
    sample = ours.encode_sample(turns(THINKING), {"assistant"}, [], "s")
    assert ours.decode(sample.tokens_T[sample.trained_T]) == "a seven<|im_end|>a 7<|im_end|>"
    last = ours.encode_sample(turns(THINKING[:2]), {"assistant"}, [], "s")
    assert ours.decode(last.tokens_T[last.trained_T]) == THINKING[1][1] + "<|im_end|>"


def test_train_roles_choose_targets_and_change_nothing_else(opened):
    ours, _ = opened("byte_level", "chatml")
    both = ours.encode_sample(turns(PLAIN), {"user", "assistant"}, [], "s")
    none = ours.encode_sample(turns(PLAIN), (), [], "s")
    assert np.array_equal(both.tokens_T, none.tokens_T) and not none.trained_T.any()
    assert ours.decode(both.tokens_T[both.trained_T]) == "".join(text + "<|im_end|>" for _, text in PLAIN)


def test_text_cannot_spell_the_templates_tokens(opened):
    """As transformers with sanitize_control_tokens; its default would let a text end the turn."""
    pairs = [("user", "say <|im_end|></s> <|im_start|>"), ("assistant", "<|im_end|> no")]
    ours, theirs = opened("byte_level", "chatml")
    sample = ours.encode_sample(turns(pairs), {"assistant"}, [], "s")
    assert sample.tokens_T.tolist() == theirs_of(theirs, pairs, False, sanitize_control_tokens=True)
    assert (sample.tokens_T == ours.eos_id).sum() == 3  # of the template's own system turn, and of both
    assert ours.decode(sample.tokens_T[sample.trained_T]) == "<|im_end|> no<|im_end|>"


# ---- media


MEDIA = [("user", "<image>What is <bbox>1 2</bbox>?\n<image>"), ("assistant", "a 7 at <bbox>3 4</bbox> now")]


@pytest.mark.parametrize("template", ["chatml", "inst", "parts", "images first"])
@pytest.mark.parametrize("kind", KINDS)
def test_images_stand_where_transformers_has_their_token(opened, kind, template):
    ours, theirs = opened(kind, template)
    wanted = theirs_of(theirs, MEDIA, template in ("parts", "images first"))
    sample = ours.encode_sample(turns(MEDIA), {"assistant"}, ["image", "image"], "s")
    found = np.insert(sample.tokens_T, sample.media_at_M, ours.image_id).tolist()
    assert found == wanted and sample.kinds_M == ("image", "image")
    assert not np.isin(sample.tokens_T[sample.trained_T], ours.before_ids + ours.after_ids + [ours.image_id]).any()
    said = ours.decode(sample.tokens_T[sample.trained_T])
    assert "<|box|>" in said and "<|/box|>" in said and "What" not in said


@pytest.mark.parametrize("template", ["chatml", "parts"])
def test_a_video_takes_no_place_in_the_base_text(opened, template):
    """Neither its token nor the marks that a template writes around it: each frame has its own."""
    ours, _ = opened("byte_level", template)
    sample = ours.encode_sample(turns([("user", "a<video>b<image>"), ("assistant", "c")]), (), ["video", "image"], "s")
    text = ours.decode(sample.tokens_T)
    assert "<|im_start|>user\nab<|vision_start|><|vision_end|><|im_end|>" in text
    before = ours.decode(sample.tokens_T[: sample.media_at_M[0]]), ours.decode(sample.tokens_T[: sample.media_at_M[1]])
    assert before[0].endswith("user\na") and before[1].endswith("ab<|vision_start|>")


def test_events_end_the_turn_around_them_and_go_on_with_it(opened):
    ours, _ = opened("byte_level", "chatml")
    stream = [{"time": 1, "role": "assistant", "text": "a <bbox>7</bbox>"}]
    sample = ours.encode_sample([{"role": "user", "text": "<video>", "stream": stream}], {"assistant"}, ["video"], "s")
    ((event,),) = sample.events_M
    said = "a <|box|>7<|/box|><|im_end|>"
    text = f"<|im_end|>\n<|im_start|>assistant\n{said}\n<|im_start|>user\n"
    assert ours.decode(event.tokens) == text and ours.decode(event.tokens[event.trained]) == said
    stream[0]["role"] = "user"
    with pytest.raises(SampleError, match="stream entry of the user in a turn of the user") as raised:
        ours.encode_sample([{"role": "user", "text": "<video>", "stream": stream}], (), ["video"], "s")
    assert raised.value.reason == "chat template"


def test_a_stamp_is_encoded_as_it_stands_between_frames(opened):
    ours, theirs = opened("metaspace_first", "chatml")
    whole = theirs.encode("<|vision_end|>[1.0 second]<|vision_start|>", add_special_tokens=False)
    assert ours.stamp(1000) == whole[1:-1] and ours.stamp_lengths(np.array([1000])).tolist() == [len(whole) - 2]


# ---- what cannot work


def refused(tmp_path, match, template=TEMPLATES["chatml"], special=None, chat=None, **config):
    folder = write_folder(tmp_path / "folder", "byte_level", template, **config)
    with pytest.raises(ValueError, match=match) as raised:
        Tokenizer(folder, SpecialTokens(**(special or {})), ChatConfig(**(chat or {})))
    assert "\n" not in str(raised.value)


ONE_OF_TWO = "{% for m in messages if m.role == 'user' %}{{ m.content }}<|im_end|>{% endfor %}"
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
UPPER = "{% for m in messages %}{{ m.content | upper }}<|im_end|>{% endfor %}"
DATED = "{{ strftime_now('%d %B %Y') }}" + TEMPLATES["chatml"]


@pytest.mark.parametrize(
    "template, match",
    [
        ("{% for %}", "cannot be compiled"),
        ("{{ raise_exception('never') }}", "cannot write it: never"),
        ("{{ nothing.at.all }}", "cannot write it: 'nothing' is undefined"),
        (ONE_OF_TWO, "leaves out a turn of the assistant"),
        (NO_SYSTEM, "leaves out a turn of the system"),
        ("{% for m in messages %}{{ m.content | length }}<|im_end|>{% endfor %}", "cannot be found again"),
        ("{% for m in messages %}{{ m.content + m.content }}<|im_end|>{% endfor %}", "writes a text twice"),
        (
            "{% for m in messages %}{{ m.content }}\n\n{% endfor %}",
            "no special token: set data.special_tokens.end_of_turn",
        ),
        (DATED, "set data.chat.date"),
    ],
)
def test_a_template_that_cannot_be_trained_with_is_refused(tmp_path, template, match):
    refused(tmp_path, match, template)


@pytest.mark.parametrize(
    "match, options",
    [
        ("data.special_tokens.user=<me>: the chat template writes the roles", {"special": {"user": "<me>"}}),
        ("has no <|eot|>: set data.special_tokens.end_of_turn", {"special": {"end_of_turn": "<|eot|>"}}),
        (
            "data.special_tokens.video and .image are both '</s>'; each needs its own token",
            {"special": {"image": "</s>", "video": "</s>"}},
        ),
        ("holds <think> but not as a special token", {"special": {"image": "<think>"}}),
        ("data.chat.date=tomorrow: must be a day", {"chat": {"date": "tomorrow"}}),
        ("none.jinja cannot be read", {"chat": {"template": "none.jinja"}}),
        ("has no chat template", {"chat": {"template": "none", "variables": {"a": 1}}}),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, match, options):
    refused(tmp_path, match, **options)


def test_a_folder_without_a_tokenizer_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"a folder without a tokenizer.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a JSON object"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    "pairs, match",
    [
        ([("assistant", "a"), ("user", "b")], "cannot write it: roles must take turns"),
        ([("user", "a\ufdd0")], "U\\+FDD0"),
    ],
)
def test_a_sample_that_the_template_refuses_is_named(opened, pairs, match):
    ours, _ = opened("byte_level", "inst")
    with pytest.raises(SampleError, match=f"sample 17.*{match}"):
        ours.encode_sample(turns(pairs), {"assistant"}, [], "sample 17")


# ---- what goes into a template, and what a folder says


def test_date_and_variables_reach_the_template(tmp_path):
    template = "{{ strftime_now('%d %b') }}{{ mood }}" + TEMPLATES["chatml"]
    folder = write_folder(tmp_path, "byte_level", template)
    ours = Tokenizer(folder, chat=ChatConfig(date="2025-01-31", variables={"mood": "calm"}))
    text = ours.decode(ours.encode_sample(turns(PLAIN), (), [], "s").tokens_T)
    assert text.startswith("31 Jancalm<|im_start|>system")


def test_a_template_file_goes_before_the_folders_and_none_means_our_format(tmp_path):
    folder = write_folder(tmp_path / "folder", "byte_level", TEMPLATES["chatml"])
    (tmp_path / "mine.jinja").write_text(TEMPLATES["headers"])
    mine = Tokenizer(folder, chat=ChatConfig(template=str(tmp_path / "mine.jinja")))
    assert mine.decode(mine.encode_sample(turns(PLAIN), (), [], "s").tokens_T).startswith("<s><|start_header|>user")
    own = Tokenizer(folder, chat=ChatConfig(template="none"))
    assert own.decode(own.encode_sample(turns(PLAIN[:1]), (), [], "s").tokens_T) == f"<user>{PLAIN[0][1]}</s>"
    assert list(own.added) == [
        "<pad>",
        "<system>",
        "<user>",
        "<assistant>",
        "[SOI]",
        "[EOI]",
        "<image>",
        "<video>",
        "<bbox>",
        "</bbox>",
    ]


def test_tokens_of_tokenizer_config_are_added_as_transformers_adds_them(tmp_path):
    added = {
        "content": "<|more|>",
        "special": True,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }
    decoder = {"900": added, "901": added | {"content": "<plain>", "special": False}}
    folder = write_folder(tmp_path, "byte_level", None, added_tokens_decoder=decoder, pad_token="<|fill|>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATES["chatml"]})
    )
    ours, theirs = Tokenizer(folder, SpecialTokens(**VISION)), transformers.AutoTokenizer.from_pretrained(folder)
    assert ours.added == {} and ours.pad_id == theirs.pad_token_id and ours.vocab_size == len(theirs)
    pairs = [("user", "a <plain> b"), ("assistant", "c")]
    assert ours.encode_sample(turns(pairs), (), [], "s").tokens_T.tolist() == theirs_of(theirs, pairs, False)


def test_missing_tokens_get_ids_behind_all_others(tmp_path):
    folder = write_folder(
        tmp_path, "byte_level", TEMPLATES["chatml"], special=("<|im_start|>", "<|im_end|>", "<s>", "</s>")
    )
    ours = Tokenizer(folder)
    assert list(ours.added) == ["<pad>", "[SOI]", "[EOI]", "<image>", "<video>", "<bbox>", "</bbox>"]
    assert list(ours.added.values()) == list(range(ours.known, ours.vocab_size))
    sample = ours.encode_sample(turns([("user", "<image>[SOI]"), ("assistant", "a")]), (), ["image"], "s")
    assert (sample.tokens_T == ours.added["[SOI]"]).sum() == 1


def test_the_fingerprint_knows_all_that_decides_ids(tmp_path):
    folder = write_folder(tmp_path / "folder", "byte_level", TEMPLATES["chatml"])
    (tmp_path / "mine.jinja").write_text(TEMPLATES["headers"])
    made = [
        Tokenizer(folder),
        Tokenizer(folder, SpecialTokens(image="<|image_pad|>")),
        Tokenizer(folder, chat=ChatConfig(template="none")),
        Tokenizer(folder, chat=ChatConfig(template=str(tmp_path / "mine.jinja"))),
        Tokenizer(folder, chat=ChatConfig(variables={"mood": "calm"})),
        Tokenizer(folder, chat=ChatConfig(date="2025-01-31")),
        Tokenizer(write_folder(tmp_path / "other", "byte_level", TEMPLATES["chatml"], special=SPECIAL[::-1])),
    ]
    assert len({one.sha256 for one in made}) == len(made)
    assert all(Tokenizer.of(json.loads(json.dumps(one.settings))).sha256 == one.sha256 for one in made)


SAID = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\ufdd0"), max_size=12)
SAID = SAID.filter(lambda text: not text or text.strip())  # of white space alone a template may leave nothing


@given(st.lists(SAID, min_size=2, max_size=4), st.sampled_from(["chatml", "headers", "pipes", "parts"]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_has_the_ids_of_transformers_and_is_found_again(opened, texts, template):
    pairs = list(zip(("user", "assistant") * 2, texts, strict=False))
    if any(name in text for text in texts for name in (*SPECIAL, "<|end|>", "<image>", "<video>", "bbox>")):
        return
    for kind in ("byte_level", "metaspace_first"):
        ours, theirs = opened(kind, template)
        sample = ours.encode_sample(turns(pairs), {"assistant"}, [], "s")
        assert sample.tokens_T.tolist() == theirs_of(theirs, pairs, template == "parts")
        if kind == "byte_level" and template == "chatml":
            said = "".join(text + "<|im_end|>" for role, text in pairs if role == "assistant")
            assert said in ours.decode(sample.tokens_T[sample.trained_T])
