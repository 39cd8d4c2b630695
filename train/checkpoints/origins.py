"""Sources of a run's initial weights: `checkpoint.load_from` overrides `model.*.folder`.

checkpoint.load_from=runs/a                                   the parts that both have, or checkpoint.load_modules
checkpoint.load_from='{encoder: runs/a, llm: /models/qwen3}'  each part from its own path
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from tandem.data.media.text import Tokenizer
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.train import families
from tandem.train.checkpoints import checkpoint
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.checkpoints.saving import Saver, verify_together
from tandem.train.config.architecture import check_architecture
from tandem.train.config.schema import Config
from tandem.train.config.settings import resumed_config
from tandem.train.families import connectors, encoders
from tandem.train.families.folder import Folder
from tandem.train.families.vocabulary import GrownFolder
from tandem.train.models.connectors import between
from tandem.train.tasks import find
from tandem.train.tasks.base import Engines


@dataclass(frozen=True)
class Origin:
    """A source and the setting that names it.  parts: loaded from it; None for all that both have."""

    setting: str
    source: Reader | Folder | GrownFolder
    parts: list[str] | None

    def load(self, config: Config, engines: Engines, saver: Saver) -> list[str]:
        """Load the weights into the engines (collective).  Return the loaded parts."""
        if not isinstance(self.source, Reader):
            assert self.parts is not None, "a folder has one part"
            self._load_folder(self.parts[0], self.source, engines, saver)
            return self.parts
        if wrong := verify_together(self.source.path, engines):
            raise ValueError(f"{self.setting}: {'; '.join(wrong)}")
        optimizer = config.checkpoint.load_optimizer
        loaded = checkpoint.load(self.source, engines, optimizer=optimizer, modules=self.parts)
        saver.keep_frozen(self.source.read, loaded)
        return loaded

    def grown(self, tokenizer: Tokenizer, width: int) -> "Origin":
        """Return the origin with a row of the LLM's vocabulary for each token that was added to the tokenizer."""
        if not isinstance(self.source, Folder) or self.parts != ["llm"]:
            return self
        rows = families.settings_of(self.source.path)["vocab_size"]
        added = range(tokenizer.known, tokenizer.vocab_size) if tokenizer.added else range(0)
        return replace(self, source=GrownFolder(self.source, rows, width, tokenizer.known, added))

    def _load_folder(self, part: str, folder: Folder | GrownFolder, engines: Engines, saver: Saver) -> None:
        def read(name: str, *box: Any) -> torch.Tensor:
            return folder.read(name.removeprefix(f"{part}."), *box)

        if part == "llm":
            cast(LLMEngine, engines.by_name["llm"]).load(read, optimizer=False, has=folder.has)
        else:
            cast(EncoderEngine, engines.by_name["encoder"]).load(read, optimizer=False, parts={part})
        saver.keep_frozen(read, [part])


def open_origins(config: Config) -> list[Origin]:
    """Return the origins of a run's initial weights, in load order; later origins override earlier ones.

    Empty for a resumed run.  Raises ValueError for an origin that cannot be opened, and for a checkpoint of another
    architecture.
    """
    task, model, wanted = find(config.task), config.model, config.checkpoint
    found: list[Origin] = []
    if resumed_config(config) is not None:
        return found
    if model.encoder.folder:
        folder = encoders.open_folder(model.encoder.folder, model.encoder)
        found.append(Origin("model.encoder.folder", folder, ["encoder"]))
    if task.has_llm and model.connector.folder:
        _, sizes, _ = between(model.encoder, model.connector, model.llm.width)
        opened = connectors.open_folder(model.connector.folder, model.connector, sizes)
        found.append(Origin("model.connector.folder", opened, ["adapter"]))
    if task.has_llm and model.llm.folder:
        found.append(Origin("model.llm.folder", families.open_folder(model.llm), ["llm"]))
    if not wanted.load_from:
        return found
    if isinstance(wanted.load_from, str):
        found.append(_origin(config, "checkpoint.load_from", wanted.load_from, wanted.load_modules))
        return found
    parts_of: dict[str, list[str]] = {}
    for part, path in wanted.load_from.items():
        parts_of.setdefault(path, []).append(part)
    for path, parts in parts_of.items():
        found.append(_origin(config, f"checkpoint.load_from.{parts[0]}", path, parts))
    return found


def _origin(config: Config, key: str, path: str, parts: list[str] | None) -> Origin:
    task = find(config.task)
    if task.has_llm and (Path(path) / "config.json").is_file():
        if others := [part for part in parts or () if part != "llm"]:
            raise ValueError(f"{key}={path}: a folder of Hugging Face gives the llm, not {', '.join(others)}")
        folder = families.open_folder(replace(config.model.llm, folder=path), key)
        return Origin(f"{key}={path}", folder, ["llm"])
    reader = Reader(checkpoint.resolve(path))
    shared = [part for part in task.parts if part in reader.modules]
    check_architecture(config, reader.state.architecture, parts or shared, reader.path)
    return Origin(f"{key}={path}", reader, parts)


def describe_origins(origins: list[Origin], loaded: list[list[str]], parts: tuple[str, ...]) -> str | None:
    """One line that names the source of each part.  None if all parts are randomly initialised."""
    if not origins:
        return None
    source_of: dict[str, str] = {}
    for origin, names in zip(origins, loaded, strict=True):
        source = str(origin.source.path) if isinstance(origin.source, Reader) else origin.source.description
        source_of |= dict.fromkeys(names, source)
    by_source: dict[str, list[str]] = {}
    for part in parts:
        by_source.setdefault(source_of.get(part, ""), []).append(part)
    random = by_source.pop("", [])
    sentences = [f"{', '.join(names)} from {source}" for source, names in by_source.items()]
    return "; ".join(sentences + [f"randomly initialised: {', '.join(random)}"] * bool(random))
