"""Packed attention by torch's scaled_dot_product_attention (SDPA), on any device and in any dtype.

Eager code takes all segments of the same lengths as one batch.  Compiled code must not look at lengths, or it would be
traced anew for every packing: on a CPU it gets an operator (parallel/kernels/flash4.py), whose forward and backward are
here, segment by segment.  Eager code is not sent through it: an operator written in Python costs 0.3 ms a call.

Legend: T query tokens, S key tokens, H query heads, G key/value heads, K head width, N segments, B those of one shape.
"""

from collections.abc import Iterator
from itertools import groupby

import torch
import torch.nn.functional as F

_kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_kernel_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def by_lengths(q_THK, k_SGK, v_SGK, q_lengths_N, k_lengths_N, causal: bool, scale: float | None, window: int | None):
    """SDPA over all segments of the same lengths as one batch, [T, H, K]; zeros for queries without keys.

    Runs of equal segments are split off rather than sliced: the backward of a split is one concatenation, that of a
    slice is a zero tensor of all tokens.
    """
    pairs = list(zip(q_lengths_N, k_lengths_N, strict=True)) or [(0, 0)]
    runs = [(pair, len(list(same))) for pair, same in groupby(pairs)]
    places: dict[tuple[int, int], list[int]] = {}
    for place, (pair, _) in enumerate(runs):
        places.setdefault(pair, []).append(place)
    q_sizes, k_sizes = ([count * pair[side] for pair, count in runs] for side in (0, 1))
    q_parts, k_parts, v_parts = _cut(q_THK, q_sizes), _cut(k_SGK, k_sizes), _cut(v_SGK, k_sizes)
    outputs = list(q_parts)
    for (q_length, k_length), same in places.items():
        count = sum(runs[place][1] for place in same)
        q_BHTK, k_BGSK, v_BGSK = (
            _join([parts[place] for place in same]).unflatten(0, (count, length)).transpose(1, 2)
            for parts, length in ((q_parts, q_length), (k_parts, k_length), (v_parts, k_length))
        )
        is_causal, mask_TS = _mask(q_length, k_length, causal, window, q_THK)
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_TS, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        parts = _cut(o_BHTK.transpose(1, 2).flatten(0, 1), [q_sizes[place] for place in same])
        for place, part in zip(same, parts, strict=True):
            outputs[place] = part
    return _join(outputs)


def forward(q_THK, k_SGK, v_SGK, cu_q_N1, cu_k_N1, causal: bool, scale: float | None, window: int | None):
    """On a CPU: output [T, H, K] and log-sum-exp [H, T]; zeros and -inf for queries without keys."""
    out_THK = q_THK.new_zeros(q_THK.shape)
    lse_HT = q_THK.new_full((q_THK.shape[1], len(q_THK)), float("-inf"), dtype=lse_dtype(q_THK.dtype))
    for q_at, k_at in _places(cu_q_N1, cu_k_N1, q_THK, k_SGK):
        is_causal, mask_TS = _kernel_mask(q_at, k_at, causal, window, q_THK)
        tensors = (_batch(q_THK[q_at]), _batch(k_SGK[k_at]), _batch(v_SGK[k_at]))
        o_1HTK, lse_1HT = _kernel(*tensors, 0.0, is_causal, attn_mask=mask_TS, scale=scale)
        out_THK[q_at], lse_HT[:, q_at] = o_1HTK[0].transpose(0, 1), lse_1HT[0]
    return out_THK, lse_HT


def backward(grad_THK, q_THK, k_SGK, v_SGK, out_THK, lse_HT, cu_q_N1, cu_k_N1, causal, scale, window):
    """On a CPU: gradients of q, k and v."""
    dq_THK, dk_SGK, dv_SGK = (x.new_zeros(x.shape) for x in (q_THK, k_SGK, v_SGK))
    for q_at, k_at in _places(cu_q_N1, cu_k_N1, q_THK, k_SGK):
        is_causal, mask_TS = _kernel_mask(q_at, k_at, causal, window, q_THK)
        tensors = (_batch(grad_THK[q_at]), _batch(q_THK[q_at]), _batch(k_SGK[k_at]), _batch(v_SGK[k_at]))
        saved = (_batch(out_THK[q_at]), lse_HT[None, :, q_at])
        parts = _kernel_backward(*tensors, *saved, 0.0, is_causal, attn_mask=mask_TS, scale=scale)
        dq_THK[q_at], dk_SGK[k_at], dv_SGK[k_at] = (part_1HTK[0].transpose(0, 1) for part_1HTK in parts)
    return dq_THK, dk_SGK, dv_SGK


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the log-sum-exp: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cut(x_THK, sizes):
    return x_THK.split(sizes) if len(sizes) > 1 else (x_THK,)


def _join(parts):
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _batch(x_THK):
    return x_THK[None].transpose(1, 2)


def _places(cu_q_N1, cu_k_N1, q_THK, k_SGK) -> Iterator[tuple[slice, slice]]:
    """Where queries and keys of each segment stand that has both."""
    cu_q, cu_k = cu_q_N1.tolist(), cu_k_N1.tolist()
    if (cu_q[-1], cu_k[-1]) != (len(q_THK), len(k_SGK)):
        raise ValueError(f"segments of {cu_q[-1]} queries and {cu_k[-1]} keys, but {len(q_THK)} and {len(k_SGK)} came")
    for q, q_end, k, k_end in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
        if q_end > q and k_end > k:
            yield slice(q, q_end), slice(k, k_end)


def _kernel_mask(q_at: slice, k_at: slice, causal: bool, window: int | None, like: torch.Tensor):
    is_causal, seen_TS = _mask(q_at.stop - q_at.start, k_at.stop - k_at.start, causal, window, like)
    if seen_TS is None:
        return is_causal, None
    return is_causal, like.new_zeros(seen_TS.shape).masked_fill_(~seen_TS, float("-inf"))


def _mask(q_length: int, k_length: int, causal: bool, window: int | None, like: torch.Tensor):
    """SDPA's (is_causal, which keys a query sees [T, S] or None); the last query stands at the last key."""
    if window is None and (not causal or q_length == k_length):
        return causal, None
    query_T1 = torch.arange(k_length - q_length, k_length, device=like.device)[:, None]
    ahead_TS = torch.arange(k_length, device=like.device)[None] - query_T1
    furthest = k_length if window is None else window - 1
    seen_TS = ahead_TS >= -furthest
    return False, seen_TS & (ahead_TS <= (0 if causal else furthest))
