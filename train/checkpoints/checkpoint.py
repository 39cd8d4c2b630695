"""Checkpoints that any layout can load: boxes of global tensors in safetensors files, and one JSON manifest.

    step-00000020/  manifest.json  rank-00000.safetensors  rank-00001.safetensors ...

The manifest says of every file its size and checksum, of every tensor its shape and boxes, and of itself a digest: one
flipped bit anywhere is noticed.  A reader asks for any box of a tensor and gets it cut from whatever boxes were saved.
Nothing is unpickled.  This module reads and checks; `train/checkpoints/saving.py` writes.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from tandem.parallel.engines.state import EMA, ROUTER_BIAS
from tandem.parallel.layout import Layout
from tandem.parallel.runtime import random_state
from tandem.train.checkpoints.tensors import crc32_of

if TYPE_CHECKING:  # launch/checkpoint.py reads checkpoints without Megatron-core and DeepSpeed
    from tandem.parallel.engines.encoder_engine import EncoderEngine
    from tandem.parallel.engines.llm_engine import LLMEngine
    from tandem.train.tasks.base import Engines

FORMAT = "tandem checkpoint 2"
MANIFEST = "manifest.json"
RANDOM, TASK = "random/", "recipe/"  # keys of a rank's random states, and in rank 0's file of its task's tensors
MAPPED = 1 << 28  # bytes read after which files are closed: what is read of a mapped file stays in memory until then
NAME = re.compile(r"step-(\d{8})")


@dataclass(frozen=True)
class TrainState:
    """Everything of a run that is not a tensor.

    step: steps done.  data: position in the stream.  optimizer_steps: Adam's counts, by engine.  task, layout,
    optimizer, trainable: of the run that saved.  tokenizer: see `train.checkpoints.tokenizer`.  architecture: settings
    that weights depend on, by key.  Both are empty in checkpoints that are older.  extra: what guards and counters want
    to find again, as JSON.
    """

    step: int
    data: dict
    optimizer_steps: dict[str, int]
    task: str
    layout: dict[str, int] = field(default_factory=dict)
    extra: dict = field(default_factory=dict)
    optimizer: str = "adamw"
    trainable: list[str] = field(default_factory=list)
    tokenizer: dict[str, str] = field(default_factory=dict)
    architecture: dict = field(default_factory=dict)


def layout_of(layout: Layout) -> dict[str, int]:
    """The sizes of a layout, as a checkpoint records them."""
    return {key: getattr(layout, key) for key in ("world", "tp", "cp", "pp", "vpp", "ep", "etp")}


# ---- files ----------------------------------------------------------------------------------------------------------


def manifest_text(said: dict) -> str:
    """The manifest's one way of being written, with its digest: a reader refuses any other."""
    digest = hashlib.sha256(_canonical(said).encode()).hexdigest()
    return _canonical({**said, "digest": digest})


def _canonical(value: dict) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def task_of(recipe: str) -> str:
    """The task of a recipe from before there were tasks."""
    return recipe.removeprefix("vit_") if recipe.startswith("vit_") else "language"


def _of_today(state: dict) -> dict:
    """A manifest's state with the keys of today: before there were tasks it named its recipe."""
    if "recipe" not in state:
        return state
    return {key: value for key, value in state.items() if key != "recipe"} | {"task": task_of(state["recipe"])}


def read_manifest(path: Path) -> dict:
    """The manifest of a checkpoint.  Raises ValueError where it is missing, damaged or of another format."""
    try:
        text = (path / MANIFEST).read_text()
        said = json.loads(text)
        if said["format"] != FORMAT:
            raise ValueError(f"its format is {said['format']!r}, this version reads {FORMAT!r}")
        if text != manifest_text({key: value for key, value in said.items() if key != "digest"}):
            raise ValueError("its digest does not match what it says")
        said["state"] = TrainState(**_of_today(said["state"]))
        names = list(said["files"])
        for file, facts in said["files"].items():
            if Path(file).name != file:
                raise ValueError(f"it lists {file}, which is not a file name")
            facts["bytes"], facts["crc32"]
        for name, tensor in said["tensors"].items():
            for place, start, size in tensor["boxes"]:
                if not (0 <= place < len(names) and len(start) == len(size) == len(tensor["shape"])):
                    raise ValueError(f"a box of {name} cannot be")
            tensor["kinds"] = tuple(tensor["kinds"])
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        why = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"checkpoint {path}: {MANIFEST} cannot be used: {why}") from error
    return said


