"""Rotary position embedding in fp32 (RoFormer), on one axis for the LLM and on two for the encoder.

Legend: T tokens, H heads, K head width.
"""

import torch


def axis_angles(positions_T: torch.Tensor, width: int, base: float) -> torch.Tensor:
    """Angles position * base^(-2i/width), fp32 [T, width/2], for one position axis given `width` of the head."""
    frequencies = base ** (-torch.arange(0, width, 2, device=positions_T.device, dtype=torch.float32) / width)
    return positions_T.float()[:, None] * frequencies


def rotate(x_THK: torch.Tensor, cos_TK: torch.Tensor, sin_TK: torch.Tensor) -> torch.Tensor:
    """Rotates the pairs (i, i + K/2) of every head by the angles whose cosines and sines are given; fp32 inside."""
    x = x_THK.float()
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos_TK[:, None] + turned * sin_TK[:, None]).to(x_THK.dtype)


def tables(angles_TJ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines, each [T, K], for `rotate`, from the K/2 angles of every token."""
    doubled_TK = torch.cat((angles_TJ, angles_TJ), dim=-1)
    return doubled_TK.cos(), doubled_TK.sin()
