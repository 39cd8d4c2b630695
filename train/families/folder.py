"""A folder of Hugging Face's format, read slice by slice: any box of a tensor of ours, from the tensors that hold it.

Safetensors only, in one file or several with an index; nothing is unpickled, nothing fetched.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from tandem.data.registry import Registry
from tandem.train.families.tensors import Run, Tensor

Entry = TypeVar("Entry")

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a folder.  Raises ValueError where there is no such folder, OSError where it has none."""
    path = Path(folder)
    if not path.is_dir():
        raise ValueError("there is no such folder, and nothing is downloaded: hf download NAME --local-dir FOLDER does")
    return json.loads((path / "config.json").read_text())


def family_in(
    folder: str | Path, families: Registry[Entry], key: str, kind_of: Callable[[str], str] = str
) -> tuple[Entry, dict[str, Any]]:
    """(the family of a folder, its config.json).  Raises ValueError, naming the setting `key`, where there is none.

    kind_of: name of the family, from the folder's model_type.
    """
    try:
        said = read_config(folder)
        return families.find(kind_of(str(said.get("model_type")))), said
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{key}={folder}: {error}") from error


def compare(config: Any, found: Mapping[str, Any], part: str, folder: str | Path) -> None:
    """Raises ValueError where a setting of `model.<part>` is not what its folder says, by key."""
    for name, value in found.items():
        if (ours := getattr(config, name)) != value:
            raise ValueError(
                f"model.{part}.{name}={ours}, but model.{part}.folder={folder} has {value}: leave model.{part}.{name} "
                "out"
            )


class Table(Protocol):
    """What of a family a folder is read and written by."""

    @property
    def architecture(self) -> str:
        """The class in transformers."""

    def tensors(self, model: Any) -> Iterator[Tensor]:
        """Every tensor of the whole model, by our names."""

    def left_out(self, names: Iterable[str], model: Any) -> dict[str, str]:
        """Of surplus tensors of a folder those that are not used, and why."""


class Folder:
    """The weights of one model.  Raises ValueError, naming the folder, where names or shapes are not the family's.

    prefixes: that may stand before the family's names, the first that does being meant.  left_out: tensors that are
    not read, and why.
    """

    def __init__(self, folder: str | Path, family: Table, model: Any, prefixes: Sequence[str] = ("",)):
        self.path = Path(folder)
        self._files = self._index()
        self._open: dict[str, Any] = {}
        self.tensors = {tensor.name: tensor for tensor in family.tensors(model)}
        wanted = shapes(self.tensors.values())
        found = (prefix for prefix in prefixes if any(prefix + name in self._files for name in wanted))
        self._prefix = next(found, prefixes[0])
        wanted = {self._prefix + name: shape for name, shape in wanted.items()}
        self.left_out = family.left_out(self._files.keys() - wanted, model)
        self._check(wanted)

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

    def _check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """Every name of the family is there and no other; every shape is what the settings say."""
        surplus = self._files.keys() - wanted - self.left_out.keys()
        for what, names in (("lacks", wanted.keys() - self._files), ("has no place for", surplus)):
            if names:
                first = sorted(names)
                raise ValueError(f"{self.path}: the model {what} {', '.join(first[:3])}{' ...' * (len(first) > 3)}")
        for name, shape in wanted.items():
            found = tuple(self._slice_of(name).get_shape())
            if found != shape:
                raise ValueError(f"{self.path}: {name} has shape {list(found)}, config.json says {list(shape)}")

    @property
    def description(self) -> str:
        """The folder and its tensors that are left out, for a log."""
        reasons: dict[str, list[str]] = {}
        for name, why in sorted(self.left_out.items()):
            reasons.setdefault(why, []).append(name)
        parts = (f"without {', '.join(names[:3])}{' ...' * (len(names) > 3)}: {why}" for why, names in reasons.items())
        return "; ".join((str(self.path), *parts))

    def has(self, name: str) -> bool:
        """Whether the family has a tensor of ours."""
        return name in self.tensors

    def read(self, name: str, kind: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` at `start` of a tensor of ours, fp32 on the CPU; weights alone, so kind is "param"."""
        if kind != "param" or name not in self.tensors:
            raise ValueError(f"{self.path} has no {kind} of {name}")
        out, (first, rows) = torch.empty(size), (start[0], size[0])
        tensor = self.tensors[name]
        rest = tuple(slice(at, at + count) for at, count in zip(start[1:], size[1:], strict=True))
        for run in tensor.runs:
            low, high = max(first, run.ours), min(first + rows, run.ours + run.rows)
            if low < high:
                begin = run.begin + low - run.ours
                whole = self._slice_of(self._prefix + run.theirs)
                here = slice(begin, begin + high - low)
                theirs = whole[(here, *rest)] if tensor.form is None else tensor.form.ours(whole[here])[:, *rest]
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
            rest[run.theirs] = tensor.form.shape if tensor.form else tensor.shape[1:]
    return {name: (count, *rest[name]) for name, count in rows.items()}


def by_their_names(tensors: Iterable[Tensor]) -> dict[str, list[tuple[Tensor, Run]]]:
    """(our tensor, run) of everything that each tensor of theirs is made of."""
    found: dict[str, list[tuple[Tensor, Run]]] = {}
    for tensor in tensors:
        for run in tensor.runs:
            found.setdefault(run.theirs, []).append((tensor, run))
    return found


def theirs(
    parts: Iterable[tuple[Tensor, Run]], shape: tuple[int, ...], read: Callable[..., torch.Tensor]
) -> torch.Tensor:
    """A tensor of theirs, row by row from ours.

    parts: as `by_their_names` has them; read: of ours, as `Folder.read`.
    """
    out = torch.empty(shape)
    for tensor, run in parts:
        rest = tensor.shape[1:]
        rows = read(tensor.name, "param", (run.ours, *(0 for _ in rest)), (run.rows, *rest))
        out[run.begin : run.begin + run.rows] = tensor.form.theirs(rows) if tensor.form else rows
    return out
