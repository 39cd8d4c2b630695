"""The pre-norm transformer block that encoder, mask decoder and text encoder are made of, and a stack of them.

    qkv = rotated(product(norm(x)))     enter    from a block's input to its attention
    seen = attention(qkv)
    x = x + keep * projection(seen)     leave    from there to its output
    x = x + keep * mlp(norm(x))

Everything but attention is compiled where `parallel.kernels.compilation` says so, from one attention to the next:
`leave` of a block and `enter` of the next are one region (`cross`).  Sums of the residual stream, and of its gradients,
are then no passes over memory of their own, nor are gradients of biases (`parallel.kernels.fusion.in_buckets`).  A
region is compiled once for all blocks: weights are inputs, and no segment is seen inside.  What is kept between them is
the choice of `recompute`, see `run_blocks`.

`keep` is stochastic depth (Huang et al. 2016): 0 or 1 / (1 - p) for a whole segment (an image) and a branch.  It comes
in as data, so that a recomputed block, another layout or another rank drops the same branches.

Legend: N packed tokens, D width, H heads, K head width, I segments, L = 2 * depth residual branches.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from tandem.parallel.kernels import compilation
from tandem.parallel.kernels.attention import Segments, attention
from tandem.parallel.kernels.fusion import as_dtype, in_buckets, product_of, rms_norm, sum_of_buckets
from tandem.parallel.kernels.recompute import HostStore, recomputed
from tandem.train.models.layers.activations import ActivatedLinear
from tandem.train.models.layers.rotary import turn, turn_back

NORMS = ("layernorm", "rmsnorm")
RECOMPUTE = ("none", "selective", "offload", "full", "replay")


def kept_for_backward(recompute: str) -> str:
    """What a tower built with this setting asks of its blocks; "replay" is the caller's, who runs the tower again.

    Raises ValueError for a setting that does not exist.
    """
    if recompute not in RECOMPUTE:
        raise ValueError(f"parallel.encoder.recompute={recompute}: must be one of {', '.join(RECOMPUTE)}")
    return "none" if recompute == "replay" else recompute


@dataclass(frozen=True)
class Style:
    """What blocks of one size differ in.  norm: of NORMS.  activation: of `activations.ACTIVATIONS`.  bias: whether
    linear layers have one."""

    norm: str = "layernorm"
    activation: str = "gelu_tanh"
    bias: bool = True


class RMSNorm(nn.RMSNorm):
    """By the kernel that the LLM's norms use."""

    def __init__(self, width: int, eps: float):
        super().__init__(width, eps=eps)
        self.epsilon = eps

    def forward(self, x_ND):
        return rms_norm(x_ND, self.weight, self.epsilon)


def new_norm(kind: str, width: int, eps: float) -> nn.Module:
    """A norm of NORMS."""
    return RMSNorm(width, eps) if kind == "rmsnorm" else nn.LayerNorm(width, eps=eps)


class RotatedLinear(nn.Linear):
    """A linear layer to queries, keys and values, of which the first two are turned by their positions."""

    def __init__(self, width: int, heads: int, bias: bool = True):
        super().__init__(width, 3 * width, bias=bias)
        self.heads = heads

    def forward(self, x_ND, cos_NK, sin_NK):  # type: ignore[override]  # a linear layer with more to it
        """Queries, keys and values, each [N, H, K]; without tables nothing is turned."""
        product_NY, bias_Y = product_of(self, x_ND)
        parts = (3, self.heads, -1)
        bias_3HK = None if bias_Y is None else bias_Y.view(parts)
        return _Rotated.apply(product_NY.unflatten(-1, parts), bias_3HK, cos_NK, sin_NK)


class ResidualLinear(nn.Linear):
    """A linear layer whose result is added to a residual stream."""

    def forward(self, h_NF, x_ND, keep_N=None):  # type: ignore[override]  # a linear layer with more to it
        branch_ND = super().forward(h_NF)
        return x_ND + branch_ND if keep_N is None else _AddKept.apply(x_ND, branch_ND, keep_N)


def hidden_width(width: int, mlp_ratio: float) -> int:
    """Hidden width of an MLP, rounded down; the ratio of two widths gives the first of them, whatever its rounding."""
    return int(width * mlp_ratio + 1e-6)


