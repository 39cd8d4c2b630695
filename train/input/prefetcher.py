"""Steps made ready ahead of time, in a thread: plan, this rank's pixels and text, and agreement of all ranks.

Every pixel and every row's text is read by one rank; which, a `Sharding` says.  Before a step is handed out, ranks
compare a digest of its plan and tell each other, over gloo groups that only this thread uses, what went wrong: a sample
that cannot be used is dropped on every rank (its shape stays, its loss does not count), and an error on one rank stops
all of them with the same sentence.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from tandem.data.planning.plan import StepPlan
from tandem.data.planning.stream import Stream
from tandem.data.reading.reader import Failure, ImageBatch, Pending, RowBatch, ShardReader
from tandem.parallel.comm.transfer import pinned
from tandem.parallel.grid import Grid
from tandem.train.config.schema import DataConfig

READING = 2  # steps being read at once, so that no worker waits for the slowest image of a step
BATCHES_HELD = READING + 4  # besides those made ready ahead: handed over, copied, computed and let go
LEAST_SEEN = 1000  # samples: the rate of unreadable ones is over the latest steps that hold so many


@dataclass(frozen=True, kw_only=True)
class RankShard:
    """What one rank reads of a step: images and rows by their numbers in the plan.

    digest: of how the step is divided, equal on all ranks.  pixels: a plan of the same shapes whose pixels are read
    instead, in evaluations.
    """

    image_ids: np.ndarray
    rows: np.ndarray
    digest: int
    pixels: StepPlan | None = None


Shard = TypeVar("Shard", bound=RankShard)


class Sharding(Protocol[Shard]):
    """How a task divides a step over the ranks, and what it makes of the text."""

    def shard(self, plan: StepPlan) -> Shard:
        """This rank's shard: a pure function of the plan."""

    def inspect(self, plan: StepPlan, rank_shard: Shard, text: RowBatch) -> list[Failure]:
        """Samples whose text this rank has read and that cannot be used."""

    def count(self, rank_shard: Shard, text: RowBatch) -> int:
        """Tokens of this rank's shard that are trained; of no other rank's."""

    def complete(self, plan: StepPlan, rank_shard: Shard, text: RowBatch) -> Any:
        """What the step needs of the text, once all ranks agreed (may be collective over this thread's gloo groups)."""


@dataclass
class PreparedStep(Generic[Shard]):
    """One step on the host: its plan, this rank's shard and pixels, its text as `Sharding.complete` made it, what the
    ranks agreed on, and all of it as the step takes it (`batch`, pinned where there is CUDA).

    trained_tokens, bytes_read, skipped: of all ranks.  Call `release` when the pixels are no longer needed.
    """

    plan: StepPlan
    rank_shard: Shard
    images: ImageBatch
    text: Any = None
    trained_tokens: int = 0
    bytes_read: int = 0
    skipped: list[Failure] = field(default_factory=list)
    batch: Any = None

    def release(self) -> None:
        self.images.release()


@dataclass
class _Reading(Generic[Shard]):
    """One step that is being read."""

    plan: StepPlan
    rank_shard: Shard
    pending: Pending


class AgreedError(RuntimeError):
    """What one rank found wrong, raised on every rank with the same words.  skipped: samples that led to it."""

    def __init__(self, sentence: str, skipped: Sequence[Failure] = ()):
        super().__init__(sentence)
        self.skipped = skipped


