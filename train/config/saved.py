"""The settings that a run was started with, from what it wrote down."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tandem.train.checkpoints import checkpoint
from tandem.train.config.schema import Config
from tandem.train.config.settings import RECIPES


def saved_settings(path: Path) -> DictConfig:
    """The settings of the run that wrote a checkpoint, with the keys of today.

    Raises ValueError, naming the file, where there are none or they cannot be used.
    """
    saved = checkpoint.run_directory(path) / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"{saved} is missing: the settings of the run that wrote {path} are needed")
    try:
        said = cast(DictConfig, OmegaConf.load(saved))
        return cast(DictConfig, OmegaConf.merge(OmegaConf.structured(Config), *_defaults(), _of_today(said)))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{saved} cannot be used: {str(error).splitlines()[0]}") from error


def _defaults() -> Iterator[DictConfig]:
    """Values of settings that are newer than a run, and so missing in what it wrote down."""
    for group, name in (("parallel", "default"), ("optim", "adamw")):
        yield OmegaConf.create({group: OmegaConf.load(RECIPES / group / f"{name}.yaml")})


def _of_today(saved: DictConfig) -> DictConfig:
    """A run's settings with the keys of today: before there were tasks they named a recipe."""
    if "recipe" in saved:
        label = saved.pop("recipe")
        saved.task = checkpoint.task_of(label)
        saved.run.label = label
    return saved