class Block(nn.Module):
    """The weights of pre-norm attention and MLP with residuals; tokens attend to all of their segment."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, norm_eps: float, style: Style = Style()):
        super().__init__()
        hidden, bias = hidden_width(width, mlp_ratio), style.bias
        self.attention_norm = new_norm(style.norm, width, norm_eps)
        self.qkv = RotatedLinear(width, heads, bias)
        self.projection = ResidualLinear(width, width, bias=bias)
        self.mlp_norm = new_norm(style.norm, width, norm_eps)
        self.mlp_up = ActivatedLinear(width, hidden, style.activation, bias)
        self.mlp_down = ResidualLinear(hidden, width, bias=bias)

    def mlp(self, x_ND, keep_N=None):
        """x + keep * mlp(norm(x))."""
        return self.mlp_down(self.mlp_up(self.mlp_norm(x_ND)), x_ND, keep_N)


def _enter(block: Block, x_ND, cos_NK, sin_NK):
    """Queries, keys and values, each [N, H, K]."""
    return block.qkv(block.attention_norm(x_ND), cos_NK, sin_NK)


def _leave(block: Block, x_ND, seen_NHK, keep_2N):
    keep_attention_N, keep_mlp_N = (None, None) if keep_2N is None else (keep_2N[0], keep_2N[1])
    x_ND = block.projection(seen_NHK.flatten(1), x_ND, keep_attention_N)
    return block.mlp(x_ND, keep_mlp_N)


def _enter_again(*arguments):
    return checkpoint(_enter, *arguments, use_reentrant=False, preserve_rng_state=False)


def _leave_again(*arguments):
    return checkpoint(_leave, *arguments, use_reentrant=False, preserve_rng_state=False)


def _attend(qkv: Sequence[torch.Tensor], segments: Segments) -> torch.Tensor:
    q_NHK, k_NHK, v_NHK = qkv
    return attention(q_NHK, k_NHK, v_NHK, segments, causal=False)


def _crossing(leave, enter):
    """From one block's attention to the next one's: the next block's input, and queries, keys and values."""

    def cross(blocks: tuple[Block, Block], x_ND, seen_NHK, cos_NK, sin_NK, keep_2N):
        x_ND = leave(blocks[0], x_ND, seen_NHK, keep_2N)
        return x_ND, *enter(blocks[1], x_ND, cos_NK, sin_NK)

    return cross


_cross, _cross_again = _crossing(_leave, _enter), _crossing(_leave_again, _enter_again)


@dataclass(frozen=True)
class Passage:
    """How tokens go through blocks.

    cos_NK, sin_NK: None where nothing is turned.  again: all but attention is computed again in the backward; with a
    store also queries, keys and values, and what is kept goes there.  Compiled and in bf16 these are then of an input
    that has been rounded, as the forward's were not.
    """

    cos_NK: torch.Tensor | None
    sin_NK: torch.Tensor | None
    compiled: bool = False
    again: bool = False
    store: HostStore | None = None

    def through(
        self,
        blocks: list[Block],
        x_ND: torch.Tensor,
        keeps: list[torch.Tensor | None],
        segments: Sequence[Segments],
    ) -> torch.Tensor:
        """keeps: fp32 factors [2, N] of each block's branches.  segments: that each block's attention stays in."""
        tables = (self.cos_NK, self.sin_NK)
        regions = (_enter_again, _cross_again, _leave_again) if self.again else (_enter, _cross, _leave)
        enter, cross, leave = map(compilation.by_rows, regions) if self.compiled else regions
        qkv = enter(blocks[0], x_ND, *tables)
        for place, (block, keep_2N, within) in enumerate(zip(blocks, keeps, segments, strict=True)):
            keeping = contextlib.nullcontext()
            if self.store is not None:
                keeping = recomputed(qkv, enter, (block, x_ND, *tables), self.store)
            with keeping:
                seen_NHK = _attend(qkv, within)
            qkv = ()  # what follows needs memory for the next
            if place + 1 < len(blocks):
                x_ND, *qkv = cross((block, blocks[place + 1]), x_ND, seen_NHK, *tables, keep_2N)
        return leave(blocks[-1], x_ND, seen_NHK, keeps[-1])


