"""CUDA attention kernels of others that torch or Transformer Engine bring: what each refuses, and how it is called.

Keys and values are repeated for grouped queries only where torch's `varlen_attn` cannot group them (torch 2.11).

Legend: T query tokens, S key tokens, H query heads, G key/value heads, K head width, N segments.
"""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from tandem.parallel.kernels import attention_sdpa

INSTALL_TE = "pip install 'transformer-engine[pytorch]'"
_GROUPS_HEADS = "enable_gqa" in inspect.signature(varlen_attn).parameters
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def varlen_refusal(device: torch.device, width: int) -> str | None:
    """Why torch's FlashAttention-2 cannot run heads of this width on this CUDA device; None where it can."""
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"it needs compute capability 8.0, the device has {major}.{minor}"
    return _width_refusal(width, 256)


def varlen(q_THK, k_SGK, v_SGK, segments, causal, scale, window):
    """`torch.nn.attention.varlen`: FlashAttention-2.  The longest segment only sizes its grid, so a bound will do."""
    if q_THK.shape[0] == 0:  # which the kernel refuses
        return attention_sdpa.by_lengths(q_THK, k_SGK, v_SGK, (0,), (k_SGK.shape[0],), causal, scale, window)
    grouped: dict[str, Any] = {}
    if q_THK.shape[1] != k_SGK.shape[1]:
        if _GROUPS_HEADS:
            grouped = {"enable_gqa": True}
        else:
            repeat = q_THK.shape[1] // k_SGK.shape[1]
            k_SGK, v_SGK = k_SGK.repeat_interleave(repeat, 1), v_SGK.repeat_interleave(repeat, 1)
    return varlen_attn(
        *(q_THK, k_SGK, v_SGK, segments.cu_q_N1, segments.cu_k_N1, segments.longest_q, segments.longest_k),
        scale=scale,
        window_size=_window(causal, window),
        **grouped,
    )


def cudnn_refusal(width: int) -> str | None:
    """Why cuDNN cannot run heads of this width; None where it can."""
    if not torch.backends.cudnn.is_available():
        return "this torch has no cuDNN (install a CUDA build of torch)"
    return _width_refusal(width, 128)


def cudnn(q_THK, k_SGK, v_SGK, segments, causal, scale, window):
    """SDPA on segments that all have the same lengths, cuDNN before torch's other kernels."""
    q_length, k_length = segments.equal
    q_BHTK, k_BGSK, v_BGSK = (
        x.unflatten(0, (len(segments.q_lengths_N), length)).transpose(1, 2)
        for x, length in ((q_THK, q_length), (k_SGK, k_length), (v_SGK, k_length))
    )
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        o_BHTK = F.scaled_dot_product_attention(
            q_BHTK, k_BGSK, v_BGSK, is_causal=causal, scale=scale, enable_gqa=q_THK.shape[1] != k_SGK.shape[1]
        )
    return o_BHTK.transpose(1, 2).flatten(0, 1)


def te_refusal(width: int) -> str | None:
    """Why Transformer Engine cannot run heads of this width; None where it can."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        return f"Transformer Engine cannot be imported ({error}; {INSTALL_TE})"
    return _width_refusal(width, 256)


def te(q_THK, k_SGK, v_SGK, segments, causal, scale, window):
    """Transformer Engine's choice of kernels for packed rows; no operator of torch, so recompute cannot keep it."""
    kind = "padding_causal" if segments.same else "padding_causal_bottom_right"
    module = _te_module(q_THK.shape[1], k_SGK.shape[1], q_THK.shape[2], scale)
    out_TD = module(
        *(q_THK, k_SGK, v_SGK),
        cu_seqlens_q=segments.cu_q_N1,
        cu_seqlens_kv=segments.cu_k_N1,
        max_seqlen_q=segments.longest_q,
        max_seqlen_kv=segments.longest_k,
        attn_mask_type=kind if causal else "padding",
        window_size=_window(causal, window),
    )
    return out_TD.view(q_THK.shape)


@cache
def _te_module(heads: int, kv_heads: int, width: int, scale: float | None):
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads, width, num_gqa_groups=kv_heads, qkv_format="thd", attn_mask_type="padding", softmax_scale=scale
    )


def _width_refusal(width: int, widest: int) -> str | None:
    return f"head width {width} is not a multiple of 8 up to {widest}" if width % 8 or width > widest else None


def _window(causal: bool, window: int | None) -> tuple[int, int]:
    """Keys seen (before, after) the query's own, -1 for all."""
    side = -1 if window is None else window - 1
    return side, 0 if causal else side
