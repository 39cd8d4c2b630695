import numpy as np
import pytest

from tandem.data.media.turns import SampleError
from tandem.data.reading.sample_layout import lay_out

CONVERSATION = [
    {"role": "user", "text": "a<image>b"},
    {
        "role": "user",
        "text": "<video>c",
        "stream": [
            {"time": 0, "role": "assistant", "text": "first"},
            {"time": 1.5, "role": "assistant", "text": "mid"},
            {"time": 2, "role": "user", "text": "on time"},
            {"time": 99, "role": "assistant", "text": "late"},
        ],
    },
    {"role": "assistant", "text": "d<image>"},
]
LAID_OUT = (
    "<user>a[SOI]<image><image>[EOI]b<eos>"
    "<user>[0.0 second][SOI]<image>[EOI]<assistant>first<eos><user>[1.0 second][SOI]<image>[EOI]<assistant>mid<eos>"
    "<user>[2.0 second][SOI]<image>[EOI]<user>on time<eos><user><assistant>late<eos><user>c<eos>"
    "<assistant>d[SOI]<image><image><image>[EOI]<eos>"
)
MEDIA_I, TIME_I, TOKENS_I = np.array([0, 1, 1, 1, 2]), np.array([-1, 0, 1000, 2000, -1]), np.array([2, 1, 1, 1, 3])


@pytest.fixture(scope="module")
def encoded(tokenizer):
    return tokenizer.encode_sample(CONVERSATION, {"assistant"}, ["image", "video", "image"], "s")


@pytest.fixture(scope="module")
def length(encoded, tokenizer):
    events = sum(len(event.tokens) for event in encoded.events_M[1])
    stamps = tokenizer.stamp_lengths(TIME_I[1:4]).sum()
    return int(len(encoded.tokens_T) + events + stamps + 2 * 3 + TOKENS_I.sum())


def test_media_and_events_go_into_their_places(encoded, tokenizer, length):
    tokens, trained, start = lay_out(encoded, tokenizer, MEDIA_I, TIME_I, TOKENS_I, length, "s")
    assert tokenizer.decode(tokens) == LAID_OUT and tokens.dtype == np.int64 and len(tokens) == length
    assert tokenizer.decode(tokens[trained]) == "first<eos>mid<eos>late<eos>d<eos>"
    for first, count in zip(start, TOKENS_I, strict=True):
        around = tokenizer.decode(tokens[first - 1 : first + count + 1])
        assert around == "[SOI]" + "<image>" * count + "[EOI]"


def test_events_before_the_first_frame_follow_it_and_skipped_frames_change_only_their_place(encoded, tokenizer, length):
    stamp = len(tokenizer.stamp(0))
    fewer = length - 2 * (stamp + 2 + 1)
    tokens, _, _ = lay_out(encoded, tokenizer, MEDIA_I[[0, 3, 4]], TIME_I[[0, 3, 4]], TOKENS_I[[0, 3, 4]], fewer, "s")
    text = tokenizer.decode(tokens)
    assert "[2.0 second][SOI]<image>[EOI]<assistant>first<eos><user><assistant>mid<eos><user><user>on time" in text


@pytest.mark.parametrize("kept", range(5))
def test_a_cut_sample_is_a_prefix(encoded, tokenizer, length, kept):
    whole, trained, start = lay_out(encoded, tokenizer, MEDIA_I, TIME_I, TOKENS_I, length, "s")
    before = 1 + (len(tokenizer.stamp(0)) if TIME_I[kept] >= 0 else 0)
    cut = start[kept] - before  # in front of the first image or frame that is not kept
    planned = (MEDIA_I[:kept], TIME_I[:kept], TOKENS_I[:kept])
    tokens, trained_cut, start_cut = lay_out(encoded, tokenizer, *planned, cut, "s")
    assert np.array_equal(tokens, whole[:cut]) and np.array_equal(trained_cut, trained[:cut])
    assert np.array_equal(start_cut, start[:kept])


def test_a_sample_that_does_not_fill_its_plan_is_refused(encoded, tokenizer, length):
    with pytest.raises(SampleError, match="sample 17 makes") as raised:
        lay_out(encoded, tokenizer, MEDIA_I, TIME_I, TOKENS_I, length + 1, "sample 17")
    assert raised.value.reason == "changed"
    with pytest.raises(SampleError, match="sample 17 has an image before its end"):
        lay_out(encoded, tokenizer, MEDIA_I[1:], TIME_I[1:], TOKENS_I[1:], length - 2, "sample 17")
    _, _, start = lay_out(encoded, tokenizer, MEDIA_I, TIME_I, TOKENS_I, length, "s")
    with pytest.raises(SampleError, match="other places"):  # cut inside the last image
        lay_out(encoded, tokenizer, MEDIA_I, TIME_I, TOKENS_I, int(start[-1] + TOKENS_I[-1]), "s")
