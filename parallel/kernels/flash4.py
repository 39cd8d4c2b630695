"""Packed attention as one custom operator: flash-attn-4 on CUDA, torch's flash kernel on a CPU.

An operator is opaque to `torch.compile`, which then sees tensors with two dynamic sizes (tokens, segments) and no
length of any segment, and has a name that a recompute policy can keep.  flash-attn-4 is called below its own autograd
function, which torch cannot trace (flash_attn/cute/interface.py of 4.0.0b36).  It is not told the longest segment: it
then takes the packed total for it, which only bounds the choice of a kernel; a number that changes with every packing
would compile anew for each.

Legend: T query tokens, S key tokens, H query heads, G key/value heads, K head width, N segments.
"""

import warnings
from functools import cache

import torch
from torch.library import custom_op

from tandem.parallel.kernels import attention_sdpa

INSTALL = "pip install --pre flash-attn-4"


@cache
def kernels():
    """flash-attn-4's forward and backward.  Raises ImportError where it is not installed."""
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    # said at every first call of a kernel, of an argument that none of ours has
    warnings.filterwarnings("ignore", "Argument aux_data .* cannot be converted", UserWarning)

    return _flash_attn_fwd, _flash_attn_bwd


def refusal(device: torch.device, width: int) -> str | None:
    """Why heads of this width cannot run on this CUDA device; None where they can."""
    try:
        kernels()
    except ImportError as error:
        return f"flash-attn-4 cannot be imported ({error}; {INSTALL})"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in (9, 10, 11, 12):
        return f"it has no backward for compute capability {major}.{minor}"
    if major == 12 and torch.are_deterministic_algorithms_enabled():
        return f"it has no deterministic backward for compute capability {major}.{minor}"
    widest = 256 if major == 9 else 128
    if width % 8 or width > widest:
        return f"head width {width} is not a multiple of 8 up to {widest}"
    return None


@custom_op("tandem::packed_attention", mutates_args=(), device_types="cpu")
def packed_attention(
    q_THK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    cu_q_N1: torch.Tensor,
    cu_k_N1: torch.Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [T, H, K] and log-sum-exp [H, T], without a gradient of its own; see `attention.attention`."""
    return attention_sdpa.forward(q_THK, k_SGK, v_SGK, cu_q_N1, cu_k_N1, causal, scale, window)


@packed_attention.register_kernel("cuda")
def _(q_THK, k_SGK, v_SGK, cu_q_N1, cu_k_N1, causal, scale, window):
    flash_forward, _ = kernels()
    out_THK, lse_HT, *_ = flash_forward(
        q_THK,
        k_SGK,
        v_SGK,
        cu_seqlens_q=cu_q_N1,
        cu_seqlens_k=cu_k_N1,
        softmax_scale=scale,
        causal=causal,
        **_sides(causal, window),
        return_lse=True,
    )
    return out_THK, lse_HT


@packed_attention.register_fake
def _(q_THK, k_SGK, v_SGK, cu_q_N1, cu_k_N1, causal, scale, window):
    tokens, heads, _ = q_THK.shape
    lse_HT = q_THK.new_empty((heads, tokens), dtype=attention_sdpa.lse_dtype(q_THK.dtype))
    return q_THK.new_empty(q_THK.shape), lse_HT


@custom_op("tandem::packed_attention_backward", mutates_args=(), device_types="cpu")
def packed_attention_backward(
    grad_THK: torch.Tensor,
    q_THK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    out_THK: torch.Tensor,
    lse_HT: torch.Tensor,
    cu_q_N1: torch.Tensor,
    cu_k_N1: torch.Tensor,
    causal: bool,
    scale: float | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v."""
    return attention_sdpa.backward(
        grad_THK, q_THK, k_SGK, v_SGK, out_THK, lse_HT, cu_q_N1, cu_k_N1, causal, scale, window
    )


@packed_attention_backward.register_kernel("cuda")
def _(grad_THK, q_THK, k_SGK, v_SGK, out_THK, lse_HT, cu_q_N1, cu_k_N1, causal, scale, window):
    _, flash_backward = kernels()
    dq_THK, dk_SGK, dv_SGK = (x.new_empty(x.shape) for x in (q_THK, k_SGK, v_SGK))
    return flash_backward(
        q_THK,
        k_SGK,
        v_SGK,
        out_THK,
        grad_THK,
        lse_HT,
        softmax_scale=scale,
        causal=causal,
        **_sides(causal, window),
        cu_seqlens_q=cu_q_N1,
        cu_seqlens_k=cu_k_N1,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        dq=dq_THK,
        dk=dk_SGK,
        dv=dv_SGK,
    )


@packed_attention_backward.register_fake
def _(grad_THK, q_THK, k_SGK, v_SGK, out_THK, lse_HT, cu_q_N1, cu_k_N1, causal, scale, window):
    return tuple(x.new_empty(x.shape) for x in (q_THK, k_SGK, v_SGK))


def _save(ctx, inputs, output):
    q_THK, k_SGK, v_SGK, cu_q_N1, cu_k_N1, ctx.causal, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(q_THK, k_SGK, v_SGK, *output, cu_q_N1, cu_k_N1)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad_THK, _grad_lse):
    gradients = packed_attention_backward(grad_THK, *ctx.saved_tensors, ctx.causal, ctx.scale, ctx.window)
    return *gradients, None, None, None, None, None


packed_attention.register_autograd(_differentiate, setup_context=_save)


def _sides(causal: bool, window: int | None) -> dict[str, int | None]:
    """How many keys before and after its own a query sees, as flash-attn-4 is told; its `causal` closes the right."""
    side = None if window is None else window - 1
    return {"window_size_left": side, "window_size_right": None if causal else side}
