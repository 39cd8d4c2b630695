"""Prepared steps on the device: the next one's copy runs on a stream of its own while this one is computed."""

import dataclasses

import numpy as np
import torch

from data.image import patch_positions
from data.plan import StepPlan
from parallel.grid import Grid
from parallel.hybrid_step import StepInput
from train.batch import micro_batch_of
from train.feed import Feed, PreparedStep
from train.models.vit import PackedImages


class Staging:
    """Iterator over (prepared step, the same as the hybrid step takes it) of a feed."""

    def __init__(self, feed: Feed, grid: Grid):
        self._feed, self._grid = feed, grid
        self._copies = torch.cuda.Stream(grid.device) if grid.device.type == "cuda" else None
        self._ahead: tuple[PreparedStep, StepInput] | None = None

    def __iter__(self):
        return self

    def __next__(self) -> tuple[PreparedStep, StepInput]:
        """As `Feed.__next__`; on CUDA the copies of the step after, if it is ready, are under way on return."""
        staged = self._ahead or self._stage(next(self._feed))
        self._ahead = None
        if self._copies:
            torch.cuda.current_stream().wait_stream(self._copies)
            ready = self._feed.poll()
            self._ahead = self._stage(ready) if ready else None
        return staged

    def drain(self) -> None:
        """As `Feed.drain`."""
        if self._ahead:
            self._ahead[0].release()
        self._ahead = None
        self._feed.drain()

    def _stage(self, prepared: PreparedStep) -> tuple[PreparedStep, StepInput]:
        if self._copies is None:
            return prepared, to_device(prepared, self._grid)
        self._copies.wait_stream(torch.cuda.current_stream())  # memory of steps that are through may be written again
        with torch.cuda.stream(self._copies):
            return prepared, to_device(prepared, self._grid)


def to_device(prepared: PreparedStep, grid: Grid) -> StepInput:
    """Moves a prepared step to the device as the hybrid step takes it."""
    plan, images = prepared.plan, prepared.images
    patches_I = images.grid_hw_I2.prod(axis=1, dtype=np.int64)
    position_N2 = patch_positions(images.grid_hw_I2)
    chunks, rows, image, patch = [], [], 0, 0
    for ids in prepared.routes.chunks:
        mine_I = patches_I[image : image + ids.size]
        count = int(mine_I.sum())
        if count:
            window = slice(patch, patch + count)
            chunks.append(PackedImages.of(images.patches_N588[window], position_N2[window], mine_I, grid.device))
        else:
            chunks.append(PackedImages.blank(grid.device))
        rows.append(count // 4)
        image, patch = image + ids.size, patch + count
    text_M = prepared.text_M or [None] * len(prepared.rows_MB)
    micro_batches = [
        micro_batch_of(plan, rows, text, grid.layout, grid.place, grid.device)
        for rows, text in zip(prepared.rows_MB, text_M, strict=True)
    ]
    return StepInput(prepared.routes, chunks, rows, micro_batches, prepared.trained_tokens)


def replace_pixels(plan: StepPlan, source_I: np.ndarray) -> StepPlan:
    """The plan whose image i is read from where image source_I[i] lies, at the size planned for i."""
    return dataclasses.replace(
        plan,
        image_sample_I=plan.image_sample_I[source_I],
        image_media_I=plan.image_media_I[source_I],
        time_I=plan.time_I[source_I],
    )