def damage(path: Path, share: int = 0, of: int = 1) -> list[str]:
    """What is wrong with a checkpoint, one sentence a file; of its files, every `of`-th from `share` on is read."""
    try:
        files = read_manifest(path)["files"]
    except ValueError as error:
        return [str(error)]
    found = ((name, _damage_of(path / name, files[name])) for name in sorted(files)[share::of])
    return [f"checkpoint {path}: {name} {what}" for name, what in found if what]


def _damage_of(file: Path, facts: dict) -> str | None:
    try:
        if (size := file.stat().st_size) != facts["bytes"]:
            return f"is {size} bytes long, not {facts['bytes']}"
        return None if crc32_of(file) == facts["crc32"] else "is damaged: its checksum is not that of the manifest"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"


# ---- folders --------------------------------------------------------------------------------------------------------


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = NAME.fullmatch(path.name)
    assert match is not None, "a path of `named`"
    return int(match[1])


def named(folder: Path) -> list[Path]:
    """Everything under `folder` that has a checkpoint's name, oldest first; unlike `checkpoints`, damaged or not."""
    return sorted(path for path in folder.glob("step-*") if NAME.fullmatch(path.name))


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints under `folder`, oldest first.  The newest is the last: no file says which, none can lie."""
    return [path for path in named(folder) if (path / MANIFEST).is_file()]


def resolve(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest one of a run or of its folder of checkpoints.

    Raises ValueError where there is none.
    """
    path = Path(path)
    for folder in (path, path / "checkpoints"):
        if (folder / MANIFEST).is_file():
            return folder
        if found := checkpoints(folder):
            return found[-1]
    raise ValueError(f"there is no checkpoint at {path}: give a run directory or a step-* folder")


