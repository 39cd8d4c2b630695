"""From a plan to arrays: reads the bytes of the asked images and rows, and no others.

Images go to the one rank that encodes them, rows to the ranks that need their tokens; both follow from the plan, so no
pixel is read twice and nothing is broadcast. What cannot be read keeps its planned shape (zero patches, untrained
padding) and is reported, so that one damaged sample never stops or desynchronises a run.

    plan, images, rows  --begin-->  jobs, balanced by cost  --workers-->  shared memory  --finish-->  arrays

Shapes: N patches, P values of a patch, I images and frames, R rows, S positions of a row, B bytes.
"""

import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass

import numpy as np

from tandem.data.media.text import Tokenizer
from tandem.data.planning.corpus import Corpus
from tandem.data.planning.plan import StepPlan
from tandem.data.reading.jobs import Areas, Done, Job, JobRunner
from tandem.data.reading.slots import Lease, Slots
from tandem.data.reading.workers import WorkerPool
from tandem.data.reading.worklist import Work, image_work, text_work
from tandem.data.vision import VisionSpec

SLOTS = 16


@dataclass(frozen=True)
class Failure:
    """A sample of the plan that cannot be used as planned."""

    sample: int
    shard: str
    reason: str  # the short name under which it is counted
    sentence: str


@dataclass(frozen=True)
class ImageBatch:
    """Patches of some images of a plan, in the order asked for; they lie in memory that `release` gives back."""

    patches_NP: np.ndarray  # uint8, in the order of VisionSpec.cut
    grid_hw_I2: np.ndarray  # int32
    bytes_read: int
    failures: list[Failure]
    lease: Lease | None = None

    @property
    def patches_I(self) -> np.ndarray:
        """Patches of each image, int64."""
        return self.grid_hw_I2.prod(axis=1, dtype=np.int64)

    def release(self) -> None:
        """The patches are no longer needed: the next batch may overwrite them."""
        if self.lease is not None:
            self.lease.release()


@dataclass(frozen=True)
class RowBatch:
    """Tokens of some rows of a plan, in the order asked for."""

    tokens: np.ndarray  # int32 [R, S]; <image> at visual positions, <pad> after the last sample
    trained: np.ndarray  # bool [R, S]; the token is a target
    bytes_read: int
    failures: list[Failure]


@dataclass(frozen=True)
class Pending:
    """A batch being read: what `finish` waits for."""

    grid_hw_I2: np.ndarray
    shape: tuple[int, int]
    areas: Areas
    lease: Lease
    images: list[Work]
    texts: list[Work]


