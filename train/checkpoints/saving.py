"""Saving without waiting: the loop pays for a copy to host memory, a thread does the rest.

    main thread     save(): wait for the last write, copy what this rank owns to the host
    saving thread   write and flush rank-*.safetensors in .step-N.partial -> all ranks tell rank 0 -> rank 0 checks,
                    writes the manifest, flushes, renames the folder -> all ranks hear the outcome

A failure on any rank (a full disk, say) ends the save on all of them: the previous checkpoint stays the newest,
training goes on, and `poll` has a sentence for the log.  The ranks agree over the gloo group `saving`, which belongs to
this thread while it runs.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tandem.parallel.engines.state import ROUTER_BIAS, StateChunk
from tandem.parallel.runtime import random_state
from tandem.train.checkpoints import checkpoint
from tandem.train.checkpoints.checkpoint import (
    FORMAT,
    MANIFEST,
    RANDOM,
    TASK,
    TrainState,
    box_key,
    file_of,
    step_of,
)
from tandem.train.checkpoints.retention import clean, prune
from tandem.train.checkpoints.tensors import write_file
from tandem.train.tasks.base import Engines

NICE = 10  # of the saving thread


class NotSavedError(RuntimeError):
    """Why all ranks gave a save up."""


class Saver:
    """Writes checkpoints of `engines` under `folder`, in a thread; one at a time.

    task, trainable, optimizer, tokenizer, architecture: of the run, found again in TrainState.
    keep: newest ones kept.  keep_every: those whose step is a multiple of it stay too; 0 for none.
    Needs the loop's discipline: all ranks call the same methods in the same order.
    """

    def __init__(
        self,
        folder: Path,
        engines: Engines,
        *,
        task: str,
        trainable: Sequence[str],
        optimizer: str,
        tokenizer: Mapping[str, str],
        architecture: dict,
        keep: int,
        keep_every: int,
    ):
        self._folder, self._engines = folder, engines
        self._identity: dict[str, Any] = {
            "task": task,
            "trainable": list(trainable),
            "optimizer": optimizer,
            "tokenizer": dict(tokenizer),
            "architecture": architecture,
        }
        self._keep, self._keep_every = keep, keep_every
        self._group, self._rank = engines.grid.saving, engines.grid.rank
        numel = sum(chunk.tensor_N.numel() for chunk in self._chunks()[0])
        self._host = torch.zeros(numel, pin_memory=engines.grid.device.type == "cuda")  # now, not in the first save
        self._frozen: set[str] = set()  # tensors whose values lie in host memory for good
        self._thread: threading.Thread | None = None
        self._published: Path | None = None  # by this run
        self._newest: Path | None = None  # that is good, by any
        self._failures: list[str] = []
        self._damaged: set[int] = set()
        if self._rank == 0:
            clean(folder)

    @torch.no_grad()
    def save(
        self, step: int, position: dict, extra: dict | None = None, tensors: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        """Starts checkpoint step-N: returns when the state is copied to host memory.

        position: the data's, after this step.  extra: JSON of guards and counters, found again in TrainState.extra.
        tensors: what the task keeps besides weights, equal on all ranks; written by rank 0.
        """
        self.wait()
        chunks, names = self._chunks()
        views = self._views(chunks)
        moving = [place for place, name in enumerate(names) if name not in self._frozen]
        if moving:
            values = [chunks[place].tensor_N for place in moving]
            torch._foreach_copy_([views[place] for place in moving], values, non_blocking=True)
        others = {RANDOM + name: tensor for name, tensor in random_state.capture().items()}
        if self._rank == 0:
            others |= {TASK + name: tensor.cpu().clone() for name, tensor in (tensors or {}).items()}
        counts = {name: engine.optimizer_steps for name, engine in self._engines.by_name.items() if engine.trainable}
        state = TrainState(
            step=step,
            data=position,
            optimizer_steps=counts,
            layout=checkpoint.layout_of(self._engines.grid.layout),
            extra=json.loads(json.dumps(extra or {})),
            **self._identity,
        )
        if self._engines.grid.device.type == "cuda":
            torch.cuda.synchronize()
        snapshot = list(zip(names, chunks, views, strict=True))
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, others, state), name="tandem-saving", daemon=True
        )
        self._thread.start()

    @torch.no_grad()
    def keep_frozen(self, read: Callable[..., torch.Tensor], parts: Collection[str]) -> None:
        """Has frozen weights of `parts` saved as they were loaded, and not as bf16 rounds them to compute.

        read: what the engines loaded from, by the names in a checkpoint; this rank reads what it saves.
        """
        self.wait()
        chunks, names = self._chunks()
        trained = {name for chunk, name in zip(chunks, names, strict=True) if chunk.kind != "param"}
        trained |= {name for name in names if ROUTER_BIAS.fullmatch(name)}  # in fp32, and moved without an optimizer
        for chunk, name, view in zip(chunks, names, self._views(chunks), strict=True):
            if name.partition(".")[0] in parts and name not in trained:
                for corner, values in dataclasses.replace(chunk, tensor_N=view).boxes():
                    values.copy_(read(name, "param", corner, tuple(values.shape)))
                self._frozen.add(name)

    def _views(self, chunks: Sequence[StateChunk]) -> tuple[torch.Tensor, ...]:
        """The host memory of each chunk."""
        return self._host.split([chunk.tensor_N.numel() for chunk in chunks])

    def wait(self) -> Path | None:
        """Waits for the write that goes on, if any; the checkpoint published last by this run."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._published

    def poll(self) -> str | None:
        """A loud sentence, once, for a save that failed on any rank since the last call."""
        if not self._failures:
            return None
        failures, self._failures = self._failures, []
        return "; ".join(failures)

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint of the folder whose every byte is as written, and what is wrong with those after it.

        Collective: each rank reads its share of the files.  Not while a save goes on.  Raises ValueError where all that
        there are is damaged: whether to start anew is a person's choice.
        """
        names: list = [None]
        if self._rank == 0:
            names[0] = [path.name for path in checkpoint.named(self._folder)]
        dist.broadcast_object_list(names, src=0, group=self._group)
        sentences: list[str] = []
        for name in reversed(names[0]):
            found = verify_together(self._folder / name, self._engines)
            if not found:
                self._newest = self._folder / name
                return self._newest, sentences
            sentences += found
            self._damaged.add(step_of(self._folder / name))
        if sentences:
            raise ValueError(f"every checkpoint in {self._folder} is damaged: {'; '.join(sentences)}")
        return None, sentences

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _run(self, snapshot, others, state: TrainState) -> None:
        if sys.platform == "linux":  # where threads have priorities of their own: the loop goes first on a shared core
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        try:
            self._published = self._newest = self._save_together(snapshot, others, state)
        except Exception as error:  # whatever it is, the run goes on with the checkpoint it has
            newest = f"{self._newest.name} stays the newest" if self._newest else "and there is none yet"
            why = error if isinstance(error, NotSavedError) else f"rank {self._rank}: {_words(error)}"
            self._failures.append(f"CHECKPOINT step-{state.step:08d} WAS NOT SAVED, {newest}: {why}")

    def _save_together(self, snapshot, others, state: TrainState) -> Path:
        final = self._folder / f"step-{state.step:08d}"
        staging = self._folder / f".{final.name}.partial"
        self._rank_0_does(lambda: _prepare(staging))
        try:
            report = (*self._write(staging, snapshot, others), state.optimizer_steps, None)
        except Exception as error:
            report = ([], {}, {}, f"rank {self._rank}: {_words(error)}")
        everyone: Any = [None] * self._engines.grid.layout.world if self._rank == 0 else None
        dist.gather_object(report, everyone, group=self._group)
        self._rank_0_does(lambda: self._publish(staging, final, state, everyone), undo=staging)
        return final

    def _rank_0_does(self, what, undo: Path | None = None) -> None:
        """Runs something on rank 0; raises NotSavedError on all ranks where it failed (collective)."""
        outcome: list = [None]
        if self._rank == 0:
            try:
                what()
            except Exception as error:
                outcome[0] = f"{error}" if isinstance(error, NotSavedError) else f"rank 0: {_words(error)}"
                if undo:
                    shutil.rmtree(undo, ignore_errors=True)  # gives a full disk its space back
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[0]:
            raise NotSavedError(outcome[0])

    @torch.no_grad()
    def _write(self, staging: Path, snapshot, others) -> tuple[list, dict]:
        """Writes this rank's file; (name, kind, shape, corner, size) of its boxes, and the file's size and checksum."""
        tensors, boxes = dict(others), []
        for name, chunk, host_N in snapshot:
            for corner, values in dataclasses.replace(chunk, tensor_N=host_N).boxes():
                tensors[box_key(name, chunk.kind, corner)] = values
                boxes.append((name, chunk.kind, chunk.shape, corner, tuple(values.shape)))
        order = sorted(tensors, key=lambda key: (tensors[key].element_size() != 4, key))  # equal state, equal file
        return boxes, write_file(staging / file_of(self._rank), {key: tensors[key] for key in order})

    def _publish(self, staging: Path, final: Path, state: TrainState, reports: list) -> None:
        if wrong := [error for *_, error in reports if error]:
            raise NotSavedError("; ".join(wrong))
        publish(staging, final, state, reports)
        self._damaged.discard(state.step)
        try:
            prune(self._folder, self._keep, self._keep_every, self._damaged)
        except OSError as error:  # what was published stays so
            self._failures.append(f"old checkpoints under {self._folder} could not be deleted: {error}")

    def _chunks(self) -> tuple[list[StateChunk], list[str]]:
        """What this rank saves, and its names in the checkpoint: the first word is the module."""
        chunks, names = [], []
        for name, engine in self._engines.by_name.items():
            own = list(engine.state())
            chunks += own
            names += [chunk.name if name == "encoder" else f"{name}.{chunk.name}" for chunk in own]
        return chunks, names


def verify_together(path: Path, engines: Engines) -> list[str]:
    """What is wrong with a checkpoint; the ranks share its files, and all hear everything (collective)."""
    grid = engines.grid
    everyone: list = [None] * grid.layout.world
    dist.all_gather_object(everyone, checkpoint.damage(path, grid.rank, grid.layout.world), group=grid.saving)
    return list(dict.fromkeys(sentence for part in everyone for sentence in part))


# ---- what rank 0 does ------------------------------------------------------------------------------------------------


def publish(staging: Path, final: Path, state: TrainState, reports: list) -> None:
    """Makes a written staging folder the checkpoint `final`.

    reports: of every rank (boxes, size and checksum of its file, optimizer steps, None).
    Raises NotSavedError where a file is not what its rank wrote or a tensor is not whole.
    """
    files = {file_of(rank): facts for rank, (_, facts, _, _) in enumerate(reports)}
    for name, facts in files.items():
        with (staging / name).open("rb") as file:
            if (size := os.fstat(file.fileno()).st_size) != facts["bytes"]:
                raise NotSavedError(f"{staging / name} is {size} bytes long for rank 0, {facts['bytes']} for its rank")
    counts = {name: max(steps[name] for *_, steps, _ in reports) for name in state.optimizer_steps}
    said = {
        "format": FORMAT,
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "state": {**vars(state), "optimizer_steps": counts},
        "files": files,
        "tensors": _tensors([boxes for boxes, *_ in reports]),
    }
    with (staging / MANIFEST).open("w") as file:
        file.write(checkpoint.manifest_text(said))
        file.flush()
        os.fsync(file.fileno())
    flush(staging)
    aside = final.parent / f".{final.name}.replaced"
    if final.exists():
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)  # `clean` brings it back, should this process end here
    staging.rename(final)
    flush(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _tensors(boxes_of_rank: list[list]) -> dict[str, dict]:
    """{name: {"shape", "kinds", "boxes": [[file, corner, size], ...]}}; every tensor whole, its kinds cut alike."""
    found: dict[str, dict[str, list]] = {}
    shapes = {}
    for rank, boxes in enumerate(boxes_of_rank):
        for name, kind, shape, corner, size in boxes:
            shapes[name] = list(shape)
            found.setdefault(name, {}).setdefault(kind, []).append([rank, list(corner), list(size)])
    for name, by_kind in found.items():
        wanted = math.prod(shapes[name])
        for kind, boxes in by_kind.items():
            if (count := sum(math.prod(size) for *_, size in boxes)) != wanted:
                raise NotSavedError(f"{count} of {wanted} entries of {kind} of {name} were written")
            assert boxes == by_kind["param"], f"{kind} of {name} is cut another way than its weights"
    return {
        name: {"shape": shapes[name], "kinds": list(by_kind), "boxes": by_kind["param"]}
        for name, by_kind in found.items()
    }


def _prepare(staging: Path) -> None:
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)


def flush(path: Path) -> None:
    """Flushes a folder's names to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
