"""The one attention entry point, for encoder and LLM: packed segments, causal or not, grouped-query heads.

A `Segments` says where segments of q and of k/v begin; tokens attend inside their segment only.  With fewer queries
than keys a causal segment is aligned at its end (FlashAttention's varlen convention), as context parallelism
needs it.  CUDA takes `torch.nn.attention.varlen`; the CPU runs SDPA over runs of equal segments.

Legend: T query tokens, S key tokens, H query heads, G key/value heads, K head width, N segments.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from parallel.transfer import host_to_device

try:  # torch >= 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


@dataclass(frozen=True)
class Segments:
    """Borders of N segments in packed queries and keys, on the host (for plans) and on the device (for kernels)."""

    q_lengths_N: tuple[int, ...]
    k_lengths_N: tuple[int, ...]
    cu_q_N1: torch.Tensor
    cu_k_N1: torch.Tensor

    @staticmethod
    def of(q_lengths_N, k_lengths_N=None, device: torch.device | str = "cpu") -> "Segments":
        """Segments from their lengths; keys as long as queries unless `k_lengths_N` is given."""
        q = np.asarray(q_lengths_N, dtype=np.int64)
        k = q if k_lengths_N is None else np.asarray(k_lengths_N, dtype=np.int64)
        cu_q, cu_k = (host_to_device(np.concatenate([[0], x.cumsum()]).astype(np.int32), device) for x in (q, k))
        return Segments(tuple(q.tolist()), tuple(k.tolist()), cu_q, cu_k)


def attention(
    q_THK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention inside each segment, [T, H, K]; `scale` defaults to K ** -0.5."""
    if q_THK.is_cuda and q_THK.dtype in (torch.float16, torch.bfloat16):
        return _varlen(q_THK, k_SGK, v_SGK, segments, causal, scale)
    return _sdpa(q_THK, k_SGK, v_SGK, segments, causal, scale)


def _varlen(q_THK, k_SGK, v_SGK, segments, causal, scale):
    if varlen_attn is None:
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.attention.varlen; torch >= 2.11 is needed")
    repeat = q_THK.shape[1] // k_SGK.shape[1]
    if repeat > 1:  # enable_gqa came with torch 2.12
        k_SGK, v_SGK = k_SGK.repeat_interleave(repeat, 1), v_SGK.repeat_interleave(repeat, 1)
    window = (-1, 0) if causal else (-1, -1)
    longest_q, longest_k = max(segments.q_lengths_N), max(segments.k_lengths_N)
    kwargs = {} if scale is None else {"scale": scale}
    return varlen_attn(
        q_THK, k_SGK, v_SGK, segments.cu_q_N1, segments.cu_k_N1, longest_q, longest_k, window_size=window, **kwargs
    )


def _sdpa(q_THK, k_SGK, v_SGK, segments, causal, scale):
    """SDPA over each run of neighbouring segments of the same lengths, as one batch."""
    outputs, q_at, k_at = [], 0, 0
    lengths = list(zip(segments.q_lengths_N, segments.k_lengths_N, strict=True))
    place = 0
    while place < len(lengths):
        end = place
        while end < len(lengths) and lengths[end] == lengths[place]:
            end += 1
        count, (q_length, k_length) = end - place, lengths[place]
        q_BHTK, k_BGSK, v_BGSK = (
            x[at : at + count * length].unflatten(0, (count, length)).transpose(1, 2)
            for x, at, length in ((q_THK, q_at, q_length), (k_SGK, k_at, k_length), (v_SGK, k_at, k_length))
        )
        aligned = q_length == k_length
        mask_TS = None if aligned or not causal else _end_aligned_mask(q_length, k_length, q_THK.device)
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, attn_mask=mask_TS, is_causal=causal and aligned, scale=scale, enable_gqa=True
        )
        outputs.append(o_BHTK.transpose(1, 2).flatten(0, 1))
        q_at, k_at, place = q_at + count * q_length, k_at + count * k_length, end
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _end_aligned_mask(q_length, k_length, device):
    query_T1 = torch.arange(k_length - q_length, k_length, device=device)[:, None]
    return torch.arange(k_length, device=device)[None] <= query_T1
