"""The attention entry point against plain softmax, segment by segment."""

import pytest
import torch

from parallel.attention import Segments, attention


def reference(q_THK, k_SGK, v_SGK, segments, causal):
    repeat = q_THK.shape[1] // k_SGK.shape[1]
    k_SHK, v_SHK = k_SGK.repeat_interleave(repeat, 1), v_SGK.repeat_interleave(repeat, 1)
    outputs, q_at, k_at = [], 0, 0
    for q_length, k_length in zip(segments.q_lengths_N, segments.k_lengths_N, strict=True):
        q, k, v = q_THK[q_at : q_at + q_length], k_SHK[k_at : k_at + k_length], v_SHK[k_at : k_at + k_length]
        scores = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
        if causal:
            visible = torch.ones(q_length, k_length, dtype=torch.bool).tril(k_length - q_length)
            scores = scores.masked_fill(~visible, float("-inf"))
        outputs.append(torch.einsum("hts,shk->thk", scores.softmax(-1), v))
        q_at, k_at = q_at + q_length, k_at + k_length
    return torch.cat(outputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [([7], None), ([4, 4, 4, 9, 1, 1], None), ([3, 5], [8, 5]), ([2, 2, 6], [5, 5, 6])]
)
def test_matches_plain_softmax(causal, q_lengths, k_lengths):
    torch.manual_seed(0)
    segments = Segments.of(q_lengths, k_lengths)
    q = torch.randn(sum(q_lengths), 4, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(k_lengths or q_lengths), 2, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    ours, plain = attention(q, k, v, segments, causal=causal), reference(q, k, v, segments, causal)
    torch.testing.assert_close(ours, plain)
    weight = torch.randn_like(plain)
    for mine, other in zip(
        torch.autograd.grad((ours * weight).sum(), (q, k, v)),
        torch.autograd.grad((plain * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, other)
