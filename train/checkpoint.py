"""Checkpoints that any layout can load: boxes of global tensors in safetensors files, and one JSON manifest.

    step-00000020/  manifest.json  rank-00000.safetensors  rank-00001.safetensors ...

Every rank writes the boxes it holds into a staging folder; rank 0 writes the manifest and renames the folder, so a
checkpoint is whole or not there.  A reader asks for any box of a tensor and gets it cut from whatever boxes were saved.
Nothing is unpickled.
"""

import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from parallel.hybrid_step import Engines
from parallel.state import StateChunk

FORMAT = "tandem checkpoint 1"
_NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainState:
    """Everything of a run that is not a tensor: steps done, data position, Adam's counts, and the recipe it was."""

    step: int
    data: dict
    optimizer_steps: dict[str, int]
    recipe: str


def save(folder: Path, engines: Engines, state: TrainState, keep: int) -> Path:
    """Writes checkpoint `step-N` under `folder` (collective), then removes all but the newest `keep`."""
    rank = engines.grid.rank
    final = folder / f"step-{state.step:08d}"
    staging = folder / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    dist.barrier(engines.grid.saving)
    file = f"rank-{rank:05d}.safetensors"
    boxes = _write(staging / file, file, itertools.chain(engines.encoder.state(), engines.llm.state()))
    everyone = [None] * engines.grid.layout.world if rank == 0 else None
    dist.gather_object(boxes, everyone, group=engines.grid.saving)
    if rank == 0:
        _publish(staging, final, state, [box for part in everyone for box in part])
        _prune(folder, keep)
    dist.barrier(engines.grid.saving)
    return final


def _write(path: Path, file: str, chunks: Iterable[StateChunk]) -> list[dict]:
    tensors, boxes = {}, []
    for chunk in chunks:  # state() is collective: every rank goes through all of it
        if chunk.written_here:
            key = f"{len(boxes)}"
            tensors[key] = chunk.tensor.contiguous()
            boxes.append(
                {
                    "name": chunk.name,
                    "kind": chunk.kind,
                    "shape": list(chunk.shape),
                    "start": list(chunk.start),
                    "size": list(chunk.tensor.shape),
                    "file": file,
                    "key": key,
                }
            )
    save_file(tensors, path)
    _flush(path)
    return boxes


def _publish(staging: Path, final: Path, state: TrainState, boxes: list[dict]) -> None:
    files = {path.name: path.stat().st_size for path in sorted(staging.glob("*.safetensors"))}
    manifest = {
        "format": FORMAT,
        "step": state.step,
        "data": state.data,
        "optimizer_steps": state.optimizer_steps,
        "recipe": state.recipe,
        "files": files,
        "boxes": boxes,
    }
    manifest["digest"] = _digest(manifest)
    (staging / "manifest.json").write_text(json.dumps(manifest))
    _flush(staging / "manifest.json")
    shutil.rmtree(final, ignore_errors=True)
    staging.rename(final)
    _flush(final.parent)


def _digest(manifest: dict) -> str:
    """Of all that a manifest says, so that a flipped bit in it is noticed."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _prune(folder: Path, keep: int) -> None:
    for old in checkpoints(folder)[: -max(keep, 1)]:
        shutil.rmtree(old)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints under `folder`, oldest first."""
    found = [
        path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / "manifest.json").is_file()
    ]
    return sorted(found)


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run or of its folder of checkpoints.

    Raises ValueError where there is none.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / "manifest.json").is_file():
            return folder
        if found := checkpoints(folder):
            return found[-1]
    raise ValueError(f"there is no checkpoint at {path}: give a run directory or a step-* folder")


class Reader:
    """Reads boxes of tensors from one checkpoint.

    Raises ValueError, naming the file or tensor, for a damaged, foreign or incomplete checkpoint.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, object] = {}
        try:
            manifest = json.loads((path / "manifest.json").read_text())
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, this version reads {FORMAT!r}")
            self.state = TrainState(
                step=manifest["step"],
                data=manifest["data"],
                optimizer_steps=manifest["optimizer_steps"],
                recipe=manifest["recipe"],
            )
            self._boxes: dict[tuple[str, str], list[dict]] = {}
            for box in manifest["boxes"]:
                self._boxes.setdefault((box["name"], box["kind"]), []).append(box)
            files = dict(manifest["files"])
            if unknown := {box["file"] for box in manifest["boxes"]} - set(files):
                raise ValueError(f"its boxes lie in {', '.join(sorted(unknown))}, which it does not list")
            if manifest["digest"] != _digest(manifest):
                raise ValueError("its digest does not match what it says")
        except (OSError, KeyError, TypeError, ValueError) as error:
            why = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"checkpoint {path}: manifest.json cannot be used: {why}") from error
        for file, size in files.items():
            if Path(file).name != file or not (path / file).is_file() or (path / file).stat().st_size != size:
                raise ValueError(f"checkpoint {path}: {file} is missing or not {size} bytes long")

    def read(self, name: str, kind: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` at `start` of a global tensor, fp32 on the CPU."""
        boxes = self._boxes.get((name, kind))
        if boxes is None:
            raise ValueError(f"checkpoint {self.path} has no {kind} of {name}")
        shape = boxes[0]["shape"]
        if len(shape) != len(size) or any(s + n > whole for s, n, whole in zip(start, size, shape, strict=True)):
            raise ValueError(f"checkpoint {self.path}: {name} has shape {shape}, the model wants {size} from {start}")
        out, filled = torch.empty(size), torch.zeros(size, dtype=torch.bool)
        for box in boxes:
            low = [max(a, b) for a, b in zip(start, box["start"], strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, box["start"], box["size"], strict=True)]
            if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
                continue
            there = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(low, high, box["start"], strict=True))
            here = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(low, high, start, strict=True))
            out[here] = self._slice(box, there)
            filled[here] = True
        if not filled.all():
            raise ValueError(f"checkpoint {self.path}: {kind} of {name} is not complete")
        return out

    def _slice(self, box: dict, where: tuple[slice, ...]) -> torch.Tensor:
        try:
            if box["file"] not in self._open:
                self._open[box["file"]] = safe_open(self.path / box["file"], framework="pt")
            return self._open[box["file"]].get_slice(box["key"])[where]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {self.path}: {box['file']} is damaged: {error}") from error


def load(reader: Reader, engines: Engines, *, optimizer: bool) -> None:
    """Takes weights, and with `optimizer` Adam's moments and counts, into both engines (collective).

    Raises ValueError where moments are asked for that were not saved, as from a stage that froze the module.
    """
    parts = {"llm": engines.llm, "encoder": engines.encoder}
    for name, engine in parts.items():
        if optimizer and engine.trainable and reader.state.optimizer_steps.get(name) is None:
            raise ValueError(
                f"checkpoint {reader.path} has no optimizer state of the {name}, frozen in its recipe "
                f"{reader.state.recipe}; set checkpoint.load_optimizer=false to start with fresh moments"
            )
    for name, engine in parts.items():
        engine.load(reader.read, optimizer)
        if optimizer and engine.trainable:
            engine.optimizer_steps = reader.state.optimizer_steps[name]


def train_state(engines: Engines, step: int, data: dict, recipe: str) -> TrainState:
    """The non-tensor state after `step` steps (collective)."""
    steps = {
        name: engine.optimizer_steps
        for name, engine in (("encoder", engines.encoder), ("llm", engines.llm))
        if engine.trainable
    }
    return TrainState(step=step, data=data, optimizer_steps=steps, recipe=recipe)
