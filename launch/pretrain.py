"""Trains one stage:  torchrun --nproc-per-node 8 launch/pretrain.py +recipe=stage2 scale=toy parallel.pp=2

Every key of `recipes/` can be set on the command line; `--help` lists the groups, `--cfg job` prints the settings.
`--multirun optim.lr=1e-3,3e-3` trains one run after the other, in one process each.
Exit codes of a rank: 0 finished, 85 stopped on request with a checkpoint, anything else failed.
"""

import argparse
import itertools
import os
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf
from yaml.error import MarkedYAMLError

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.train.config.settings import RECIPES, composed, one_sentence, ranked, read_config
from tandem.train.input.prefetcher import AgreedError
from tandem.train.reliability.stopping import STOPPED


@hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="config")
def main(settings: DictConfig) -> None:
    from tandem.train.loop import run

    try:
        status = run(read_config(ranked(settings, HydraConfig.get().overrides.task)))
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")
    if status == "stopped":
        sys.exit(STOPPED)


def sweep(overrides: list[str]) -> int:
    """Trains a run for each combination of values, up to the first that does not finish; its exit code.

    Each has a process of its own, as DeepSpeed and Megatron-core keep the process groups of a world for good.
    """
    if "WORLD_SIZE" in os.environ:
        sys.exit("error: --multirun starts its runs itself, each on one rank: leave torchrun out")
    parsed = OverridesParser.create().parse_overrides(overrides)
    values = [
        [f"{one.get_key_element()}={value}" for value in one.sweep_string_iterator()]
        if one.is_sweep_override()
        else [one.input_line]
        for one in parsed
    ]
    jobs = list(itertools.product(*values))
    for number, job in enumerate(jobs, 1):
        words = [f"{word}/{number}" if word.startswith("run.dir=") else word for word in job]
        print(f"run {number} of {len(jobs)}: {' '.join(words)}", flush=True)
        done = subprocess.run([sys.executable, __file__, *words])
        if done.returncode:
            return done.returncode
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what Hydra would print in many lines
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    asked, overrides = parser.parse_known_args()
    try:
        if asked.cfg == "job":  # Hydra would answer without the order of precedence
            print(OmegaConf.to_yaml(composed(overrides)), end="")
        elif asked.multirun:
            sys.exit(sweep(overrides))
        else:
            main()
    except (CompactHydraException, MarkedYAMLError) as error:
        sys.exit(f"error: {one_sentence(error)}")
