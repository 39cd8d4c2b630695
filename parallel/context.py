"""Context parallelism over packed rows: each cp rank holds two zigzag chunks of the row and sees every key before it.

Keys and values are gathered over the group and put into row order; each chunk of queries then attends to the keys up to
its end, segment by segment, so that work and memory are even over the ranks whatever the samples' lengths.

Legend: S tokens of a micro-batch on this cp rank, N segments, H heads, G kv heads, K head width.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from parallel.attention import Segments, attention
from parallel.layout import Layout
from parallel.routes import local_positions
from parallel.transfer import host_to_device


@dataclass(frozen=True)
class PackedRow:
    """What attention needs of one micro-batch on one cp rank: positions, and which keys each query piece sees.

    positions_S: of this rank's tokens inside their samples.  pieces: (first query, one past the last, first key, one
    past the last, segments); keys are counted in the whole row, queries on this rank.  whole_row_S: place of every row
    position in the cp-gathered order, None for cp = 1.  tables_2SK: rotary cosines and sines, made in the forward, for
    one micro-batch at a time.  `qkv_format` is Megatron-core's word for an extra batch dimension of one.
    """

    positions_S: torch.Tensor
    pieces: list[tuple[int, int, int, int, Segments]]
    whole_row_S: torch.Tensor | None
    tables_2SK: tuple[torch.Tensor, torch.Tensor] | None = None
    qkv_format: str = "thd"


def pack_row(lengths_N, positions_S: np.ndarray, layout: Layout, cp: int, device: torch.device) -> PackedRow:
    """Attention plan of a row of segments `lengths_N` for context-parallel rank `cp`.

    positions_S: position of every token of the whole row inside its own sample.
    """
    row = int(np.sum(lengths_N))
    mine_S = host_to_device(positions_S[local_positions(layout, cp, row)], device)
    if layout.cp == 1:
        return PackedRow(mine_S, [(0, row, 0, row, Segments.of(lengths_N, device=device))], None)
    half = row // (2 * layout.cp)
    borders = np.concatenate([[0], np.cumsum(lengths_N)])
    pieces = []
    for place, chunk in enumerate((cp, 2 * layout.cp - 1 - cp)):
        begin, end = chunk * half, (chunk + 1) * half
        first = int(np.searchsorted(borders, begin, "right")) - 1
        last = int(np.searchsorted(borders, end, "left"))
        lows, highs = borders[first:last], np.minimum(borders[first + 1 : last + 1], end)
        segments = Segments.of(highs - np.maximum(lows, begin), highs - lows, device=device)
        pieces.append((place * half, (place + 1) * half, int(borders[first]), end, segments))
    gathered = np.concatenate([local_positions(layout, other, row) for other in range(layout.cp)])
    return PackedRow(mine_S, pieces, host_to_device(np.argsort(gathered), device))


def attend(
    q_SHK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    row: PackedRow,
    group: dist.ProcessGroup,
    scale: float | None,
) -> torch.Tensor:
    """Causal attention inside each segment of the whole row for this rank's queries, [S, H, K] (collective)."""
    if row.whole_row_S is not None:
        k_SGK, v_SGK = (
            gather_from_sequence_parallel_region(x, group=group).index_select(0, row.whole_row_S)
            for x in (k_SGK, v_SGK)
        )
    outputs = [
        attention(q_SHK[a:b], k_SGK[c:d], v_SGK[c:d], segments, causal=True, scale=scale)
        for a, b, c, d, segments in row.pieces
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
