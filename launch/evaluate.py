"""Scores a checkpoint on held-out shards, with the right images and, as a control, with exchanged ones:

    python launch/evaluate.py RUN data.sources.main.shards='[shards/toy/heldout/read-0000.tar]'

RUN is a run directory or one of its checkpoints; settings come from the run's config.yaml and can be overridden by
key=value.  Runs in one process, or under torchrun in any layout with cp = 1.  Prints a table and writes
evaluation.json into the run directory.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console
from rich.table import Table
from yaml import YAMLError

from launch.pretrain import read_config
from train import checkpoint
from train.config import Config
from train.feed import AgreedError

RESULT = "evaluation.json"
ONE_PROCESS = ("tp", "pp", "vpp", "ep", "cp")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run directory or checkpoint")
    parser.add_argument("overrides", nargs="*", help="settings as key=value, as in data.sources.main.shards='[a.tar]'")
    parser.add_argument("--at-least", type=float, default=0.0, help="exact match over all that fails the command below")
    parser.add_argument("--exchanged-at-most", type=float, default=1.0, help="the same, above, with exchanged images")
    arguments = parser.parse_args(argv)
    try:
        scores = report(arguments.run, arguments.overrides)
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")
    right, exchanged = (scores[kind]["all"]["exact_match"] for kind in ("images", "exchanged images"))
    if right < arguments.at_least or exchanged > arguments.exchanged_at_most:
        sys.exit(
            f"error: exact match {right:.1%} (at least {arguments.at_least:.1%} wanted), with exchanged images "
            f"{exchanged:.1%} (at most {arguments.exchanged_at_most:.1%} wanted)"
        )


def report(run: str, overrides: list[str]) -> dict:
    """Evaluates and returns {"images": scores, "exchanged images": scores}, printed and written by rank 0."""
    path = checkpoint.resolve(run)
    config = settings_of(path, overrides)
    scores = evaluate_checkpoint(config, path)
    if int(os.environ.get("RANK", "0")) == 0:
        target = run_directory(path) / RESULT
        shards = {name: source.shards for name, source in config.data.sources.items()}
        target.write_text(json.dumps({"checkpoint": str(path), "shards": shards, **scores}, indent=2) + "\n")
        Console().print(table(scores))
        left_out = {key: scores["images"]["all"][key] for key in ("unreadable", "refused")}
        if any(left_out.values()):
            print(f"not scored: {left_out['unreadable']} unreadable samples, {left_out['refused']} longer than a row")
        print(f"written to {target}")
    return scores


def run_directory(path: Path) -> Path:
    """The run that a checkpoint belongs to."""
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent


def settings_of(path: Path, overrides: list[str]) -> Config:
    """A run's settings with overrides, in one process unless they name a layout.

    Raises ValueError for an unknown key.
    """
    saved = run_directory(path) / "config.yaml"
    if not saved.is_file():
        raise ValueError(f"{saved} is missing: the settings of the run that wrote {path} are needed")
    try:
        settings = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.load(saved))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"{saved} cannot be used: {str(error).splitlines()[0]}") from error
    for key in ONE_PROCESS:
        settings.parallel[key] = 1
    settings.parallel.etp = settings.parallel.balance_group_size = None
    _score_once(settings.data.sources, overrides)
    try:
        settings.merge_with_dotlist(overrides)
    except Exception as error:
        raise ValueError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    return read_config(settings)


def _score_once(sources: DictConfig, overrides: list[str]) -> None:
    """Leaves only the sources whose shards are named anew, if any are, and no mixture: each sample is scored once."""
    named = {match[1] for override in overrides if (match := re.match(r"data\.sources\.(\w+)\.shards=", override))}
    for name in list(sources):
        if named and name not in named:
            del sources[name]
            continue
        source = sources[name]
        source.weight = source.max_samples = source.entity_cap = None
        source.repeat, source.rare_domain_copies = 1.0, 1


def evaluate_checkpoint(config: Config, path: Path) -> dict:
    """Loads the weights of a checkpoint and scores them both ways."""
    from train.build import build_engines, local_device, open_data, start_world
    from train.evaluation import answer_forward, answer_report, evaluate

    layout = config.check(int(os.environ.get("WORLD_SIZE", "1")))
    if layout.cp > 1:
        raise ValueError(f"parallel.cp={layout.cp}: evaluation needs whole rows, set parallel.cp=1")
    config.train.trainable = []  # forwards only: no gradients, no optimizer
    data, reader, device = open_data(config), checkpoint.Reader(path), local_device()
    start_world(device)
    engines = build_engines(config, layout, device, forward=answer_forward, loss=answer_report)
    checkpoint.load(reader, engines, optimizer=False)
    scores = {
        "images": evaluate(config, engines, data, exchanged=False),
        "exchanged images": evaluate(config, engines, data, exchanged=True),
    }
    data.reader.close()
    dist.destroy_process_group()
    return scores


def table(scores: dict) -> Table:
    """Exact match and loss by domain, side by side."""
    rows = Table("domain", "samples", "exact match", "exact match, exchanged", "loss", "loss, exchanged")
    right, wrong = scores["images"], scores["exchanged images"]
    for name in right:
        rows.add_row(
            name,
            str(right[name]["samples"]),
            f"{right[name]['exact_match']:.1%}",
            f"{wrong[name]['exact_match']:.1%}",
            f"{right[name]['loss']:.4f}",
            f"{wrong[name]['loss']:.4f}",
        )
    return rows


if __name__ == "__main__":
    main()
