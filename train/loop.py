"""The training loop: load, step, log, save.

`run` is what launch/pretrain.py calls on every rank; `train` is the loop itself.
"""

import functools
import gc
import os
import signal
import threading
import time
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import OmegaConf

from parallel.hybrid_step import Engines, hybrid_step
from parallel.layout import Layout
from parallel.phases import PhaseTimer
from train import checkpoint
from train.build import Data, build_engines, local_device, open_data, start_world, train_forward, train_loss
from train.config import Config
from train.feed import AgreedError, Feed
from train.metrics import Logger, StepMetrics
from train.schedule import learning_rate
from train.staging import Staging

COLLECT_EVERY = 50  # steps between garbage collections, on all ranks at once


def run(config: Config) -> None:
    """Sets up one run on this rank and trains it to the end.

    Raises ValueError, before the world starts, for settings or data that cannot work.
    """
    layout = config.check(int(os.environ.get("WORLD_SIZE", "1")))
    data = open_data(config)
    start = checkpoint.Reader(checkpoint.resolve(config.checkpoint.load_from)) if config.checkpoint.load_from else None
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = local_device()
    start_world(device)
    run_in_world(config, layout, data, start, device)
    dist.destroy_process_group()  # after success alone: NCCL's waits for ranks that may be in another collective


def run_in_world(
    config: Config, layout: Layout, data: Data, start: checkpoint.Reader | None, device: torch.device
) -> Path:
    """The run itself, in a world that has started (collective); returns its directory."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    run_dir, folder, newest = _agree_on_places(config)
    loss = functools.partial(train_loss, domains=len(data.stream.domains))
    engines = build_engines(config, layout, device, forward=train_forward, loss=loss)
    first_step = _restore(config, engines, data, start, newest)
    logger = Logger(config, run_dir, engines.grid.rank, first_step)
    logger.say(f"{config.recipe} at {config.scale['name']} scale on {layout.world} ranks, run directory {run_dir}")
    train(config, engines, data, logger, first_step, folder)
    data.reader.close()
    return run_dir


def train(config: Config, engines: Engines, data: Data, logger: Logger, first_step: int, folder: Path) -> None:
    """Trains steps first_step .. train.steps - 1, saving checkpoints under `folder`.

    A wish to stop ends it after the same step on all ranks; what ends the feed on all ranks (AgreedError) does too, and
    is raised once the steps so far are saved.
    """
    metrics = StepMetrics(config, engines, data.stream.domains)
    timer = PhaseTimer(engines.grid.device)
    step, saved, position, failure = first_step, None, data.stream.state(), None
    feed = Feed(data.stream, data.reader, config, engines.grid, steps=config.train.steps - first_step)
    staging = Staging(feed, engines.grid)
    with _stop_signals() as stop, _quiet_collector():
        begin = time.perf_counter()
        while True:
            try:
                with timer.phase("wait"):
                    prepared, batch = next(staging)
            except StopIteration:
                break
            except AgreedError as error:
                failure = error
                break
            lr = _set_lr(config, engines, step)
            output = hybrid_step(
                engines,
                batch,
                clip_norm=config.optim.clip_norm,
                replay=config.parallel.encoder.recompute == "replay",
                stop=stop.is_set(),
                timer=timer,
            )
            prepared.release()
            for skipped in prepared.skipped:
                logger.say(f"skipped: {skipped.sentence}")
            now = time.perf_counter()
            logger.log(metrics.numbers(step, lr, now - begin, prepared, output), timer.take())
            begin, step, position = now, step + 1, prepared.plan.state_after
            if step % COLLECT_EVERY == 0:
                gc.collect(1)
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                saved = _save(config, engines, folder, step, position)
                begin = time.perf_counter()
            if output.stop:
                staging.drain()
                break
        if step > first_step and (saved is None or saved.name != f"step-{step:08d}"):
            saved = _save(config, engines, folder, step, position)
    status = "failed" if failure else "finished" if step == config.train.steps else "stopped"
    logger.finish(status, saved, feed.skipped)
    if failure:
        raise failure


def _set_lr(config: Config, engines: Engines, step: int) -> float:
    optim = config.optim
    lr = learning_rate(
        step,
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup_steps=optim.warmup_steps,
        total_steps=config.train.steps,
        schedule=optim.schedule,
    )
    engines.encoder.set_lr(lr)
    engines.llm.set_lr(lr)
    return lr


def _save(config: Config, engines: Engines, folder: Path, step: int, position: dict) -> Path:
    state = checkpoint.train_state(engines, step, position, config.recipe)
    return checkpoint.save(folder, engines, state, config.checkpoint.keep)


def _restore(config: Config, engines: Engines, data: Data, start, newest: Path | None) -> int:
    """Resumes from `newest` or starts from `checkpoint.load_from`; returns the first step to train."""
    if newest is not None:
        reader = checkpoint.Reader(newest)
        if reader.state.recipe != config.recipe:
            raise ValueError(
                f"checkpoint.resume=true, but {newest} is of recipe {reader.state.recipe}, not {config.recipe}; "
                "start from it with checkpoint.load_from and another run.dir"
            )
        checkpoint.load(reader, engines, optimizer=True)
        data.stream.load_state(reader.state.data)
        return reader.state.step
    if start is not None:
        checkpoint.load(start, engines, optimizer=config.checkpoint.load_optimizer)
    return 0


def _agree_on_places(config: Config) -> tuple[Path, Path, Path | None]:
    """(run directory with its config.yaml, folder of checkpoints, checkpoint to resume from): rank 0's, on all ranks.

    Raises ValueError on all of them where the directory cannot be written or belongs to another run.
    """
    agreed: list = [None]
    if dist.get_rank() == 0:
        try:
            agreed[0] = _places(config)
        except (OSError, ValueError) as error:
            agreed[0] = f"run.dir={config.run.dir}: {error}"
    dist.broadcast_object_list(agreed, src=0)
    if isinstance(agreed[0], str):
        raise ValueError(agreed[0])
    return agreed[0]


def _places(config: Config) -> tuple[Path, Path, Path | None]:
    run_dir = Path(config.run.dir or f"runs/{config.run.name or f'{config.recipe}-{datetime.now():%Y%m%d-%H%M%S}'}")
    folder = Path(config.checkpoint.dir) if config.checkpoint.dir else run_dir / "checkpoints"
    found = checkpoint.checkpoints(folder)
    if found and not config.checkpoint.resume:
        raise ValueError(f"{folder} holds checkpoints of a run; set checkpoint.resume=true or name another directory")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return run_dir, folder, found[-1] if found else None


@contextmanager
def _stop_signals():
    """An event that Ctrl-C and SIGTERM set; a second Ctrl-C interrupts at once."""
    stop = threading.Event()

    def ask(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _quiet_collector():
    """No cyclic garbage collection at arbitrary moments: it would stop ranks at different times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
