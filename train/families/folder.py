"""A folder of Hugging Face's format, read slice by slice: any box of a tensor of ours, from the tensors that hold it.

Safetensors only, in one file or several with an index; nothing is unpickled, nothing fetched.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tandem.train.families.base import Family, Run, Tensor
from tandem.train.models.language.llm_config import LLMConfig

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


class Folder:
    """The weights of one model.  Raises ValueError, naming the folder, where names or shapes are not the family's."""

    def __init__(self, folder: str | Path, family: Family, model: LLMConfig):
        self.path = Path(folder)
        self._files = self._index()
        self._open: dict[str, Any] = {}
        self._tensors = {tensor.name: tensor for tensor in family.tensors(model)}
        self._check()

    def _index(self) -> dict[str, str]:
        """File of each tensor."""
        try:
            if (self.path / INDEX).is_file():
                return json.loads((self.path / INDEX).read_text())["weight_map"]
            with safe_open(self.path / SINGLE, framework="pt") as file:
                return dict.fromkeys(file.keys(), SINGLE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            pickles = ", ".join(sorted(path.name for path in self.path.glob("*.bin")))
            why = f"holds {pickles} and no {SINGLE}: pickles are not read, save it as safetensors" if pickles else error
            raise ValueError(f"{self.path}: {why}") from error

    def _check(self) -> None:
        """Every name of the family is there and no other; every shape is what the settings say."""
        wanted = shapes(self._tensors.values())
        for what, names in (("lacks", wanted.keys() - self._files), ("has no place for", self._files.keys() - wanted)):
            if names:
                first = sorted(names)
                raise ValueError(f"{self.path}: the model {what} {', '.join(first[:3])}{' ...' * (len(first) > 3)}")
        for name, shape in wanted.items():
            found = tuple(self._slice_of(name).get_shape())
            if found != shape:
                raise ValueError(f"{self.path}: {name} has shape {list(found)}, config.json says {list(shape)}")

    def read(self, name: str, kind: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` at `start` of a tensor of ours, fp32 on the CPU; weights alone, so kind is "param"."""
        if kind != "param" or name not in self._tensors:
            raise ValueError(f"{self.path} has no {kind} of {name}")
        out, (first, rows) = torch.empty(size), (start[0], size[0])
        rest = tuple(slice(at, at + count) for at, count in zip(start[1:], size[1:], strict=True))
        for run in self._tensors[name].runs:
            low, high = max(first, run.ours), min(first + rows, run.ours + run.rows)
            if low < high:
                begin = run.begin + low - run.ours
                theirs = self._slice_of(run.theirs)[(slice(begin, begin + high - low), *rest)]
                out[low - first : high - first] = theirs
        return out

    def _slice_of(self, name: str) -> Any:
        try:
            file = self._files[name]
            if file not in self._open:
                self._open[file] = safe_open(self.path / file, framework="pt")
            return self._open[file].get_slice(name)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self.path}: {self._files[name]} cannot be read: {error}") from error


def shapes(tensors: Iterable[Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of their tensors, from the runs of ours; in the order in which they are first met."""
    rows: dict[str, int] = {}
    rest: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        for run in tensor.runs:
            rows[run.theirs] = max(rows.get(run.theirs, 0), run.begin + run.rows)
            rest[run.theirs] = tensor.shape[1:]
    return {name: (count, *rest[name]) for name, count in rows.items()}


def by_their_names(tensors: Iterable[Tensor]) -> dict[str, list[tuple[str, Run]]]:
    """(our tensor, run) of everything that each tensor of theirs is made of."""
    found: dict[str, list[tuple[str, Run]]] = {}
    for tensor in tensors:
        for run in tensor.runs:
            found.setdefault(run.theirs, []).append((tensor.name, run))
    return found
