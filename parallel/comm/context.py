"""Context parallelism over packed rows: cp ranks share a row, and each query still sees all keys before it.

`a2a` (Ulysses: Jacobs et al. 2023, arXiv:2309.14509, section 3.1): each rank holds one chunk of the row.  For attention
it trades its tokens of all heads for all tokens of its share of the heads, and trades the output back.  Attention runs
once over whole samples, so work is even whatever their lengths.

`all_gather` (Llama 3: Dubey et al. 2024, arXiv:2407.21783, section 3.3.2): each rank holds the i-th chunk of the row
from either end.  Keys and values are gathered; a rank's queries attend to the keys that they see, its two chunks as
more segments of one call.  Work is even for one long sample, and as even as the samples lie for many.

What one rank sends a layer in the forward, in elements, and in the backward once more (`elements_sent`); with H and G
heads of its own tp rank and rows of R tokens:

    a2a         (cp - 1) / cp * R / cp * (2 H + 2 G) * K      q, k and v there, the output back
    all_gather  (cp - 1) / cp * R * 2 G * K                   k and v; in the backward one reduce-scatter of both

So `all_gather` sends less while cp < 1 + H / G.  It keeps more for the backward: keys and values of X <= R + R / 2 cp
tokens with G heads, where `a2a` keeps R tokens with G / cp.

Legend: S tokens of a micro-batch on this cp rank, R of the whole row, X keys that a rank's queries see, C ranks of cp,
N segments, H heads, G kv heads, K head width, P heads of q, k and v together on one rank after the trade.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments, attention
from tandem.parallel.layout import Layout
from tandem.parallel.plan.routes import local_positions, place_of
from tandem.parallel.plan.tokens import RowTokens


@dataclass(frozen=True)
class PackedRow:
    """What attention needs of one micro-batch on one cp rank.

    positions_S: of this rank's tokens inside their samples, [S] or, on three axes, [S, 3].  segments: of the whole row,
    or with `all_gather` of this rank's queries and of the keys that they see.  tokens: what routers have to know, None
    where nothing is counted.  keys_X: with `all_gather`, the place of each such key in the order of the gathered ones,
    else None.  tables_2SK: rotary cosines and sines, made in the forward, for one micro-batch at a time.  `qkv_format`
    is Megatron-core's word for an extra batch dimension of one.
    """

    positions_S: torch.Tensor
    segments: Segments
    tokens: RowTokens | None = None
    keys_X: torch.Tensor | None = None
    tables_2SK: tuple[torch.Tensor, torch.Tensor] | None = None
    qkv_format: str = "thd"


def pack_row(lengths_N, positions_R: np.ndarray, layout: Layout, cp: int, device: torch.device) -> PackedRow:
    """Attention plan of a row of segments `lengths_N` for context-parallel rank `cp`.

    positions_R: position of every token of the whole row inside its own sample, [R] or [R, 3].
    """
    row = int(np.sum(lengths_N))
    mine_S = host_to_device(positions_R[local_positions(layout, cp, row)], device)
    if layout.row_chunks == layout.cp:
        return PackedRow(mine_S, Segments.of(lengths_N, device=device))
    q_lengths_N, k_lengths_N, keys_X = _seen_keys(np.asarray(lengths_N), layout, cp)
    rank_X, tp_X, index_X = place_of(keys_X, layout, row)
    gathered_X = (rank_X * layout.tp + tp_X) * (row // layout.cp // layout.tp) + index_X
    segments = Segments.of(q_lengths_N, k_lengths_N, device)
    return PackedRow(mine_S, segments, keys_X=host_to_device(gathered_X, device))


def _seen_keys(lengths_N: np.ndarray, layout: Layout, cp: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(queries of every segment of rank `cp`, its keys, row positions of all keys), chunk after chunk.

    A sample that reaches into a chunk of the row is a segment: its queries there, its keys up to the chunk's end.
    """
    borders = np.concatenate([[0], np.cumsum(lengths_N)])
    length = borders[-1] // layout.row_chunks
    queries, keys, positions = [], [], []
    for chunk in (cp, layout.row_chunks - 1 - cp):
        begin, end = chunk * length, (chunk + 1) * length
        first = np.searchsorted(borders, begin, "right") - 1
        last = np.searchsorted(borders, end, "left")
        lows, highs = borders[first:last], np.minimum(borders[first + 1 : last + 1], end)
        queries.append(highs - np.maximum(lows, begin))
        keys.append(highs - lows)
        positions.append(np.arange(borders[first], end))
    return np.concatenate(queries), np.concatenate(keys), np.concatenate(positions)


