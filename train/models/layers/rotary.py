"""Rotary position embedding in fp32 (RoFormer), on one axis for the LLM and on two for the encoder.

The backward of a rotation is the rotation by the negative angles.

Legend: T tokens, in one dimension or more, H heads, G groups of them that share keys and values, X = H / G + 2, K head
width.
"""

import torch
from torch.autograd.function import once_differentiable

from tandem.parallel.kernels.fusion import as_dtype, fused


def axis_angles(positions_T: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """Angles position * base^(-2i/width), fp32 [T, width/2], for one position axis given `width` of the head."""
    return positions_T.float()[:, None] * axis_frequencies(width, base, positions_T.device)


def axis_frequencies(width: int, base: float, device: torch.device) -> torch.Tensor:
    """base^(-2i/width), fp32 [width/2]."""
    return base ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)


def rotate_qkv(mixed_TGXK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor):
    """(q [T, H, K], k and v [T, G, K]), q and k rotated, from what a linear layer made of each group: its queries, its
    key, its value.  Tables narrower than K turn the first channels of a head.  One pass over memory each way where
    regions are fused."""
    return _RotationOfMixed.apply(mixed_TGXK, cos_TK, sin_TK)


def tables(angles_TJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [T, K], for `turn`, from the K/2 angles of every token."""
    doubled_TK = torch.cat((angles_TJ, angles_TJ), dim=-1)
    return doubled_TK.cos(), doubled_TK.sin()


class _RotationOfMixed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mixed_TGXK, cos_TK, sin_TK):
        ctx.save_for_backward(cos_TK, sin_TK)
        return _turn_mixed(mixed_TGXK, cos_TK, sin_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx, q_THK, k_TGK, v_TGK):
        return _turn_mixed_back(q_THK, k_TGK, v_TGK, *ctx.saved_tensors), None, None


def _turned(x_THK, cos_TK, sin_TK):
    width = cos_TK.shape[-1]
    x = x_THK[..., :width].float()
    half = width // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    out = as_dtype(x * cos_TK[..., None, :] + turned * sin_TK[..., None, :], x_THK.dtype)
    return out if width == x_THK.shape[-1] else torch.cat((out, x_THK[..., width:]), dim=-1)


@fused
def turn(x_THK, cos_TK, sin_TK):
    """The pairs (i, i + K/2) of every head turned by the angles whose `tables` are given; fp32 inside, no autograd."""
    return _turned(x_THK, cos_TK, sin_TK)


@fused
def turn_back(x_THK, cos_TK, sin_TK):
    """The opposite rotation."""
    return _turned(x_THK, cos_TK, -sin_TK)


@fused
def _turn_mixed(mixed_TGXK, cos_TK, sin_TK):
    q_THK = mixed_TGXK[:, :, :-2].flatten(1, 2)
    k_TGK, v_TGK = mixed_TGXK[:, :, -2], mixed_TGXK[:, :, -1]
    return _turned(q_THK, cos_TK, sin_TK), _turned(k_TGK, cos_TK, sin_TK), v_TGK.contiguous()


@fused
def _turn_mixed_back(q_THK, k_TGK, v_TGK, cos_TK, sin_TK):
    q_TGxK = _turned(q_THK, cos_TK, -sin_TK).unflatten(1, (k_TGK.shape[1], -1))
    k_TGK = _turned(k_TGK, cos_TK, -sin_TK)
    return torch.cat((q_TGxK, k_TGK[:, :, None], v_TGK[:, :, None]), 2)
