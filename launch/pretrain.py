"""Trains one stage:  torchrun --nproc-per-node 8 launch/pretrain.py +recipe=stage2 scale=toy parallel.pp=2

Every key of `recipes/` can be set on the command line; `--help` lists the groups, `--cfg job` prints the settings.
Exit codes of a rank: 0 finished, 85 stopped on request with a checkpoint, anything else failed.
"""

import argparse
import os
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from yaml.error import MarkedYAMLError

from train.feed import AgreedError
from train.settings import RECIPES, composed, one_sentence, ranked, read_config
from train.stopping import STOPPED


@hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="config")
def main(settings: DictConfig) -> None:
    from train.loop import run

    try:
        status = run(read_config(ranked(settings, HydraConfig.get().overrides.task)))
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")
    if status == "stopped":
        sys.exit(STOPPED)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what Hydra would print in many lines
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c")
    asked, overrides = parser.parse_known_args()
    try:
        if asked.cfg == "job":  # Hydra would answer without the order of precedence
            print(OmegaConf.to_yaml(composed(overrides)), end="")
        else:
            main()
    except (CompactHydraException, MarkedYAMLError) as error:
        sys.exit(f"error: {one_sentence(error)}")
