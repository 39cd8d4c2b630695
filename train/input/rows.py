"""How a step of packed rows is divided: each image to the rank that encodes it, each row to a rank of its replica.

The ranks of a replica that need token ids read some of its rows each, and give them to each other.

Legend: M micro-batches, B rows of a micro-batch, S positions of a row.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from tandem.data.dataset import Data
from tandem.data.planning.plan import StepPlan
from tandem.data.reading.reader import Failure, RowBatch
from tandem.data.vision import VisionSpec
from tandem.parallel.comm.exchange import DispatchPlan
from tandem.parallel.grid import Grid
from tandem.parallel.hybrid_step import StepInput
from tandem.parallel.plan.routes import Routes, assign_encoding_ranks, build_routes
from tandem.train.config.schema import Config
from tandem.train.input.batch import RowText, branch_factors, micro_batch_of, rows_of_replica, visual_plan
from tandem.train.input.prefetcher import Prefetcher, PreparedStep, RankShard
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.encoders.vit import PackedImages


@dataclass(frozen=True, kw_only=True)
class RowRankShard(RankShard):
    """routes: of this rank's images.  rows_MB: the rows of its replica, of which it reads some.  keep_LI: factors of
    its images' residual branches, None for all ones."""

    routes: Routes
    rows_MB: np.ndarray
    keep_LI: np.ndarray | None = None


class Rows:
    """The sharding of packed rows.

    substitute: for evaluation, maps a plan to the one whose pixels are read instead (same shapes).
    """

    def __init__(
        self, config: Config, grid: Grid, pad_id: int, substitute: Callable[[StepPlan], StepPlan] | None = None
    ):
        self._config, self._grid, self._pad_id, self._substitute = config, grid, pad_id, substitute
        self._rows_MB = rows_of_replica(
            grid.layout, grid.place.dp, config.micro_batches(grid.layout), config.train.micro_batch_size
        )
        readers = grid.layout.text_ranks(grid.place.dp)
        mine = readers.index(grid.rank) if grid.text else None
        self._my_rows = self._rows_MB.reshape(-1)[mine :: len(readers)] if grid.text else self._rows_MB[:0, 0]

    def shard(self, plan: StepPlan) -> RowRankShard:
        config, grid = self._config, self._grid
        chunk_patches = config.parallel.encoder.chunk_patches
        visual = visual_plan(plan, grid.layout, config.train.micro_batch_size, config.vision, chunk_patches)
        encoding_rank_I = assign_encoding_ranks(visual, grid.layout, config.parallel.balance)
        routes = build_routes(visual, encoding_rank_I, grid.layout, grid.rank, len(self._rows_MB), chunk_patches)
        image_ids = np.concatenate(routes.chunks).astype(np.int64)
        keys_I3 = np.stack(np.broadcast_arrays(config.train.seed, plan.step, image_ids), axis=1)
        return RowRankShard(
            image_ids=image_ids,
            rows=self._my_rows,
            digest=visual.digest(encoding_rank_I),
            pixels=self._substitute(plan) if self._substitute else None,
            routes=routes,
            rows_MB=self._rows_MB,
            keep_LI=branch_factors(config, keys_I3),
        )

    def inspect(self, plan: StepPlan, rank_shard: RowRankShard, text: RowBatch) -> list[Failure]:
        return []

    def count(self, rank_shard: RowRankShard, text: RowBatch) -> int:
        return int(text.trained.sum())

    def complete(self, plan: StepPlan, rank_shard: RowRankShard, text: RowBatch) -> list[RowText] | None:
        """Every micro-batch's text, on ranks that need it."""
        if self._grid.text is None:
            return None
        rows = self._rows_MB.reshape(-1)
        ranks = dist.get_world_size(self._grid.text)
        tokens, trained = text.tokens, text.trained
        if ranks > 1:
            mine = np.zeros((-(-len(rows) // ranks), plan.seq_length), np.int32)
            mine[: len(tokens)] = 2 * tokens + trained
            parts = [torch.empty(mine.shape, dtype=torch.int32) for _ in range(ranks)]
            dist.all_gather(parts, torch.from_numpy(mine), group=self._grid.text)
            both = torch.stack(parts, dim=1).flatten(0, 1)[: len(rows)].numpy()  # row i is rank i % ranks' i // ranks
            tokens, trained = both >> 1, (both & 1).astype(bool)
        b = self._rows_MB.shape[1]
        cuts = [slice(i, i + b) for i in range(0, len(rows), b)]
        return [RowText.of(plan, rows[cut], tokens[cut], trained[cut], self._pad_id) for cut in cuts]


def row_prefetcher(
    data: Data,
    config: Config,
    grid: Grid,
    *,
    steps: int,
    substitute: Callable[[StepPlan], StepPlan] | None = None,
) -> Prefetcher[RowRankShard]:
    """The prefetcher of `steps` steps of packed rows."""
    sharding = Rows(config, grid, data.reader.tokenizer.pad_id, substitute)
    compose = functools.partial(
        step_input, grid=grid, vision=config.vision, mrope=config.model.llm.mrope_sections is not None
    )
    return Prefetcher(data.stream, data.reader, config.data, grid, sharding, compose, steps=steps)


def step_input(prepared: PreparedStep, grid: Grid, vision: VisionSpec, mrope: bool = False) -> StepInput:
    """A prepared step as the hybrid step takes it, on the host; `parallel.comm.transfer.to_device` takes it further.

    mrope: the LLM's rotary positions have three axes.
    """
    host = torch.device("cpu")
    plan, images = prepared.plan, prepared.images
    patches_I = images.patches_I
    position_N2 = vision.positions(images.grid_hw_I2)
    chunks, image, patch = [], 0, 0
    for ids in prepared.rank_shard.routes.chunks:
        mine_I = patches_I[image : image + ids.size]
        count = int(mine_I.sum())
        if count:
            here, keep_LI = slice(patch, patch + count), prepared.rank_shard.keep_LI
            keep_LI = None if keep_LI is None else keep_LI[:, image : image + ids.size]
            arrangement = Arrangement.of(vision, images.grid_hw_I2[image : image + ids.size], host)
            packed = (images.patches_NP[here], position_N2[here], mine_I, host, keep_LI, arrangement)
            chunks.append(PackedImages.of(*packed))
        else:
            chunks.append(PackedImages.blank(vision, host))
        image, patch = image + ids.size, patch + count
    text_M = prepared.text or [None] * len(prepared.rank_shard.rows_MB)
    micro_batches = [
        micro_batch_of(plan, rows, text, grid.layout, grid.place, host, vision if mrope else None)
        for rows, text in zip(prepared.rank_shard.rows_MB, text_M, strict=True)
    ]
    return StepInput(DispatchPlan.of(prepared.rank_shard.routes), chunks, micro_batches, prepared.trained_tokens)


def replace_pixels(plan: StepPlan, source_I: np.ndarray) -> StepPlan:
    """The plan whose image i is read from where image source_I[i] lies, at the size planned for i."""
    return dataclasses.replace(
        plan,
        image_sample_I=plan.image_sample_I[source_I],
        image_media_I=plan.image_media_I[source_I],
        time_I=plan.time_I[source_I],
    )
