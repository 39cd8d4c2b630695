import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.reading.captions import captions

EOS = 7


def plainly(tokens_RP, trained_RP, runs, max_tokens):
    """The same, token by token."""
    out, lengths = [], []
    for tokens, trained in zip(tokens_RP.tolist(), trained_RP.tolist(), strict=True):
        found, open_run = [], False
        for token, is_trained in zip(tokens, trained, strict=True):
            if is_trained and not open_run:
                found.append([])
            if is_trained:
                found[-1].append(token)
            open_run = is_trained
        whole = [run if len(run) > 1 and run[-1] == EOS else [] for run in found[:runs]]
        kept = [run if len(run) <= max_tokens else run[: max_tokens - 1] + run[-1:] for run in whole]
        lengths.append([len(run) for run in kept] + [0] * (runs - len(kept)))
        out += [token for run in kept for token in run]
    return out, lengths


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 5), st.integers(0, 30), st.integers(1, 3), st.integers(2, 12), st.integers(0, 10**6))
def test_captions_are_the_runs_of_trained_tokens(rows, positions, runs, max_tokens, seed):
    rng = np.random.default_rng(seed)
    tokens_RP = rng.integers(0, EOS + 3, (rows, positions)).astype(np.int32)
    trained_RP = rng.random((rows, positions)) < rng.choice([0, 0.3, 0.8, 1])
    tokens_T, lengths_RK = captions(tokens_RP, trained_RP, runs, max_tokens, EOS)
    assert tokens_T.dtype == np.int32 and lengths_RK.shape == (rows, runs)
    expected = plainly(tokens_RP, trained_RP, runs, max_tokens)
    assert (tokens_T.tolist(), lengths_RK.tolist()) == expected


@pytest.mark.parametrize(
    "turns, runs, expected",
    [
        ((("user", "x"), ("assistant", "a cat")), 1, ["a cat<eos>"]),
        ((("user", "x"), ("assistant", "a cat"), ("user", "y"), ("assistant", "meow")), 2, ["a cat<eos>", "meow<eos>"]),
        ((("assistant", "one"), ("assistant", "two"), ("assistant", "three")), 2, ["one<eos>", "two<eos>"]),
        ((("user", "x"),), 2, ["", ""]),  # nothing is trained
        ((("assistant", ""), ("assistant", "meow")), 2, ["", "meow<eos>"]),  # <eos> alone is no caption
    ],
)
def test_captions_of_turns(tokenizer, turns, runs, expected):
    content = [{"role": role, "text": text} for role, text in turns]
    encoded = tokenizer.encode_sample(content, ("assistant",), (), "the sample")
    tokens_T, lengths_1K = captions(encoded.tokens_T[None], encoded.trained_T[None], runs, 64, tokenizer.eos_id)
    ends = np.cumsum(lengths_1K[0])
    found = [tokenizer.decode(tokens_T[end - length : end]) for end, length in zip(ends, lengths_1K[0], strict=True)]
    assert found == expected


def test_a_long_caption_keeps_its_end(tokenizer):
    encoded = tokenizer.encode_sample([{"role": "assistant", "text": "a long story"}], ("assistant",), (), "the sample")
    tokens_T, lengths_RK = captions(encoded.tokens_T[None], encoded.trained_T[None], 1, 5, tokenizer.eos_id)
    assert tokenizer.decode(tokens_T) == "a lo<eos>" and lengths_RK.tolist() == [[5]]


@pytest.mark.parametrize("positions, lengths", [(17, [6, 5]), (16, [6, 0]), (13, [6, 0]), (7, [6, 0]), (6, [0, 0])])
def test_a_caption_cut_by_its_row_is_none(tokenizer, positions, lengths):
    """Its last token is no <eos>, and is not taken for one."""
    turns = [
        {"role": role, "text": text} for role, text in (("assistant", "a cat"), ("user", "??"), ("assistant", "meow"))
    ]
    encoded = tokenizer.encode_sample(turns, ("assistant",), (), "the sample")
    assert len(encoded.tokens_T) == 17
    row = encoded.tokens_T[None, :positions], encoded.trained_T[None, :positions]
    tokens_T, lengths_RK = captions(*row, 2, 64, tokenizer.eos_id)
    assert lengths_RK.tolist() == [lengths]
    assert tokenizer.decode(tokens_T) == "a cat<eos>meow<eos>"[: {0: 0, 6: 10, 11: 19}[sum(lengths)]]
