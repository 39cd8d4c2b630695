"""Trains one stage:  torchrun --nproc-per-node 8 launch/pretrain.py +recipe=stage2 scale=toy parallel.pp=2

Every key of `recipes/` can be set on the command line; `--help` lists the groups, `--cfg job` prints the settings.
Exit codes of a rank: 0 finished, 85 stopped on request with a checkpoint, anything else failed.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from train.config import Config
from train.feed import AgreedError
from train.stopping import STOPPED

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# Names alone: `read_config` checks types. A typed dictionary would not take +data.sources.NAME.shards=[...].
ConfigStore.instance().store(name="schema", node=OmegaConf.to_container(OmegaConf.structured(Config)))


def read_config(settings: DictConfig) -> Config:
    """Typed settings of a composed configuration.

    Raises ValueError where a setting is missing, unknown (Hydra lets +key=value through) or of a wrong type.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(Config, OmegaConf.to_container(settings, resolve=True)))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is missing; choose a recipe, as in +recipe=stage1") from error
    except OmegaConfBaseException as error:
        raise ValueError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def one_sentence(error: CompactHydraException) -> str:
    """What Hydra says about a bad override, without its search path and its advice to add unknown keys."""
    said = f"{error}".partition("Config search path")[0] + "\n" + f"{error.__cause__ or ''}".partition("full_key")[0]
    return " ".join(" ".join(line for line in said.splitlines() if not line.startswith("To append")).split())


@hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="config")
def main(settings: DictConfig) -> None:
    from train.loop import run

    try:
        status = run(read_config(settings))
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")
    if status == "stopped":
        sys.exit(STOPPED)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what Hydra would print in many lines
    try:
        main()
    except CompactHydraException as error:
        sys.exit(f"error: {one_sentence(error)}")
