"""Dense attention in fp64, one segment after another, and random packings to compare it on."""

import numpy as np
import torch

from tandem.parallel.kernels.attention import Segments


def dense(q_THK, k_SGK, v_SGK, segments, causal, window=None, scale=None):
    """[T, H, K] in fp64 by the formula: the last query stands at the last key."""
    repeat = q_THK.shape[1] // k_SGK.shape[1]
    q_THK, k_SHK, v_SHK = q_THK.double(), *(x.double().repeat_interleave(repeat, 1) for x in (k_SGK, v_SGK))
    outputs, q_at, k_at = [], 0, 0
    for q_length, k_length in zip(segments.q_lengths_N, segments.k_lengths_N, strict=True):
        q, k, v = q_THK[q_at : q_at + q_length], k_SHK[k_at : k_at + k_length], v_SHK[k_at : k_at + k_length]
        scores_HTS = torch.einsum("thk,shk->hts", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        ahead_TS = torch.arange(k_length)[None] - torch.arange(k_length - q_length, k_length)[:, None]
        hidden_TS = ahead_TS > 0 if causal else torch.zeros_like(ahead_TS, dtype=torch.bool)
        if window is not None:
            hidden_TS = hidden_TS | (ahead_TS.abs() >= window)
        scores_HTS = scores_HTS.masked_fill(hidden_TS.to(q.device), float("-inf"))
        outputs.append(torch.einsum("hts,shk->thk", scores_HTS.softmax(-1), v))
        q_at, k_at = q_at + q_length, k_at + k_length
    return torch.cat(outputs) if outputs else q_THK


def packing(rng: np.random.Generator, longest: int, unequal: bool) -> tuple[list[int], list[int]]:
    """Lengths of queries and keys of a few segments, some of them equal, some empty; never more queries than keys."""
    distinct = rng.integers(0, longest, 4)
    k_lengths = rng.choice(distinct, rng.integers(1, 9))
    q_lengths = rng.integers(0, k_lengths + 1) if unequal else k_lengths
    return q_lengths.tolist(), k_lengths.tolist()


def drawn(segments: Segments, heads, kv_heads, width, dtype, device="cpu", seed=0) -> list[torch.Tensor]:
    """q, k, v with gradients, and a weight of the output, so that no gradient is a sum of equals."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = sum(segments.q_lengths_N), sum(segments.k_lengths_N)
    shapes = [(queries, heads, width), (keys, kv_heads, width), (keys, kv_heads, width), (queries, heads, width)]
    q, k, v, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [*(x.to(device, dtype).requires_grad_() for x in (q, k, v)), weight.to(device, dtype)]


def with_gradients(output, inputs, weight) -> list[torch.Tensor]:
    """The output and the gradients of its weighted sum."""
    return [output.detach(), *torch.autograd.grad((output * weight.to(output.dtype)).sum(), inputs)]