def run_directory(path: Path) -> Path:
    """The run that a checkpoint belongs to."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


# ---- reading --------------------------------------------------------------------------------------------------------


class Reader:
    """Reads boxes of tensors from one checkpoint.

    tensors: {name: {"shape", "kinds", ...}}.  Raises ValueError, naming the file or tensor, for a damaged, foreign or
    incomplete checkpoint; checksums are `damage`'s to compare, not this one's.
    """

    def __init__(self, path: Path):
        self.path = path
        self._open: dict[str, object] = {}
        self._mapped = 0
        manifest = read_manifest(path)
        self.state: TrainState = manifest["state"]
        self.tensors: dict[str, dict] = manifest["tensors"]
        self._files = list(manifest["files"])
        for file, facts in manifest["files"].items():
            if not (path / file).is_file() or (path / file).stat().st_size != facts["bytes"]:
                raise ValueError(f"checkpoint {path}: {file} is missing or not {facts['bytes']} bytes long")

    def read(self, name: str, kind: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """The box of `size` at `start` of a global tensor, fp32 on the CPU."""
        tensor = self.tensors.get(name)
        if tensor is None or kind not in tensor["kinds"]:
            raise ValueError(f"checkpoint {self.path} has no {kind} of {name}")
        shape = tensor["shape"]
        if len(shape) != len(size) or any(s + n > whole for s, n, whole in zip(start, size, shape, strict=True)):
            raise ValueError(f"checkpoint {self.path}: {name} has shape {shape}, the model wants {size} from {start}")
        out, filled = torch.empty(size), torch.zeros(size, dtype=torch.bool)
        for file, corner, extent in tensor["boxes"]:
            low = [max(a, b) for a, b in zip(start, corner, strict=True)]
            high = [min(a + n, b + m) for a, n, b, m in zip(start, size, corner, extent, strict=True)]
            if any(lo >= hi for lo, hi in zip(low, high, strict=True)):
                continue
            there = tuple(slice(lo - b, hi - b) for lo, hi, b in zip(low, high, corner, strict=True))
            here = tuple(slice(lo - a, hi - a) for lo, hi, a in zip(low, high, start, strict=True))
            out[here] = self._slice(self._files[file], box_key(name, kind, corner), there)
            filled[here] = True
        if not filled.all():
            raise ValueError(f"checkpoint {self.path}: {kind} of {name} is not complete")
        return out

    def numel(self, name: str) -> int:
        return math.prod(self.tensors[name]["shape"])

    def whole(self, name: str, kind: str = "param") -> torch.Tensor:
        """One global tensor."""
        shape = tuple(self.tensors[name]["shape"]) if name in self.tensors else ()
        return self.read(name, kind, (0,) * len(shape), shape)

    @property
    def modules(self) -> set[str]:
        """First words of the tensors' names: encoder, adapter, llm, text ..."""
        return {name.split(".")[0] for name in self.tensors}

    def random_state(self, rank: int) -> dict[str, torch.Tensor]:
        """The random states that a rank saved."""
        return self._keyed(file_of(rank), RANDOM)

    def task_tensors(self) -> dict[str, torch.Tensor]:
        """What the task keeps besides weights, as `Saver.save` got it."""
        return self._keyed(file_of(0), TASK)

    def _keyed(self, file: str, prefix: str) -> dict[str, torch.Tensor]:
        try:
            handle = self._handle(file)
            keys = [key for key in handle.keys() if key.startswith(prefix)]  # noqa: SIM118  (it is no mapping)
            return {key.removeprefix(prefix): handle.get_tensor(key) for key in keys}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {self.path}: {file} is damaged: {error}") from error

    def _slice(self, file: str, key: str, where: tuple[slice, ...]) -> torch.Tensor:
        try:
            if self._mapped > MAPPED:
                self._open.clear()
                self._mapped = 0
            values = self._handle(file).get_slice(key)[where]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"checkpoint {self.path}: {file} is damaged: {error}") from error
        self._mapped += values.nbytes
        return values

    def _handle(self, file: str):
        if file not in self._open:
            self._open[file] = safe_open(self.path / file, framework="pt")
        return self._open[file]


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def box_key(name: str, kind: str, corner: Collection[int]) -> str:
    """Key of a box in its file."""
    return f"{name}/{kind}/{','.join(map(str, corner))}"


# ---- into the engines -----------------------------------------------------------------------------------------------


def load(reader: Reader, engines: "Engines", *, optimizer: bool, modules: Collection[str] | None = None) -> list[str]:
    """Takes weights of `modules`, and with `optimizer` Adam's moments and counts, into the engines (collective).

    modules: None for all that the checkpoint and the engines share.  Returns those taken.
    Raises ValueError where the two have no module in common, where one that is named is missing, where tensors are not
    those of the model, and where moments are asked for that were not saved, as from a stage that froze the module.
    """
    wanted = _modules_of(engines) if modules is None else set(modules)
    taken = wanted & reader.modules
    if missing := wanted - taken if modules is not None else set() if taken else wanted:
        raise ValueError(
            f"checkpoint {reader.path} of task={reader.state.task} has no {', '.join(sorted(missing))}; it has "
            f"{', '.join(sorted(reader.modules))}: see checkpoint.load_modules"
        )
    _compare(reader, engines, taken)
    parts_of = {name: taken & set(_parts_of(name, engine)) for name, engine in engines.by_name.items()}
    for name, engine in engines.by_name.items():
        moments = optimizer and engine.trainable and parts_of[name]
        if moments and reader.state.optimizer_steps.get(name) is None:
            raise ValueError(
                f"checkpoint {reader.path} has no optimizer state of the {name}, which its run froze; "
                f"set checkpoint.load_optimizer=false to start with fresh moments"
            )
    for name, engine in engines.by_name.items():
        if name == "encoder" and parts_of[name]:
            encoder = cast("EncoderEngine", engine)
            encoder.load(reader.read, optimizer, parts_of[name], lambda tensor: EMA in reader.tensors[tensor]["kinds"])
        elif parts_of[name]:
            has = lambda tensor, of=name: f"{of}.{tensor}" in reader.tensors  # noqa: E731
            read = lambda tensor, *box, of=name: reader.read(f"{of}.{tensor}", *box)  # noqa: E731
            cast("LLMEngine", engine).load(read, optimizer, has=has)
        if optimizer and engine.trainable and parts_of[name]:
            engine.optimizer_steps = reader.state.optimizer_steps[name]
    return sorted(taken)


