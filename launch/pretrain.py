"""Trains one stage:  torchrun --nproc-per-node 8 launch/pretrain.py +recipe=stage2 scale=toy parallel.pp=2

Every key of `recipes/` can be set on the command line; `--help` lists the groups, `--cfg job` prints the settings.
`--multirun optim.lr=1e-3,3e-3` trains one run after the other, in one process each.
Exit codes of a rank: 0 finished, 85 stopped on request with a checkpoint, anything else failed.
"""

import argparse
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml.error import MarkedYAMLError

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.train.config.settings import RECIPES, composed, one_sentence, ranked, read_config
from tandem.train.input.prefetcher import AgreedError
from tandem.train.reliability.stopping import STOPPED


@hydra.main(version_base="1.3", config_path=str(RECIPES), config_name="config")
def train(settings: DictConfig) -> None:
    from tandem.train.loop import run

    try:
        status = run(read_config(ranked(settings, HydraConfig.get().overrides.task)))
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")
    if status == "stopped":
        sys.exit(STOPPED)


def main() -> int:
    """Trains as the command line says."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise what Hydra would print in many lines
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--multirun", "-m", action="store_true")
    asked, words = parser.parse_known_args()
    try:
        if any(word.startswith("hydra.mode=") for word in words):
            raise ValueError("hydra.mode: use --multirun to train several runs")
        if asked.multirun:
            return sweep(words, asked.cfg)
        if asked.cfg == "job":  # Hydra would answer without the order of precedence
            print(OmegaConf.to_yaml(composed(words)), end="")
        else:
            train()
    except ValueError as error:
        sys.exit(f"error: {error}")
    except (HydraException, MarkedYAMLError) as error:
        sys.exit(f"error: {one_sentence(error)}")
    return 0


def sweep(words: list[str], cfg: str | None) -> int:
    """Trains a run for each combination of values, up to the first that does not finish; its exit code.

    Each has a process of its own, as DeepSpeed and Megatron-core keep the process groups of a world for good.
    Raises ValueError, or Hydra's exceptions, before the first run, where one of them cannot be composed.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("--multirun starts its runs itself, each on one rank: leave torchrun out")
    if flags := [word for word in words if word.startswith("-")] + ["--cfg"] * (cfg is not None):
        raise ValueError(f"--multirun takes settings alone, not {flags[0]}")
    jobs = jobs_of(words)
    for number, job in enumerate(jobs, 1):
        print(f"run {number} of {len(jobs)}: {' '.join(job)}", flush=True)
        if code := run_job(job):
            return code
    return 0


def jobs_of(words: list[str]) -> list[list[str]]:
    """The settings of each run; directories and names that all would share get the run's number."""
    parsed = OverridesParser.create().parse_overrides(words)
    values = []
    for word, one in zip(words, parsed, strict=True):
        sweeps = one.is_sweep_override()
        if sweeps and not (one.is_choice_sweep() or one.is_range_sweep()):
            raise ValueError(f"{word}: --multirun takes lists, as in a=1,2, and range(...)")
        key = word.partition("=")[0]  # with the + of a new one
        values.append([f"{key}={value}" for value in one.sweep_string_iterator()] if sweeps else [word])
    jobs = []
    for number, job in enumerate(itertools.product(*values), 1):
        settings = composed(job)
        own = [(key, OmegaConf.select(settings, key)) for key in ("run.dir", "run.name", "checkpoint.dir")]
        jobs.append([*job, *(f"{key}='{value}-{number}'" for key, value in own if value)])
    return jobs


def run_job(words: list[str]) -> int:
    """One run in a process of its own, to which requests to stop are passed on; its exit code."""
    program = ["-m", __spec__.name] if __package__ else [__file__]
    child = subprocess.Popen([sys.executable, *program, *words])
    before = {
        signal.SIGINT: signal.signal(signal.SIGINT, signal.SIG_IGN),  # a terminal sends it to both
        **{
            number: signal.signal(number, lambda number, _: child.send_signal(number))
            for number in (signal.SIGTERM, signal.SIGUSR1)
        },
    }
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
