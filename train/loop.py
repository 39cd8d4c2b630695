"""The training loop: load, step, log, save.

`run` is what launch/pretrain.py calls on every rank; `train` is the loop itself.
"""

import gc
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.hybrid_step import StepOutput
from parallel.layout import Layout
from parallel.phases import PhaseTimer
from train import checkpoint, guards, watchdog
from train.batch import context_sentence
from train.build import local_device, start_world
from train.config import Config
from train.dataset import Data, open_data
from train.feed import AgreedError
from train.health import Health
from train.metrics import Logger, StepMetrics
from train.saving import Saver
from train.schedule import learning_rate
from train.start import Places, Position, agree_on_places, go_back, restore
from train.stopping import end_launcher, follow_launcher, stop_wish
from train.tasks import find
from train.tasks.base import Trainer
from train.watchdog import Heartbeat

COLLECT_EVERY = 50  # steps between garbage collections, on all ranks at once


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: Config
    trainer: Trainer
    data: Data
    places: Places
    saver: Saver
    logger: Logger
    heartbeat: Heartbeat


def run(config: Config) -> str:
    """Sets up one run on this rank and trains it to the end; returns how it ended, "finished" or "stopped".

    Raises ValueError, before the world starts, for settings or data that cannot work.
    """
    layout = config.check(int(os.environ.get("WORLD_SIZE", "1")))
    launcher = follow_launcher()
    with watchdog.watch(config.watchdog.timeout_s, config.watchdog.patience_s) as heartbeat:
        find(config.task).check_folders(config)
        data = open_data(config)
        load_from = config.checkpoint.load_from
        start = checkpoint.Reader(checkpoint.resolve(load_from)) if load_from else None
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = local_device()
        start_world(device)
        status = run_in_world(config, layout, data, start, device, heartbeat)
        if status == "stopped":
            end_launcher(launcher)
            dist.barrier()  # no rank ends before every torchrun knows that it is meant
        dist.destroy_process_group()  # after success alone: NCCL's waits for ranks that may be in another collective
    return status