def elements_sent(layout: Layout, row_tokens: int, heads: int, kv_heads: int, head_width: int) -> int:
    """Elements that one rank sends a layer and micro-batch in the forward; heads are those of all tp ranks."""
    tokens, heads, kv_heads = row_tokens // layout.cp, heads // layout.tp, kv_heads // layout.tp
    if layout.cp_comm_type == "a2a":
        return tokens * (2 * heads + 2 * kv_heads) // layout.cp * head_width * (layout.cp - 1)
    return tokens * 2 * kv_heads * head_width * (layout.cp - 1)


def attend(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    row: PackedRow,
    group: dist.ProcessGroup,
    scale: float | None,
    window: int | None = None,
) -> torch.Tensor:
    """Causal attention inside each segment of the whole row for this rank's queries, [S, H, K] (collective).

    window: keys that a query sees, its own with them; None for all.
    """
    if group.size() == 1:
        return attention(q_SHK, k_SGK, v_SGK, row.segments, causal=True, scale=scale, window=window)
    if row.keys_X is None:
        q, k, v = _tokens_for_heads((q_SHK, k_SGK, v_SGK), group)
        seen = attention(q, k, v, row.segments, causal=True, scale=scale, window=window)
        return _heads_for_tokens(seen, group)
    seen_X2GK = _GatherKeys.apply(torch.cat((k_SGK, v_SGK), 1), row.keys_X, group)
    k_XGK, v_XGK = seen_X2GK.chunk(2, 1)
    return attention(q_SHK, k_XGK, v_XGK, row.segments, causal=True, scale=scale, window=window)


def _tokens_for_heads(parts, group):
    """q, k, v [S, heads, K] of this rank's tokens -> [R, heads / C, K] of the whole row; views of one buffer."""
    ranks = group.size()
    shares_CSxK = [part_SxK.unflatten(1, (ranks, -1)).transpose(0, 1) for part_SxK in parts]
    packed_RPK = _AllToAll.apply(torch.cat(shares_CSxK, 2), group).flatten(0, 1)
    return packed_RPK.split([share_CSxK.shape[2] for share_CSxK in shares_CSxK], 1)


def _heads_for_tokens(o_RxK, group):
    """The attention's output back: [R, H / C, K] -> [S, H, K]."""
    return _AllToAll.apply(o_RxK.unflatten(0, (group.size(), -1)), group).transpose(0, 1).flatten(1, 2)


class _AllToAll(torch.autograd.Function):
    """x[i] of every rank goes to rank i, [C, ...]; the gradient takes the same way back."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.contiguous()
        got = torch.empty_like(x)
        dist.all_to_all_single(got, x, group=group)
        return got

    @staticmethod
    def backward(ctx, grad):
        return _AllToAll.apply(grad, ctx.group), None


class _GatherKeys(torch.autograd.Function):
    """Rows `keys_X` of what all ranks hold, end to end; the backward sums every row's gradients at its owner.

    A row stands at most twice in keys_X, once for each chunk of queries: the sum does not depend on an order.
    """

    @staticmethod
    def forward(ctx, mine_S2GK, keys_X, group):
        ctx.group, ctx.tokens = group, mine_S2GK.shape[0]
        ctx.save_for_backward(keys_X)
        all_R2GK = mine_S2GK.new_empty(group.size() * ctx.tokens, *mine_S2GK.shape[1:])
        dist.all_gather_into_tensor(all_R2GK, mine_S2GK, group=group)
        return all_R2GK.index_select(0, keys_X)

    @staticmethod
    def backward(ctx, grad_X2GK):
        (keys_X,) = ctx.saved_tensors
        width_2GK = grad_X2GK.shape[1:]
        all_R2GK = grad_X2GK.new_zeros(ctx.group.size() * ctx.tokens, *width_2GK).index_add_(0, keys_X, grad_X2GK)
        mine_S2GK = grad_X2GK.new_empty(ctx.tokens, *width_2GK)
        dist.reduce_scatter_tensor(mine_S2GK, all_R2GK, group=ctx.group)
        return mine_S2GK, None, None