class ShardReader:
    """Reads and decodes in `workers` processes, or in the calling thread where there are none.

    slots: batches that may be under way or held at once. on_new_buffer and on_old_buffer are called with memory (uint8
    array) that batches will lie in and with memory about to be given up, so that it can be pinned and unpinned.
    Usable from several threads at once. `close` it, or let it go: no process outlives it or its parent.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        vision: VisionSpec,
        max_pixels: int,
        workers: int,
        *,
        slots: int = SLOTS,
        on_new_buffer: Callable[[np.ndarray], None] | None = None,
        on_old_buffer: Callable[[np.ndarray], None] | None = None,
    ):
        if workers < 0:
            raise ValueError(f"data.workers={workers}: must be 0 (decode in the training process) or more processes")
        self.corpus, self.tokenizer = corpus, tokenizer
        self._workers, self._vision = workers, vision
        train_roles = [sorted(source.settings.train_roles) for source in corpus.sources]
        self._slots = Slots(slots, on_new_buffer, on_old_buffer)
        self._pool: WorkerPool | _CallingThread
        if workers:
            settings = {
                "tokenizer": tokenizer.settings,
                "tokenizer_sha256": tokenizer.sha256,
                "train_roles": train_roles,
                "max_pixels": max_pixels,
                "vision": asdict(vision),
            }
            self._pool = WorkerPool(workers, settings)
        else:
            self._pool = _CallingThread(JobRunner(tokenizer, train_roles, max_pixels, vision))
        self.close = weakref.finalize(self, _close, self._pool, self._slots, os.getpid())

    @property
    def worker_pids(self) -> list[int]:
        return self._pool.pids

    def read(
        self, plan: StepPlan, image_ids: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray
    ) -> tuple[ImageBatch, RowBatch]:
        """`begin`, then `finish`."""
        return self.finish(self.begin(plan, image_ids, rows))

    def begin(
        self,
        plan: StepPlan,
        image_ids: Sequence[int] | np.ndarray,
        rows: Sequence[int] | np.ndarray,
        pixels: StepPlan | None = None,
    ) -> Pending:
        """Start to read images, given by their place in the plan's image arrays, and rows.

        pixels: a plan of the same shapes, out of which the images are read instead. Raises RuntimeError if `slots`
        batches are in use already.
        """
        image_ids, rows = np.asarray(image_ids, np.int64), np.asarray(rows, np.int64)
        grid_hw_I2 = plan.grid_hw_I2[image_ids].reshape(-1, 2)
        shape = (len(rows), plan.seq_length)
        patches = int(grid_hw_I2.prod(1, dtype=np.int64).sum())
        areas = Areas(patches, shape[0] * shape[1], self._vision.patch_values)
        lease = self._slots.take(areas.size)
        areas.tokens(lease.array_B)[:] = self.tokenizer.pad_id
        areas.trained(lease.array_B)[:] = False
        words = {"slot": lease.address, "patches": areas.patches, "positions": areas.positions}
        images = image_work(self.corpus, plan, plan if pixels is None else pixels, image_ids, words, self._workers)
        texts = text_work(self.corpus, plan, rows, words, self._workers)
        for work in sorted(images + texts, key=lambda one: -one.cost_us):  # the longest first, so that all end together
            work.future = self._pool.submit(work.job, work.name, lease)
        return Pending(grid_hw_I2, shape, areas, lease, images, texts)

    def finish(self, pending: Pending) -> tuple[ImageBatch, RowBatch]:
        """Wait for what `begin` started. Raises RuntimeError where it cannot be done, say if workers die over it."""
        image_bytes, image_failures = self._collect(pending.images)
        text_bytes, text_failures = self._collect(pending.texts)
        memory_B, areas = pending.lease.array_B, pending.areas
        images = ImageBatch(areas.patches_NP(memory_B), pending.grid_hw_I2, image_bytes, image_failures, pending.lease)
        tokens, trained = areas.tokens(memory_B).reshape(pending.shape), areas.trained(memory_B).reshape(pending.shape)
        return images, RowBatch(tokens.copy(), trained.copy(), text_bytes, text_failures)

    def _collect(self, works: list[Work]) -> tuple[int, list[Failure]]:
        """(bytes read, at most one failure for each sample, by its number)."""
        bytes_read = 0
        failures: dict[int, Failure] = {}
        for work in works:
            assert work.future is not None, "begin submits all work"
            done = work.future.result()
            bytes_read += done.bytes_read
            for m, reason, sentence in done.failures:
                shard = self.corpus.shard_name(int(work.shard_M[m]))
                for sample in np.unique(work.samples_M[m]).tolist():
                    failures.setdefault(sample, Failure(sample, shard, reason, sentence))
        return bytes_read, [failures[sample] for sample in sorted(failures)]


class _CallingThread:
    """Stands where the pool does and does each job at once."""

    def __init__(self, runner: JobRunner):
        self._runner = runner
        self.pids: list[int] = []

    def submit(self, job: Job, name: str, lease: Lease) -> Future[Done]:
        future: Future[Done] = Future()
        future.set_result(self._runner.run(job, lease.array_B))
        return future

    def close(self) -> None:
        self._runner.close()


def _close(pool: WorkerPool | _CallingThread, slots: Slots, process: int) -> None:
    """Does nothing in a fork of the process that made them."""
    if os.getpid() == process:
        pool.close()
        slots.close()
