"""Families of language models in Hugging Face's format: what `config.json` says in our settings, and which of their
tensors are which rows of ours.  `language/` has one module each.
"""

from dataclasses import replace
from pathlib import Path

from tandem.data.registry import Registry
from tandem.train.families import language
from tandem.train.families.base import Family
from tandem.train.families.folder import Folder, by_their_names, family_in, shapes, theirs
from tandem.train.models.language.llm_config import LLMConfig

__all__ = ["by_their_names", "of_folder", "of_model", "open_folder", "settings_of", "shapes", "theirs"]
FAMILIES: Registry[Family] = Registry(language.__name__, language.__path__, "FAMILY", "model_type")


def of_folder(folder: str | Path, key: str = "model.llm.folder") -> tuple[Family, dict]:
    """The family of a folder, and its `config.json`.  Raises ValueError, naming the folder, where there is none."""
    return family_in(folder, FAMILIES, key)


def settings_of(folder: str | Path, key: str = "model.llm.folder") -> dict:
    """The keys of `model.llm` that a folder decides."""
    family, said = of_folder(folder, key)
    try:
        return family.settings(said)
    except (ValueError, TypeError) as error:  # a text where a number should be
        raise ValueError(f"{key}={folder}: {error}") from error


def open_folder(config: LLMConfig, key: str = "model.llm.folder") -> Folder:
    """The weights in `config.folder`, which the setting `key` names, without tokens that the model has more
    (`train.families.vocabulary`).

    Raises ValueError where it is not a model of these settings.
    """
    assert config.folder is not None, "asked for where a folder is named"
    family, _ = of_folder(config.folder, key)
    found = settings_of(config.folder, key)
    for name, value in found.items():
        ours = getattr(config, name)
        if ours != value and not (name == "vocab_size" and ours > value):
            hint = f": leave model.llm.{name} out" if key == "model.llm.folder" else ""
            raise ValueError(f"model.llm.{name}={ours}, but {key}={config.folder} has {value}{hint}")
    try:
        return Folder(config.folder, family, replace(config, vocab_size=found["vocab_size"]))
    except ValueError as error:
        raise ValueError(f"{key}={error}") from error


def of_model(config: LLMConfig) -> Family:
    """The family that can hold this model: that of the folder it came from while there is one, else the first.

    Raises ValueError where none can.
    """
    if config.folder and Path(config.folder).is_dir():
        family, _ = of_folder(config.folder)
        if family.refusal(config) is None:
            return family
    refusals = []
    for name in FAMILIES.names():
        family = FAMILIES.find(name)
        if (why := family.refusal(config)) is None:
            return family
        refusals.append(f"{name}: {why}")
    raise ValueError(f"no family of Hugging Face holds this model: {'; '.join(refusals)}")
