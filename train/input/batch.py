"""From a data plan to what one rank computes on: the plan of visual tokens, and micro-batches on the device.

Row r of a step belongs to micro-batch (r // b) // dp of replica (r // b) % dp, with b rows laid end to end in a
micro-batch.  Attention never crosses samples, so the length of a micro-batch is only a number.

Legend: S positions of one row, T = b * S positions of a micro-batch, I images of the step.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from tandem.data.planning.plan import (
    StepPlan,
    ranges,
    row_cu_seqlens,
    row_domains,
    row_labels,
    row_positions,
    row_positions_thw,
    row_samples,
)
from tandem.data.vision import VisionSpec
from tandem.parallel.comm.context import PackedRow, elements_sent, pack_row
from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.layout import Coordinates, Layout
from tandem.parallel.plan.routes import VisualPlan, local_positions
from tandem.parallel.plan.tokens import PADDING, TEXT, VISUAL, RowTokens
from tandem.train.config.schema import Config
from tandem.train.models.layers.masking import drop_path_factors


@dataclass(frozen=True)
class RowText:
    """Text of R rows: int64 tokens and labels [R, S], bool loss_mask (the label is trained), int16 domain (or -1)."""

    tokens: np.ndarray
    labels: np.ndarray
    loss_mask: np.ndarray
    domain: np.ndarray

    @staticmethod
    def of(plan: StepPlan, rows: np.ndarray, tokens: np.ndarray, trained: np.ndarray, pad_id: int) -> "RowText":
        """tokens: int32 [R, S]; trained: bool, this token is a target."""
        samples = row_samples(plan, rows)
        labels, loss_mask = row_labels(samples, tokens, trained, pad_id)
        return RowText(tokens.astype(np.int64), labels, loss_mask, row_domains(plan, samples))


@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch on this rank's slice of the sequence; text is None on stages that do not need it."""

    tokens_1T: torch.Tensor | None
    labels_1T: torch.Tensor | None
    loss_mask_1T: torch.Tensor | None
    domain_1T: torch.Tensor | None
    row: PackedRow
    row_tokens: int


def visual_plan(
    plan: StepPlan, layout: Layout, rows_per_micro_batch: int, vision: VisionSpec, chunk_patches: int
) -> VisualPlan:
    """Who needs which image's tokens, and what each image costs, from the indexes alone."""
    block_I, within_I = np.divmod(plan.row_I.astype(np.int64), rows_per_micro_batch)
    patches_I = plan.patches_I
    return VisualPlan(
        unit_I=units(plan, patches_I, chunk_patches),
        cost_I=vision.cost(plan.grid_hw_I2),
        patches_I=patches_I,
        tokens_I=plan.tokens_I.astype(np.int64),
        replica_I=block_I % layout.dp,
        micro_batch_I=block_I // layout.dp,
        start_I=within_I * plan.seq_length + plan.start_I,
        row_tokens=rows_per_micro_batch * plan.seq_length,
    )


def units(plan: StepPlan, patches_I: np.ndarray, chunk_patches: int) -> np.ndarray:
    """Number of the unit that each image belongs to, int64 [I], ascending.

    A still image is a unit; a video is cut into clips of as many successive frames as fit `chunk_patches`, so that its
    bytes are read by few ranks while its work still spreads.
    """
    if patches_I.size == 0:
        return np.empty(0, dtype=np.int64)
    index_I = np.arange(patches_I.size)
    other_I = np.diff(plan.image_sample_I, prepend=-1) | np.diff(plan.image_media_I, prepend=-1)
    starts_medium_I = (other_I != 0) | (plan.time_I < 0)
    within_I = index_I - np.maximum.accumulate(np.where(starts_medium_I, index_I, 0))
    frames_I = np.maximum(chunk_patches // patches_I, 1)  # all frames of a video have one size
    return np.cumsum(starts_medium_I | (within_I % frames_I == 0)) - 1


def branch_factors(config: Config, keys_In: np.ndarray) -> np.ndarray | None:
    """Drop path of images with these keys, see `drop_path_factors`; None where it is off or the encoder is frozen."""
    encoder = config.model.encoder
    if not encoder.drop_path or "encoder" not in config.train.trainable:
        return None
    return drop_path_factors(encoder.depth, encoder.drop_path, keys_In)


def rows_of_replica(layout: Layout, replica: int, micro_batches: int, rows_per_micro_batch: int) -> np.ndarray:
    """Rows of a step that one replica trains on, micro-batch by micro-batch, [micro_batches, b]."""
    blocks_M = np.arange(micro_batches) * layout.dp + replica
    return blocks_M[:, None] * rows_per_micro_batch + np.arange(rows_per_micro_batch)


def micro_batch_of(
    plan: StepPlan,
    rows: np.ndarray,
    text: RowText | None,
    layout: Layout,
    place: Coordinates,
    device: torch.device,
    mrope: VisionSpec | None = None,
) -> MicroBatch:
    """The micro-batch of `rows`, whose text (of these rows alone) is None on stages that need none.

    mrope: of a model whose rotary positions have three axes; None for one axis.
    """
    lengths = np.concatenate([np.diff(row_cu_seqlens(plan, row)) for row in rows])
    if mrope is None:
        positions_T = np.concatenate([row_positions(plan, row) for row in rows])
    else:
        positions_T = np.concatenate([row_positions_thw(plan, row, mrope) for row in rows])
    packed = pack_row(lengths[lengths > 0], positions_T, layout, place.cp, device)
    packed = dataclasses.replace(packed, tokens=_row_tokens(plan, rows, layout, place, device))
    row_tokens = len(positions_T)
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


def _row_tokens(
    plan: StepPlan, rows: np.ndarray, layout: Layout, place: Coordinates, device: torch.device
) -> RowTokens:
    """What the tokens of a micro-batch are; marks around an image are text."""
    sample_RP = row_samples(plan, rows)
    kind_RP = np.where(sample_RP < 0, PADDING, TEXT)
    for kind_P, row in zip(kind_RP, rows, strict=True):
        first, last = np.searchsorted(plan.row_I, [row, row + 1])
        start_I = plan.start_I[first:last]
        kind_P[ranges(start_I, start_I + plan.tokens_I[first:last])] = VISUAL
    return RowTokens.of(kind_RP.reshape(-1), sample_RP.reshape(-1), layout, place, device)


def context_sentence(config: Config, layout: Layout) -> str:
    """How the ranks of cp share a row and what that sends, for the person who watches."""
    llm, row = config.model.llm, config.train.micro_batch_size * config.train.seq_length
    elements = elements_sent(layout, row, llm.heads, llm.kv_heads, llm.head_width)
    return (
        f"{layout.cp} ranks share a row by {layout.cp_comm_type} (parallel.cp_comm_type="
        f"{config.parallel.cp_comm_type}): {elements * config.train.dtype.itemsize / 2**20:.2f} MiB sent by a rank, "
        "layer and micro-batch in the forward, as much in the backward"
    )
