"""Steps made ready ahead of time, in a thread: plan, routes, this rank's pixels and text, and agreement of all ranks.

Before a step is handed out, ranks compare a digest of its plan and tell each other, over a gloo group that only this
thread uses, what went wrong: a sample that cannot be read is dropped on every rank (its shape stays, its loss does not
count), and an error on one rank stops all of them with the same sentence.

Legend: M micro-batches, S positions of a row.
"""

import dataclasses
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.distributed as dist

from data.image import patch_positions
from data.plan import StepPlan
from data.reader import ImageBatch, RowBatch, ShardReader
from data.stream import Stream
from parallel.grid import Grid
from parallel.hybrid_step import StepInput
from parallel.routes import Routes, assign_owners, build_routes
from train.batch import micro_batch_of, rows_of_replica, visual_plan
from train.config import Config
from train.models.vit import PackedImages


@dataclass
class PreparedStep:
    """One step on the host: its plan, this rank's routes, pixels, rows and their text, and what the ranks agreed on."""

    plan: StepPlan
    routes: Routes
    images: ImageBatch
    rows_MB: np.ndarray
    text_M: list[RowBatch] | None
    trained_tokens: int = 0
    skipped: list[str] = field(default_factory=list)


class AgreedError(RuntimeError):
    """What one rank found wrong, raised on every rank with the same words."""


class Feed:
    """Iterator over `steps` prepared steps, equal on every rank; `drain` ends it early.

    Consume it to its end: its thread enters collectives as long as there are steps to prepare.
    substitute: for evaluation, maps a plan to the one whose pixels are read instead (same shapes).
    """

    def __init__(
        self,
        stream: Stream,
        reader: ShardReader,
        config: Config,
        grid: Grid,
        *,
        steps: int,
        substitute: Callable[[StepPlan], StepPlan] | None = None,
    ):
        self._stream, self._reader, self._config, self._grid = stream, reader, config, grid
        self._steps, self._substitute = steps, substitute
        self._rows_MB = rows_of_replica(
            grid.layout, grid.place.dp, config.micro_batches(grid.layout), config.train.micro_batch_size
        )
        self._skipped_total = 0
        self._stop = threading.Event()
        self._ready: queue.Queue = queue.Queue(maxsize=config.data.prefetch)
        self._thread = threading.Thread(target=self._run, name="tandem-feed", daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> PreparedStep:
        """The next step; StopIteration after the last; AgreedError where any rank failed."""
        prepared = self._ready.get()
        if prepared is None:
            raise StopIteration
        if isinstance(prepared, BaseException):
            raise prepared
        return prepared

    def drain(self) -> None:
        """Ends the feed early; every rank calls this after the same step, and waits until all feeds have ended."""
        self._stop.set()
        while self._ready.get() is not None:
            pass

    def _run(self):
        try:
            for _ in range(self._steps):
                prepared = self._prepare()
                if prepared is None:
                    break
                self._ready.put(prepared)
        except BaseException as error:
            self._ready.put(error)
        self._ready.put(None)

    def _prepare(self) -> PreparedStep | None:
        """Reads one step and agrees on it; None where a rank drains (collective on the control group, always)."""
        digest, prepared, failures, error = 0, None, {}, None
        try:
            digest, prepared, failures = self._read()
        except Exception as caught:
            error = f"rank {self._grid.rank}: {type(caught).__name__}: {caught}"
        trained = self._count_trained(prepared)
        mine = torch.tensor([digest, len(failures), error is not None, self._stop.is_set(), trained])
        seen_W5 = [torch.empty_like(mine) for _ in range(self._grid.layout.world)]
        dist.all_gather(seen_W5, mine, group=self._grid.control)
        seen_W5 = torch.stack(seen_W5)
        if seen_W5[:, 2].any():
            sentences = [sentence for sentence in self._tell(error) if sentence]
            raise AgreedError("; ".join(dict.fromkeys(sentences)))
        if (seen_W5[:, 0] != digest).any():
            odd = torch.nonzero(seen_W5[:, 0] != seen_W5[0, 0]).flatten().tolist()
            raise AgreedError(f"ranks {odd} planned step {prepared.plan.step} differently from rank 0")
        if seen_W5[:, 3].any():
            return None
        prepared.trained_tokens = int(seen_W5[:, 4].sum())
        if seen_W5[:, 1].any():
            self._drop(prepared, failures)
        return prepared

    def _read(self) -> tuple[int, PreparedStep, dict[int, str]]:
        config, grid, plan = self._config, self._grid, self._stream.next_step()
        visual = visual_plan(plan, grid.layout, config.train.micro_batch_size, config.model.encoder)
        owner_I = assign_owners(visual, grid.layout, config.parallel.balance)
        routes = build_routes(
            visual, owner_I, grid.layout, grid.rank, len(self._rows_MB), config.parallel.encoder.chunk_patches
        )
        pixels = self._substitute(plan) if self._substitute else plan
        images = self._reader.read_images(pixels, np.concatenate(routes.chunks).astype(np.int64))
        failures = {int(plan.image_sample_I[image]): sentence for image, sentence in images.failures}
        text_M = None
        if grid.is_first_stage or grid.is_last_stage:
            text_M = [self._reader.read_rows(plan, rows) for rows in self._rows_MB]
            failures |= {sample: sentence for text in text_M for sample, sentence in text.failures}
        digest = (plan.digest() ^ visual.digest(owner_I)) & (2**62 - 1)
        return digest, PreparedStep(plan, routes, images, self._rows_MB, text_M), failures

    def _count_trained(self, prepared: PreparedStep | None) -> int:
        """Trained tokens of this replica, counted by one rank of it."""
        place = self._grid.place
        if prepared is None or not self._grid.is_last_stage or place.tp or place.cp:
            return 0
        return int(sum(text.loss_mask.sum() for text in prepared.text_M))

    def _drop(self, prepared: PreparedStep, failures: dict[int, str]) -> None:
        """Takes the samples that any rank could not read out of the loss, on every rank."""
        dropped = {sample: sentence for told in self._tell(failures) for sample, sentence in told.items()}
        prepared.skipped = [dropped[sample] for sample in sorted(dropped)]
        plan = prepared.plan
        for rows, text in zip(prepared.rows_MB, prepared.text_M or [], strict=False):
            for sample in dropped:
                for place in np.flatnonzero(rows == plan.row_S[sample]):
                    start = int(plan.start_S[sample])
                    text.loss_mask[place, start : start + int(plan.length_S[sample])] = False
        count = torch.tensor([self._count_trained(prepared)])
        dist.all_reduce(count, group=self._grid.control)
        prepared.trained_tokens = int(count)
        self._skipped_total += len(dropped)
        if self._skipped_total > self._config.data.max_skipped:
            raise AgreedError(
                f"{self._skipped_total} samples could not be read, more than data.max_skipped="
                f"{self._config.data.max_skipped}; the last one: {prepared.skipped[-1]}"
            )

    def _tell(self, mine) -> list:
        everyone = [None] * self._grid.layout.world
        dist.all_gather_object(everyone, mine, group=self._grid.control)
        return everyone


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
        plan, image_sample_I=plan.image_sample_I[source_I], image_member_I=plan.image_member_I[source_I]
    )