def run_in_world(
    config: Config,
    layout: Layout,
    data: Data,
    start: checkpoint.Reader | None,
    device: torch.device,
    heartbeat: Heartbeat,
) -> str:
    """The run itself, in a world that has started (collective); returns how it ended."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    places = agree_on_places(config)
    heartbeat.place(places.run_dir, places.attempt)
    heartbeat.beat("build")
    trainer = find(config.task).trainer(config, layout, device, data)
    saver = Saver(
        places.folder,
        trainer.engines,
        task=config.task,
        trainable=config.train.trainable,
        optimizer=config.optim.name,
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    heartbeat.beat("restore")
    position, told = restore(config, trainer, data, start, saver, places)
    logger = Logger(config, places, trainer.engines.grid.rank, position)
    logger.say(
        f"{config.label} at {config.scale['name']} scale on {layout.world} ranks, run directory {places.run_dir}"
    )
    if layout.cp > 1:
        told = [context_sentence(config, layout), *told]
    for name, engine in trainer.engines.by_name.items():
        if engine.trainable:
            logger.say(f"{name} is updated by {engine.optimizer_name}")
    for sentence in told:
        logger.say(sentence)
    status = train(Run(config, trainer, data, places, saver, logger, heartbeat), position)
    data.reader.close()
    return status


def train(run: Run, position: Position) -> str:
    """Trains from `position` to train.steps, saving checkpoints on the way; returns "finished" or "stopped".

    A wish to stop ends it after the same step on all ranks; what ends the feed on all ranks (AgreedError) does too, and
    is raised once the steps so far are saved.  Steps that the guards refuse are skipped on all ranks; too many of them
    send the run back to its last checkpoint.
    """
    config, trainer, saver, logger, heartbeat = run.config, run.trainer, run.saver, run.logger, run.heartbeat
    grid = trainer.engines.grid
    metrics = StepMetrics(config, grid)
    timer = PhaseTimer(grid.device, begins=heartbeat.beat)
    health = Health(run.places.folder, grid.device)
    step, saved, data, record = position.step, position.step, position.data, position.record
    staging, failure = trainer.steps(config.train.steps - step), None
    with stop_wish() as stop, _quiet_collector():
        begin = time.perf_counter()
        while True:
            try:
                with timer.phase("wait"):
                    prepared, batch = next(staging)
            except StopIteration:
                break
            except AgreedError as error:
                logger.unreadable(error.skipped)
                failure = error
                break
            lr = _set_lr(run, step)
            output = _step(run, batch, record, timer, stop.is_set())
            if not output.applied:
                _tell_skipped(run, step, batch, record, output, timer)
            batch = None  # gone before the copy after the next begins: two lie on the device, not three
            record = guards.after(config.guard, record, output.loss, output.grad_norm, output.applied)
            prepared.release()
            logger.unreadable(prepared.skipped)
            heartbeat.beat("metrics")
            facts = trainer.facts(prepared, output)
            now, phases = time.perf_counter(), timer.take()
            logger.log(metrics.numbers(step, lr, now - begin, prepared, output, facts), phases)
            health.add(phases)
            begin, step, data = now, step + 1, prepared.plan.state_after
            heartbeat.step_done(step)
            if step % COLLECT_EVERY == 0:
                gc.collect(1)
            if config.health.every and step % config.health.every == 0:
                logger.tell_health(*health.look(config.health.slow_factor))
            if (why := guards.past_limit(config.guard, record)) and not output.stop:
                staging.drain()
                try:
                    position = _roll_back(run, why, step, data)
                except AgreedError as error:
                    failure = error
                    break
                step, saved, data, record = position.step, position.step, position.data, position.record
                staging, begin = trainer.steps(config.train.steps - step), time.perf_counter()
                continue
            if config.checkpoint.every and step % config.checkpoint.every == 0:
                _save(run, step, data, record)
                saved, begin = step, time.perf_counter()
            if sentence := saver.poll():
                logger.say(sentence)
            if output.stop:
                stop.set()
                staging.drain()
                break
        if step != saved:
            _save(run, step, data, record)
        with heartbeat.patient("save"):
            newest = saver.wait()
        if sentence := saver.poll():
            logger.say(sentence)
        status = "failed" if failure else "finished" if step == config.train.steps else "stopped"
        logger.finish(status, step, newest)
    if failure:
        raise failure
    return status


def _step(run: Run, batch, record: guards.Record, timer: PhaseTimer, stop: bool, update: bool = True) -> StepOutput:
    """One step, applied if the guards have nothing against it."""

    def accept(loss: float, norm: float) -> bool:
        return update and guards.verdict(run.config.guard, record, loss, norm) is None

    return run.trainer.step(batch, timer=timer, stop=stop, accept=accept)


def _tell_skipped(run: Run, step: int, batch, record: guards.Record, output: StepOutput, timer: PhaseTimer) -> None:
    """Records why a step was skipped and, where asked for, what computing it again says (collective)."""
    guard, first, finding = run.config.guard, (output.loss, output.grad_norm), None
    why = guards.verdict(guard, record, *first)
    if guard.replay and why:
        again = _step(run, batch, record, timer, stop=False, update=False)
        second = (again.loss, again.grad_norm)
        finding = guards.replay_finding(first, second, guards.verdict(guard, record, *second))
    run.logger.skipped(step, output, why or "nothing in it can be learnt from", finding)


def _roll_back(run: Run, why: str, step: int, data: dict) -> Position:
    """Back to the last checkpoint, with the data after this step (collective); AgreedError where that cannot help."""
    with run.heartbeat.patient("roll back"):
        run.saver.wait()
        newest, _ = run.saver.newest_valid()
        if newest is None:
            raise AgreedError(f"{why}, and there is no checkpoint to go back to; see guard.* and checkpoint.every")
        target = checkpoint.step_of(newest)
        before = sum(to_step == target for to_step, _ in run.places.rollbacks)
        if before >= run.config.guard.rollbacks:
            raise AgreedError(f"{why} after {before} rollbacks to step {target}; guard.rollbacks allows no more")
        run.places.rollbacks.append((target, data))
        position = go_back(run.config, run.trainer, run.data, newest, run.places.rollbacks)
        run.logger.rolled_back(why, step, position)
        cleared = guards.Record(position.record.losses, position.record.norms)
        return Position(position.step, position.data, cleared, newest)


def _save(run: Run, step: int, data: dict, record: guards.Record) -> None:
    with run.heartbeat.patient("save"):  # it may have to wait for the write before
        run.saver.save(step, data, {"guard": record.state()}, run.trainer.tensors())


def _set_lr(run: Run, step: int) -> float:
    optim = run.config.optim
    lr = learning_rate(
        step,
        lr=optim.lr,
        min_lr=optim.min_lr,
        warmup_steps=optim.warmup_steps,
        total_steps=run.config.train.steps,
        schedule=optim.schedule,
    )
    for engine in run.trainer.engines.by_name.values():
        engine.set_lr(lr)
    return lr


@contextmanager
def _quiet_collector():
    """No cyclic garbage collection at arbitrary moments: it would stop ranks at different times."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
