"""From a data plan to what one rank computes on: the plan of visual tokens, and micro-batches on the device.

Row r of a step belongs to micro-batch (r // b) // dp of replica (r // b) % dp, with b rows laid end to end in a
micro-batch.  Attention never crosses samples, so the length of a micro-batch is only a number.

Legend: S positions of one row, T = b * S positions of a micro-batch, I images of the step.
"""

from dataclasses import dataclass

import numpy as np
import torch

from data.plan import StepPlan, row_cu_seqlens, row_positions
from data.reader import RowBatch
from parallel.balance import image_costs
from parallel.layout import Coordinates, Layout
from parallel.routes import VisualPlan, local_positions
from parallel.transfer import host_to_device
from train.models.llm import PackedRow, pack_row
from train.models.vit import ViTConfig


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on this rank's slice of the sequence; text is None on stages that do not need it."""

    tokens_1T: torch.Tensor | None
    labels_1T: torch.Tensor | None
    loss_mask_1T: torch.Tensor | None
    domain_1T: torch.Tensor | None
    row: PackedRow
    row_tokens: int


def visual_plan(plan: StepPlan, layout: Layout, rows_per_micro_batch: int, encoder: ViTConfig) -> VisualPlan:
    """Who needs which image's tokens, and what each image costs, from the indexes alone."""
    block_I, within_I = np.divmod(plan.row_I.astype(np.int64), rows_per_micro_batch)
    patches_I = plan.grid_hw_I2.prod(axis=1, dtype=np.int64)
    return VisualPlan(
        cost_I=image_costs(patches_I, encoder.width, encoder.depth),
        patches_I=patches_I,
        tokens_I=plan.tokens_I.astype(np.int64),
        replica_I=block_I % layout.dp,
        micro_batch_I=block_I // layout.dp,
        start_I=within_I * plan.seq_length + plan.start_I,
        row_tokens=rows_per_micro_batch * plan.seq_length,
    )


def rows_of_replica(layout: Layout, replica: int, micro_batches: int, rows_per_micro_batch: int) -> np.ndarray:
    """Rows of a step that one replica trains on, micro-batch by micro-batch, [micro_batches, b]."""
    blocks_M = np.arange(micro_batches) * layout.dp + replica
    return blocks_M[:, None] * rows_per_micro_batch + np.arange(rows_per_micro_batch)


def micro_batch_of(
    plan: StepPlan,
    rows: np.ndarray,
    text: RowBatch | None,
    layout: Layout,
    place: Coordinates,
    device: torch.device,
) -> MicroBatch:
    """The micro-batch of `rows`, whose text (of these rows alone) is None on stages that need none."""
    lengths = np.concatenate([np.diff(row_cu_seqlens(plan, row)) for row in rows])
    positions_T = np.concatenate([row_positions(plan, row) for row in rows])
    packed = pack_row(lengths[lengths > 0], positions_T, layout, place.cp, device)
    row_tokens = positions_T.size
    if text is None:
        return MicroBatch(None, None, None, None, packed, row_tokens)
    here = local_positions(layout, place.cp, row_tokens)

    def cut(array_RS):
        return host_to_device(array_RS.reshape(-1)[here][None], device)

    return MicroBatch(
        tokens_1T=cut(text.tokens),
        labels_1T=cut(text.labels),
        loss_mask_1T=cut(text.loss_mask),
        domain_1T=cut(text.domain),
        row=packed,
        row_tokens=row_tokens,
    )
