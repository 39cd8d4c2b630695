"""Top-level functions that test worlds run."""

from pathlib import Path

import torch
import torch.distributed as dist

from tests.support import settings
from train import checkpoint
from train.build import open_data
from train.loop import run_in_world


def train_run(recipe: str, overrides: list[str], run_dir: str) -> None:
    """One whole training run in a world that exists."""
    config = settings(recipe, f"run.dir={run_dir}", "logger.wandb=disabled", "logger.peak_tflops=1", *overrides)
    layout = config.check(dist.get_world_size())
    start = config.checkpoint.load_from and checkpoint.Reader(checkpoint.resolve(Path(config.checkpoint.load_from)))
    run_in_world(config, layout, open_data(config), start, torch.device("cpu"))
