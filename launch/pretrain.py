"""Trains one stage:  torchrun --nproc-per-node 8 launch/pretrain.py +recipe=stage2 scale=toy parallel.pp=2

Every key of `recipes/` can be set on the command line; `--help` lists the groups, `--cfg job` prints the settings.
"""

import sys

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from train.config import Config
from train.feed import AgreedError

ConfigStore.instance().store(name="schema", node=Config)


def read_config(settings: DictConfig) -> Config:
    """Typed settings of a composed configuration.  Raises ValueError where a setting is missing or has a wrong type."""
    try:
        return OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0] + "; is a recipe chosen, as in +recipe=stage1?") from error


@hydra.main(version_base="1.3", config_path="../recipes", config_name="config")
def main(settings: DictConfig) -> None:
    from train.loop import run

    try:
        run(read_config(settings))
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