def _compare(reader: Reader, engines: "Engines", taken: set[str]) -> None:
    """Raises ValueError on all ranks where one of them finds a tensor of the taken modules that is not the model's
    (collective)."""
    wrong = next(_differences(reader, engines, taken), None)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, wrong)
    if sentence := next(filter(None, found), None):
        raise ValueError(f"checkpoint {reader.path}: {sentence}")


def _differences(reader: Reader, engines: "Engines", taken: set[str]) -> Iterator[str]:
    layers, experts = (_counted(reader, word) for word in ("decoder.layers", "local_experts"))
    for name, engine in engines.by_name.items():
        prefix = "" if name == "encoder" else f"{name}."
        model = {prefix + tensor: list(shape) for tensor, shape in engine.shapes().items()}
        model = {tensor: shape for tensor, shape in model.items() if tensor.split(".")[0] in taken}
        for tensor, shape in model.items():
            there = reader.tensors.get(tensor, {}).get("shape")
            if there is None and ROUTER_BIAS.fullmatch(tensor):
                continue  # it begins at zero
            if there != shape:
                yield f"{tensor} has shape {there}, in this model {shape}" if there else f"it has no {tensor}"
        if name == "encoder":  # every rank holds all of its tensors
            mine = taken & set(_parts_of(name, engine))
            if more := sorted(t for t in reader.tensors if t.split(".")[0] in mine and t not in model):
                yield f"it has {more[0]}, which this model lacks"
        elif name in taken:
            model_config = cast("LLMEngine", engine).config
            for what, count, here in (
                ("layers", layers, model_config.num_layers),
                ("experts", experts, model_config.num_moe_experts or 0),
            ):
                if count != here:
                    yield f"its {name} has {count} {what}, this model {here}"
            for bias in sorted(tensor for tensor in reader.tensors if ROUTER_BIAS.fullmatch(tensor)):
                if not getattr(model_config, bias.rpartition(".")[2]):
                    yield f"it has {bias}, which this model lacks: see model.llm.expert_bias and model.llm.balance"


def _counted(reader: Reader, word: str) -> int:
    """How many of something that tensors of the LLM count, as in decoder.layers.3."""
    pattern = re.compile(rf"llm\..*?{re.escape(word)}\.(\d+)\.")
    return 1 + max((int(match[1]) for match in map(pattern.match, reader.tensors) if match), default=-1)


def _parts_of(name: str, engine) -> list[str]:
    """The modules that an engine holds: the encoder's parts, and any other engine as a whole."""
    return engine.part_names if name == "encoder" else [name]


def _modules_of(engines: "Engines") -> set[str]:
    return {part for name, engine in engines.by_name.items() for part in _parts_of(name, engine)}


def restore_random(reader: Reader, engines: "Engines") -> bool:
    """Sets this rank's random states to those saved, if the layout is the one that saved them."""
    same = reader.state.layout == layout_of(engines.grid.layout)
    if same:
        random_state.restore(reader.random_state(engines.grid.rank))
    return same