class Prefetcher(Generic[Shard]):
    """Iterator over `steps` prepared steps, equal on every rank; `drain` ends it early.

    compose: makes a prepared step's `batch`, whatever arrays that takes: here they cost the training loop nothing.
    Consume it to its end: its thread enters collectives as long as there are steps to prepare.
    """

    def __init__(
        self,
        stream: Stream,
        reader: ShardReader,
        config: DataConfig,
        grid: Grid,
        sharding: Sharding[Shard],
        compose: Callable[[PreparedStep[Shard]], Any],
        *,
        steps: int,
    ):
        self._stream, self._reader, self._config, self._grid = stream, reader, config, grid
        self._sharding, self._compose, self._steps = sharding, compose, steps
        self._latest: deque[tuple[int, int]] = deque()  # (samples, unreadable ones) of the latest steps
        self._stop = threading.Event()
        self._ready: queue.Queue = queue.Queue(maxsize=config.prefetch)
        self._aside: list = []  # what `poll` met and cannot hand out
        self._thread = threading.Thread(target=self._run, name="tandem-prefetcher", daemon=True)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self) -> PreparedStep[Shard]:
        """The next step; StopIteration after the last; AgreedError where any rank failed."""
        prepared = self._aside.pop() if self._aside else self._ready.get()
        if prepared is None:
            self._aside.append(None)
            raise StopIteration
        if isinstance(prepared, BaseException):
            raise prepared
        return prepared

    def poll(self) -> PreparedStep[Shard] | None:
        """The next step if it is ready."""
        if self._aside or self._ready.empty():
            return None
        item = self._ready.get()
        if isinstance(item, PreparedStep):
            return item
        self._aside.append(item)
        return None

    def drain(self) -> None:
        """Ends the thread early; every rank calls this after the same step and waits until all threads have ended."""
        self._stop.set()
        while (item := self._aside.pop() if self._aside else self._ready.get()) is not None:
            if isinstance(item, PreparedStep):
                item.release()

    # The thread

    def _run(self):
        if self._grid.device.type == "cuda":
            torch.cuda.set_device(self._grid.device)  # a new thread starts on device 0; pinning would wake it
        reading: deque[_Reading[Shard] | str] = deque()
        try:
            for step in range(self._steps):
                while len(reading) < min(READING, self._steps - step):
                    reading.append(self._begin())
                prepared = self._agree(reading.popleft())
                if prepared is None:
                    break
                self._ready.put(prepared)
        except BaseException as error:
            self._ready.put(error)
        for left in reading:
            if isinstance(left, _Reading):
                self._abandon(left.pending)
        self._ready.put(None)

    def _abandon(self, pending: Pending) -> None:
        try:
            self._reader.finish(pending)[0].release()
        except Exception as error:
            print(f"rank {self._grid.rank}: while reading a step that nobody wants any more: {error}", flush=True)

    def _begin(self) -> _Reading[Shard] | str:
        """Plans the next step and starts to read this rank's part of it; a sentence where that fails."""
        try:
            plan = self._stream.next_step()
            rank_shard = self._sharding.shard(plan)
            return _Reading(
                plan, rank_shard, self._reader.begin(plan, rank_shard.image_ids, rank_shard.rows, rank_shard.pixels)
            )
        except Exception as caught:
            return self._say(caught)

    def _say(self, error: Exception) -> str:
        return f"rank {self._grid.rank}: {type(error).__name__}: {error}"

    def _agree(self, reading: _Reading[Shard] | str) -> PreparedStep[Shard] | None:
        """Ends the reading of one step and agrees on it; None where a rank drains.

        Collective on the control group, always; then, where no rank failed, as the sharding has it.
        """
        read = self._finish(reading) if isinstance(reading, _Reading) else reading
        if isinstance(read, str):
            self._compare(torch.tensor([0, 0, True, self._stop.is_set(), 0, 0]))
            raise self._agreed(read)
        prepared, text, failures = read
        count = self._sharding.count(prepared.rank_shard, text)
        bytes_read = prepared.images.bytes_read + text.bytes_read
        digest = (prepared.plan.digest() ^ prepared.rank_shard.digest) & (2**62 - 1)
        mine = torch.tensor([digest, len(failures), False, self._stop.is_set(), count, bytes_read])
        seen_W6 = self._compare(mine)
        failed, stopped = bool(seen_W6[:, 2].any()), bool(seen_W6[:, 3].any())
        odd = torch.nonzero(seen_W6[:, 0] != seen_W6[0, 0]).flatten().tolist()
        if failed or stopped or odd:
            prepared.release()
        if failed:
            raise self._agreed(None)
        if odd:
            raise AgreedError(f"ranks {odd} planned step {prepared.plan.step} differently from rank 0")
        if stopped:
            return None
        prepared.trained_tokens, prepared.bytes_read = seen_W6[:, 4:].sum(dim=0).tolist()
        if seen_W6[:, 1].any():
            self._drop(prepared, text, failures)
        self._check_rate(prepared)
        prepared.text = self._sharding.complete(prepared.plan, prepared.rank_shard, text)
        error = self._make_batch(prepared)
        any_failed = torch.tensor([error is not None], dtype=torch.int32)
        dist.all_reduce(any_failed, group=self._grid.control)
        if any_failed:
            prepared.release()
            raise self._agreed(error)
        return prepared

    def _finish(self, reading: _Reading[Shard]) -> tuple[PreparedStep[Shard], RowBatch, dict[int, Failure]] | str:
        """(the step, its rows, the samples that cannot be used) once all is read; a sentence where that fails."""
        try:
            images, text = self._reader.finish(reading.pending)
        except Exception as caught:
            return self._say(caught)
        try:
            found = (*self._sharding.inspect(reading.plan, reading.rank_shard, text), *images.failures, *text.failures)
        except Exception as caught:
            images.release()
            return self._say(caught)
        return (
            PreparedStep(reading.plan, reading.rank_shard, images),
            text,
            {failure.sample: failure for failure in found},
        )

    def _compare(self, mine_6: torch.Tensor) -> torch.Tensor:
        """Every rank's numbers (collective on the control group)."""
        seen_W6 = [torch.empty_like(mine_6) for _ in range(self._grid.layout.world)]
        dist.all_gather(seen_W6, mine_6, group=self._grid.control)
        return torch.stack(seen_W6)

    def _make_batch(self, prepared: PreparedStep) -> str | None:
        """Composes the batch, pinned for CUDA; a sentence where that fails."""
        try:
            batch = self._compose(prepared)
            prepared.batch = pinned(batch) if self._grid.device.type == "cuda" else batch
        except Exception as caught:
            return self._say(caught)
        return None

    def _agreed(self, error: str | None) -> AgreedError:
        """What failed on any rank, on all of them (collective on the control group)."""
        sentences = [sentence for sentence in self._tell(error) if sentence]
        return AgreedError("; ".join(dict.fromkeys(sentences)))

    def _drop(self, prepared: PreparedStep, text: RowBatch, failures: dict[int, Failure]) -> None:
        """Takes the samples that any rank could not read out of the loss, on every rank."""
        dropped = {sample: failure for told in self._tell(failures) for sample, failure in told.items()}
        prepared.skipped = [dropped[sample] for sample in sorted(dropped)]
        plan, rows = prepared.plan, prepared.rank_shard.rows
        for sample in dropped:
            for place in np.flatnonzero(rows == plan.row_S[sample]):
                start = int(plan.start_S[sample])
                text.trained[place, start : start + int(plan.length_S[sample])] = False
        count = torch.tensor([self._sharding.count(prepared.rank_shard, text)])
        dist.all_reduce(count, group=self._grid.control)
        prepared.trained_tokens = int(count)

    def _check_rate(self, prepared: PreparedStep) -> None:
        """AgreedError where too many of the latest samples could not be used: a lost disk is noticed at once."""
        latest, rate = self._latest, self._config.max_skip_rate
        latest.append((prepared.plan.length_S.size, len(prepared.skipped)))
        while sum(samples for samples, _ in latest) - latest[0][0] >= LEAST_SEEN:
            latest.popleft()
        seen, skipped = (sum(column) for column in zip(*latest, strict=True))
        if prepared.skipped and skipped > rate * max(seen, LEAST_SEEN):
            prepared.release()
            sentence = f"{skipped} of the latest {seen} samples could not be used, above data.max_skip_rate={rate}"
            raise AgreedError(f"{sentence}; the last one: {prepared.skipped[-1].sentence}", prepared.skipped)

    def _tell(self, mine) -> list:
        everyone = [None] * self._grid.layout.world
        dist.all_gather_object(everyone, mine, group=self._grid.control)
        return everyone