def run_blocks(
    stack: nn.ModuleList,
    x_ND: torch.Tensor,
    cos_NK: torch.Tensor | None,
    sin_NK: torch.Tensor | None,
    segments: Segments,
    recompute: str,
    keep_LI: torch.Tensor | None = None,
    by_block: Sequence[Segments] | None = None,
) -> torch.Tensor:
    """x_ND through all blocks of the stack.

    cos_NK, sin_NK: of positions, None for none.
    recompute: "none" keeps all activations; "selective" a block's input, its queries, keys and values, and what
        attention makes of them; "offload" its input and what attention makes, in host memory; "full" its input.
    keep_LI: fp32 factors of segment I's branches, attention and MLP of each block in turn; None for all ones.
    by_block: segments that each block's attention stays in; None for `segments` everywhere.

    Compiled blocks see whole buckets of tokens: what is added attends to itself alone and is cut away again.
    """
    blocks, tokens = cast(list[Block], list(stack)), len(x_ND)
    recompute = recompute if torch.is_grad_enabled() else "none"
    compiled = compilation.enabled(x_ND.device) and compilation.compilable(blocks)
    if compiled:
        more = compilation.bucket_of(tokens) - tokens
        x_ND = F.pad(x_ND, (0, 0, 0, more))
        if cos_NK is not None and sin_NK is not None:
            cos_NK, sin_NK = (F.pad(rows, (0, 0, 0, more)) for rows in (cos_NK, sin_NK))
        longer = {id(each): _lengthened(each, more) for each in (segments, *(by_block or ()))}
        by_block = by_block and [longer[id(each)] for each in by_block]
        segments = longer[id(segments)]
        if keep_LI is not None and more:
            keep_LI = F.pad(keep_LI, (0, 1))
    keep_LN = None
    if keep_LI is not None:  # an output size, else the device is asked for it
        keep_LN = keep_LI.repeat_interleave(segments.cu_q_N1.diff(), dim=1, output_size=len(x_ND))
    keeps = [None] * len(blocks) if keep_LN is None else list(keep_LN.unflatten(0, (-1, 2)))
    store = None
    if recompute == "offload":
        parameters = [parameter for block in blocks for parameter in block.parameters()]
        kept = [rows for rows in (cos_NK, sin_NK, keep_LN) if rows is not None]
        store = HostStore(x_ND.device, [*kept, *parameters])
    passage = Passage(cos_NK, sin_NK, compiled, recompute in ("selective", "offload"), store)
    by_block = by_block or [segments] * len(blocks)
    if recompute == "full":
        for block, keep_2N, within in zip(blocks, keeps, by_block, strict=True):
            arguments = ([block], x_ND, [keep_2N], [within])
            x_ND = checkpoint(passage.through, *arguments, use_reentrant=False, preserve_rng_state=False)
    else:
        with store or contextlib.nullcontext():
            x_ND = passage.through(blocks, x_ND, keeps, by_block)
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
    are no saved tensors, for which the product would be made again: without them the norm alone is."""

    @staticmethod
    def forward(ctx, qkv_N3HK, bias_3HK, cos_NK, sin_NK):
        ctx.tables, ctx.bias_dtype = (cos_NK, sin_NK), None if bias_3HK is None else bias_3HK.dtype
        q_NHK, k_NHK, v_NHK = qkv_N3HK.unbind(1)
        turned = turn if cos_NK is not None else _unturned
        if bias_3HK is None:
            return turned(q_NHK, cos_NK, sin_NK), turned(k_NHK, cos_NK, sin_NK), v_NHK.contiguous()
        wide = torch.promote_types(qkv_N3HK.dtype, torch.float32)
        q_NHK, k_NHK, v_NHK = (part.to(wide) + bias for part, bias in zip((q_NHK, k_NHK, v_NHK), bias_3HK, strict=True))
        parts = turned(q_NHK, cos_NK, sin_NK), turned(k_NHK, cos_NK, sin_NK), v_NHK
        return tuple(as_dtype(part, qkv_N3HK.dtype) for part in parts)

    @staticmethod
    @once_differentiable
    def backward(ctx, q_NHK, k_NHK, v_NHK):
        turned_back = turn_back if ctx.tables[0] is not None else _unturned
        if ctx.bias_dtype is None:
            turned = (turned_back(q_NHK, *ctx.tables), turned_back(k_NHK, *ctx.tables))
            return torch.stack((*turned, v_NHK), 1), None, None, None
        q, k, v = map(in_buckets, (q_NHK, k_NHK, v_NHK))
        cos, sin = (None if table is None else in_buckets(table) for table in ctx.tables)
        parts = (turned_back(q, cos, sin), turned_back(k, cos, sin), v)
        bias_3HK = torch.stack([sum_of_buckets(part) for part in parts]).to(ctx.bias_dtype)
        return torch.stack(parts, 2).view(len(q_NHK), *bias_3HK.shape), bias_3HK, None, None


def _unturned(x_NHK, cos_NK, sin_NK):
    return x_NHK.contiguous()


class _AddKept(torch.autograd.Function):
    """x + keep * branch, with the product and sum in fp32: 1 / (1 - p) rounded to bf16 would be biased.

    The factors are no saved tensor of autograd: where a block is computed again, that goes on until the last saved
    tensor is made, which would then come after the last product.
    """

    @staticmethod
    def forward(ctx, x_ND, branch_ND, keep_N):
        ctx.keep_N1 = keep_N[:, None]
        return as_dtype(x_ND + branch_ND * ctx.keep_N1, x_ND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        return grad_ND, (grad_ND * ctx.keep_N1).to(grad_ND.dtype), None
