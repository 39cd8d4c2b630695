"""Top-level functions that test worlds run."""

import functools

import torch
import torch.distributed as dist

from tandem.parallel.hybrid_step import hybrid_step
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.build import build_engines
from tandem.train.checkpoints.origins import open_origins
from tandem.train.config.checks import check_config
from tandem.train.input.dataset import open_data
from tandem.train.input.rows import row_prefetcher
from tandem.train.loop import run_in_world
from tandem.train.objectives.language import train_forward, train_loss
from tandem.train.reliability.watchdog import Heartbeat
from tests.support import settings


def train_run(recipe: str, overrides: list[str], run_dir: str) -> None:
    """One whole training run in a world that exists."""
    config = settings(recipe, f"run.dir={run_dir}", "logger.wandb=disabled", "logger.peak_tflops=1", *overrides)
    layout = check_config(config, dist.get_world_size())
    run_in_world(config, layout, open_data(config), open_origins(config), torch.device("cpu"), Heartbeat())


def build_run(recipe: str, overrides: list[str], steps: int):
    """(config, engines, data, prefetcher) of a run in this world, to step by hand."""
    config = settings(recipe, "logger.wandb=disabled", *overrides)
    layout = check_config(config, dist.get_world_size())
    data = open_data(config)
    loss = functools.partial(train_loss, domains=len(data.stream.domains))
    engines = build_engines(config, layout, torch.device("cpu"), forward=train_forward, loss=loss)
    return config, engines, data, row_prefetcher(data, config, engines.grid, steps=steps)


def step_by_hand(config, engines, prepared, lr: float = 1e-3):
    """One hybrid step of a prepared step; the loss is as `build_run` made it."""
    engines.encoder.set_lr(lr)
    engines.llm.set_lr(lr)
    return hybrid_step(
        engines,
        prepared.batch,
        report_shape=(2, engines.llm._loss.keywords["domains"]),
        clip_norm=config.optim.clip_norm,
        replay=config.parallel.encoder.recompute == "replay",
        stop=False,
        timer=PhaseTimer(engines.grid.device),
    )


def weights_of(engines) -> dict[str, torch.Tensor]:
    """Every weight that this rank saves, by name and place, copied."""
    chunks = [*engines.encoder.state(), *engines.llm.state()]
    return {f"{c.name}@{c.begin}/{c.pieces}": c.tensor_N.clone() for c in chunks if c.kind == "param"}


def whole_state(engine) -> dict[tuple[str, str], torch.Tensor]:
    """All weights and moments of one engine by (name, kind), put together from every rank's boxes (collective)."""
    mine = [(c.name, c.kind, c.shape, corner, values.cpu()) for c in engine.state() for corner, values in c.boxes()]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    wholes, times = {}, {}
    for name, kind, shape, corner, values in (box for part in everyone for box in part):
        where = tuple(slice(at, at + size) for at, size in zip(corner, values.shape, strict=True))
        wholes.setdefault((name, kind), torch.empty(shape))[where] = values
        times.setdefault((name, kind), torch.zeros(shape))[where] += 1
    assert all((count == 1).all() for count in times.values()), "every entry is saved once, by one rank"
    return wholes
