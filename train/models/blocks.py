"""The pre-norm transformer block that encoder, mask decoder and text encoder are made of, and a stack of them.

    x = x + keep * attention(norm(x));   x = x + keep * mlp(norm(x))

`keep` is stochastic depth (Huang et al. 2016): 0 or 1 / (1 - p) for a whole segment (an image) and a branch.  It comes
in as data, so that a recomputed block, another layout or another rank drops the same branches.

Legend: N packed tokens, D width, H heads, K head width, I segments, L = 2 * depth residual branches.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from parallel.attention import Segments, attention
from train.models.rotary import rotate

RECOMPUTE = ("none", "selective", "full", "replay")


def kept_for_backward(recompute: str) -> str:
    """What a tower built with this setting asks of its blocks; "replay" is the caller's, who runs the tower again.

    Raises ValueError for a setting that does not exist.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"parallel.encoder.recompute={recompute}: must be one of {', '.join(RECOMPUTE)}")
    return "none" if recompute == "replay" else recompute


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals; tokens attend to all of their segment."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, eps=norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp_up = nn.Linear(width, hidden)
        self.mlp_down = nn.Linear(hidden, width)

    def forward(self, x_ND, cos_NK, sin_NK, segments: Segments, recompute_mlp: bool, keep_2N=None):
        keep_attention_N, keep_mlp_N = (None, None) if keep_2N is None else keep_2N
        q_NHK, k_NHK, v_NHK = self.qkv(self.attention_norm(x_ND)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q_NHK, k_NHK = rotate(q_NHK, cos_NK, sin_NK), rotate(k_NHK, cos_NK, sin_NK)
        seen_ND = self.projection(attention(q_NHK, k_NHK, v_NHK, segments, causal=False).flatten(1))
        x_ND = _add(x_ND, seen_ND, keep_attention_N)
        if recompute_mlp and torch.is_grad_enabled():
            return _add(x_ND, checkpoint(self._mlp, x_ND, use_reentrant=False), keep_mlp_N)
        return _add(x_ND, self._mlp(x_ND), keep_mlp_N)

    def _mlp(self, x_ND):
        return self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x_ND)), approximate="tanh"))


def run_blocks(
    blocks: Iterable[Block],
    x_ND: torch.Tensor,
    cos_NK: torch.Tensor,
    sin_NK: torch.Tensor,
    segments: Segments,
    recompute: str,
    keep_LI: torch.Tensor | None = None,
) -> torch.Tensor:
    """x_ND through all blocks.

    recompute: "none" keeps all activations, "selective" recomputes the MLPs, "full" recomputes whole blocks.
    keep_LI: fp32 factors of segment I's branches, attention and MLP of each block in turn; None for all ones.
    """
    keep_LN = None
    if keep_LI is not None:  # an output size, else the device is asked for it
        keep_LN = keep_LI.repeat_interleave(segments.cu_q_N1.diff(), dim=1, output_size=len(x_ND))
    for place, block in enumerate(blocks):
        keep_2N = None if keep_LN is None else keep_LN[2 * place : 2 * place + 2]
        arguments = (x_ND, cos_NK, sin_NK, segments, recompute == "selective", keep_2N)
        if recompute == "full" and torch.is_grad_enabled():
            x_ND = checkpoint(block, *arguments, use_reentrant=False)
        else:
            x_ND = block(*arguments)
    return x_ND


def _add(x_ND, branch_ND, keep_N):
    return x_ND + branch_ND if keep_N is None else _AddKept.apply(x_ND, branch_ND, keep_N)


class _AddKept(torch.autograd.Function):
    """x + keep * branch, with the product and sum in fp32: 1 / (1 - p) rounded to bf16 would be biased.

    The factors are no saved tensor of autograd: asking for one starts the recomputation of a block, and here did so
    before ZeRO-3 gathered the last matrix: in another order than on a rank whose images come without factors.
    """

    @staticmethod
    def forward(ctx, x_ND, branch_ND, keep_N):
        ctx.keep_N1 = keep_N[:, None]
        return (x_ND + branch_ND * ctx.keep_N1).to(x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        return grad_ND, (grad_ND * ctx.keep_N1).to(grad_ND.dtype), None
