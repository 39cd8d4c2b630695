"""Where the first weights of a run come from: `checkpoint.load_from`, which replaces what folders of the model give.

checkpoint.load_from=runs/a                                   all that both have, or checkpoint.load_modules
checkpoint.load_from='{encoder: runs/a, llm: /models/qwen3}'  each part from its own place
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
from tandem.train.config.settings import resumed
from tandem.train.families import connectors, encoders
from tandem.train.families.folder import Folder
from tandem.train.families.vocabulary import GrownFolder
from tandem.train.models.connectors import between
from tandem.train.tasks import find
from tandem.train.tasks.base import Engines


@dataclass(frozen=True)
class Origin:
    """A place and the setting that names it.  parts: taken from it; None for all that it and the model share."""

    setting: str
    source: Reader | Folder | GrownFolder
    parts: list[str] | None

    def load(self, config: Config, engines: Engines, saver: Saver) -> list[str]:
        """Takes the weights into the engines (collective); the parts that were taken."""
        if not isinstance(self.source, Reader):
            assert self.parts is not None, "a folder gives one part"
            self._load_folder(self.parts[0], self.source, engines, saver)
            return self.parts
        if wrong := verify_together(self.source.path, engines):
            raise ValueError(f"{self.setting}: {'; '.join(wrong)}")
        optimizer = config.checkpoint.load_optimizer
        taken = checkpoint.load(self.source, engines, optimizer=optimizer, modules=self.parts)
        saver.keep_frozen(self.source.read, taken)
        return taken

    def grown(self, tokenizer: Tokenizer, width: int) -> "Origin":
        """The origin with a row of the LLM's vocabulary for each token that was added to the tokenizer."""
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
    """Those of a run, later ones replacing what earlier ones gave; a run that goes on has none.

    Raises ValueError, one sentence, for what cannot be opened, and for a checkpoint of other settings.
    """
    task, model, wanted = find(config.task), config.model, config.checkpoint
    found: list[Origin] = []
    if resumed(config) is not None:
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
    places: dict[str, list[str]] = {}
    for part, place in wanted.load_from.items():
        places.setdefault(place, []).append(part)
    for place, parts in places.items():
        found.append(_origin(config, f"checkpoint.load_from.{parts[0]}", place, parts))
    return found


def _origin(config: Config, key: str, place: str, parts: list[str] | None) -> Origin:
    task = find(config.task)
    if task.has_llm and (Path(place) / "config.json").is_file():
        if others := [part for part in parts or () if part != "llm"]:
            raise ValueError(f"{key}={place}: a folder of Hugging Face gives the llm, not {', '.join(others)}")
        folder = families.open_folder(replace(config.model.llm, folder=place), key)
        return Origin(f"{key}={place}", folder, ["llm"])
    reader = Reader(checkpoint.resolve(place))
    shared = [part for part in task.parts if part in reader.modules]
    check_architecture(config, reader.state.architecture, parts or shared, reader.path)
    return Origin(f"{key}={place}", reader, parts)


def told(origins: list[Origin], taken: list[list[str]], parts: tuple[str, ...]) -> list[str]:
    """One line on where every part comes from; none where all weights are first ones."""
    if not origins:
        return []
    place_of: dict[str, str] = {}
    for origin, names in zip(origins, taken, strict=True):
        place = str(origin.source.path) if isinstance(origin.source, Reader) else origin.source.told
        place_of |= dict.fromkeys(names, place)
    by_place: dict[str, list[str]] = {}
    for part in parts:
        by_place.setdefault(place_of.get(part, ""), []).append(part)
    fresh = by_place.pop("", [])
    words = [f"{', '.join(names)} from {place}" for place, names in by_place.items()]
    return ["; ".join(words + [f"first weights: {', '.join(fresh)}"] * bool(fresh))]
