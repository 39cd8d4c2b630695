"""Tensors of a checkpoint by the names that they have in an exported folder, read one at a time, and written likewise.

A folder appears whole or not at all: it is written beside its place and renamed at the end.
"""

import json
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tandem.train import families
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.checkpoints.saving import flush
from tandem.train.checkpoints.tensors import write_stream
from tandem.train.families.folder import Table


@dataclass(frozen=True)
class Weights:
    """shapes: of tensors, by their names in the folder.  read: one of them, fp32 on the CPU.  fp32: those that are
    written as they are, whatever the dtype of the others."""

    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    fp32: frozenset[str] = frozenset()

    def __or__(self, other: "Weights") -> "Weights":
        mine = self.shapes.keys()
        read = lambda name: (self if name in mine else other).read(name)  # noqa: E731
        return Weights(self.shapes | other.shapes, read, self.fp32 | other.fp32)


def of_modules(reader: Reader, modules: Collection[str]) -> Weights:
    """Modules under our own names."""
    names = sorted(name for name in reader.tensors if name.partition(".")[0] in modules)
    return Weights({name: tuple(reader.tensors[name]["shape"]) for name in names}, reader.whole)


def of_family(reader: Reader, family: Table, model: Any, *, part: str = "llm", prefix: str = "") -> Weights:
    """A part of the model under the names of its family, with a prefix; rows are put together from ours.

    Raises ValueError where the checkpoint holds tensors for which the family has no place.
    """
    tensors = list(family.tensors(model))
    held = {name.removeprefix(f"{part}.") for name in reader.tensors if name.startswith(f"{part}.")}
    if more := sorted(held - {tensor.name for tensor in tensors}):
        raise ValueError(f"checkpoint {reader.path}: a {family.architecture} has no place for {part}.{more[0]}")
    shapes, parts_of = families.shapes(tensors), families.by_their_names(tensors)

    def read(name: str) -> torch.Tensor:
        theirs = name.removeprefix(prefix)
        return families.theirs(parts_of[theirs], shapes[theirs], lambda ours, *box: reader.read(f"{part}.{ours}", *box))

    fp32 = frozenset(prefix + run.theirs for tensor in tensors if tensor.fp32 for run in tensor.runs)
    return Weights({prefix + name: shape for name, shape in shapes.items()}, read, fp32)


def constant(fills: dict[str, tuple[tuple[int, ...], float]]) -> Weights:
    """Tensors of one value each, from (shape, value) by name."""
    return Weights({name: shape for name, (shape, _) in fills.items()}, lambda name: torch.full(*fills[name]))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `folder` if nothing goes wrong and else is deleted."""
    staging = folder.parent / f".{folder.name}.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        flush(staging)
        staging.rename(folder)
        flush(folder.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_weights(
    folder: Path, weights: Weights, dtype: torch.dtype, file_bytes: float, metadata: Mapping[str, str]
) -> tuple[int, int]:
    """Safetensors files of at most file_bytes each, with an index where there are several.

    Returns their number and the bytes of all tensors.
    """
    files: list[list[str]] = [[]]
    dtypes = {name: torch.float32 if name in weights.fp32 else dtype for name in weights.shapes}
    sizes = {name: math.prod(shape) * dtypes[name].itemsize for name, shape in weights.shapes.items()}
    size = 0
    for name, count in sizes.items():
        if files[-1] and size + count > file_bytes:
            files.append([])
            size = 0
        files[-1].append(name)
        size += count
    weight_map: dict[str, str] = {}
    for place, names in enumerate(files, start=1):
        file = "model.safetensors" if len(files) == 1 else f"model-{place:05d}-of-{len(files):05d}.safetensors"
        shapes = {name: (dtypes[name], weights.shapes[name]) for name in names}
        tensors = (weights.read(name).to(dtypes[name]) for name in names)
        write_stream(folder / file, shapes, tensors, {"format": "pt", **metadata})
        weight_map |= dict.fromkeys(names, file)
    total = sum(sizes.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return len(files), total
