"""The pre-norm transformer block that encoder, mask decoder and text encoder are made of, and a stack of them.

    qkv = rotated(qkv(norm(x)));   x = x + keep * projection(attention(qkv));   x = x + keep * mlp(norm(x))
    -------- enter ----------                                 -------------------- leave --------------------

Both halves are compiled where `parallel.compilation` says so, once for all blocks: weights are inputs, and no segment
is seen inside.  What is kept between them is the choice of `recompute`, see `run_blocks`.

`keep` is stochastic depth (Huang et al. 2016): 0 or 1 / (1 - p) for a whole segment (an image) and a branch.  It comes
in as data, so that a recomputed block, another layout or another rank drops the same branches.

Legend: N packed tokens, D width, H heads, K head width, I segments, L = 2 * depth residual branches.
"""

import contextlib
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from parallel import compilation
from parallel.attention import Segments, attention
from parallel.fusion import as_dtype
from parallel.recompute import HostStore, made_again
from train.models.rotary import turn, turn_back

RECOMPUTE = ("none", "selective", "offload", "full", "replay")


def kept_for_backward(recompute: str) -> str:
    """What a tower built with this setting asks of its blocks; "replay" is the caller's, who runs the tower again.

    Raises ValueError for a setting that does not exist.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"parallel.encoder.recompute={recompute}: must be one of {', '.join(RECOMPUTE)}")
    return "none" if recompute == "replay" else recompute


@dataclass(frozen=True)
class BlockPlan:
    """How a block runs.  again: norms, projection and MLP are computed again in the backward; with a store also qkv,
    and what is kept goes there."""

    compiled: bool = False
    again: bool = False
    store: HostStore | None = None


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

    def forward(self, x_ND, cos_NK, sin_NK, segments: Segments, plan: BlockPlan, keep_2N=None):
        again = plan.again and torch.is_grad_enabled()
        enter, leave = (_enter_again, _leave_again) if again else (_enter, _leave)
        if plan.compiled:
            enter, leave = compilation.by_rows(enter), compilation.by_rows(leave)
        qkv = enter(self, x_ND, cos_NK, sin_NK)
        keeping = contextlib.nullcontext()
        if again and plan.store is not None:
            keeping = made_again(qkv, enter, (self, x_ND, cos_NK, sin_NK), plan.store)
        with keeping:
            seen_NHK = attention(*qkv, segments, causal=False)
        return leave(self, x_ND, seen_NHK, keep_2N)

    def _mlp(self, x_ND):
        return self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x_ND)), approximate="tanh"))


def _enter(block: Block, x_ND, cos_NK, sin_NK):
    """Queries, keys and values, each [N, H, K]."""
    qkv_N3HK = block.qkv(block.attention_norm(x_ND)).unflatten(-1, (3, block.heads, -1))
    return _Rotated.apply(qkv_N3HK, cos_NK, sin_NK)


def _leave(block: Block, x_ND, seen_NHK, keep_2N):
    keep_attention_N, keep_mlp_N = (None, None) if keep_2N is None else (keep_2N[0], keep_2N[1])
    x_ND = _add(x_ND, block.projection(seen_NHK.flatten(1)), keep_attention_N)
    return _add(x_ND, block._mlp(x_ND), keep_mlp_N)


def _enter_again(*arguments):
    return checkpoint(_enter, *arguments, use_reentrant=False, preserve_rng_state=False)


def _leave_again(*arguments):
    return checkpoint(_leave, *arguments, use_reentrant=False, preserve_rng_state=False)


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

    recompute: "none" keeps all activations; "selective" a block's input, its queries, keys and values, and what
        attention makes of them; "offload" its input and what attention makes, in host memory; "full" its input.
    keep_LI: fp32 factors of segment I's branches, attention and MLP of each block in turn; None for all ones.

    Compiled blocks see whole buckets of tokens: what is added attends to itself alone and is cut away again.
    """
    blocks, tokens = list(blocks), len(x_ND)
    compiled = compilation.enabled(x_ND.device) and compilation.compilable(blocks)
    if compiled:
        more = compilation.bucket_of(tokens) - tokens
        x_ND, cos_NK, sin_NK = (F.pad(rows, (0, 0, 0, more)) for rows in (x_ND, cos_NK, sin_NK))
        segments = _lengthened(segments, more)
        keep_LI = None if keep_LI is None or not more else F.pad(keep_LI, (0, 1))
    keep_LN = None
    if keep_LI is not None:  # an output size, else the device is asked for it
        keep_LN = keep_LI.repeat_interleave(segments.cu_q_N1.diff(), dim=1, output_size=len(x_ND))
    again = recompute in ("selective", "offload")
    store = None
    if recompute == "offload" and torch.is_grad_enabled():
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        store = HostStore(x_ND.device, [cos_NK, sin_NK, *parameters, *([] if keep_LN is None else [keep_LN])])
    plan = BlockPlan(compiled, again, store)
    with store or contextlib.nullcontext():
        for place, block in enumerate(blocks):
            keep_2N = None if keep_LN is None else keep_LN[2 * place : 2 * place + 2]
            arguments = (x_ND, cos_NK, sin_NK, segments, plan, keep_2N)
            if recompute == "full" and torch.is_grad_enabled():
                x_ND = checkpoint(block, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                x_ND = block(*arguments)
    return x_ND[:tokens] if compiled else x_ND


def _lengthened(segments: Segments, more: int) -> Segments:
    """With one more segment of `more` tokens, unless that is none; made on the device."""
    if not more:
        return segments
    q_lengths, k_lengths = ((*lengths, more) for lengths in (segments.q_lengths_N, segments.k_lengths_N))
    cu_q, cu_k = (torch.cat([cu, cu[-1:] + more]) for cu in (segments.cu_q_N1, segments.cu_k_N1))
    return dataclasses.replace(segments, q_lengths_N=q_lengths, k_lengths_N=k_lengths, cu_q_N1=cu_q, cu_k_N1=cu_k)


class _Rotated(torch.autograd.Function):
    """Queries and keys turned by their positions, and the values, each in memory of its own: a view of the values would
    hold all three before rotation, and gradients of views are put together by one more pass over memory.  The tables
    are no saved tensors: then all that is made again for the backward is the norm, see `_AddKept`."""

    @staticmethod
    def forward(ctx, qkv_N3HK, cos_NK, sin_NK):
        ctx.tables = cos_NK, sin_NK
        q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
        return turn(q_NHK, cos_NK, sin_NK), turn(k_NHK, cos_NK, sin_NK), v_NHK.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx, q_NHK, k_NHK, v_NHK):
        turned = (turn_back(q_NHK, *ctx.tables), turn_back(k_NHK, *ctx.tables))
        return torch.stack((*turned, v_NHK), 1), None, None


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
        return as_dtype(x_ND + branch_ND * ctx.keep_N1, x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        return grad_ND, (grad_ND * ctx.keep_N1).to(grad_ND.dtype), None
