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

from tandem.data.dataset import Data
from tandem.parallel.hybrid_step import StepOutput
from tandem.parallel.layout import Layout
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.build import local_device, start_world
from tandem.train.checkpoints import checkpoint, tokenizer
from tandem.train.checkpoints.origins import Origin, open_origins
from tandem.train.checkpoints.saving import Saver
from tandem.train.config.architecture import architecture
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.input.batch import context_sentence
from tandem.train.input.dataset import open_data
from tandem.train.input.prefetcher import AgreedError
from tandem.train.metrics import Logger, StepMetrics
from tandem.train.reliability import guards, watchdog
from tandem.train.reliability.health import Health
from tandem.train.reliability.stopping import end_launcher, follow_launcher, stop_wish
from tandem.train.reliability.watchdog import Heartbeat
from tandem.train.schedule import learning_rate
from tandem.train.start import Position, RunPaths, agree_on_run_paths, go_back, restore
from tandem.train.tasks import find
from tandem.train.tasks.base import Trainer

COLLECT_EVERY = 50  # steps between garbage collections, on all ranks at once


@dataclass(frozen=True)
class Run:
    """What the loop works with."""

    config: Config
    trainer: Trainer
    data: Data
    paths: RunPaths
    saver: Saver
    logger: Logger
    heartbeat: Heartbeat


@dataclass
class Progress:
    """Where training stands: steps done, the last of them that is saved, where the data goes on, and what the guards
    remember."""

    step: int
    saved: int
    data: dict
    record: guards.Record

    @classmethod
    def at(cls, position: Position) -> "Progress":
        """Of a run that begins at `position`, whose steps are saved."""
        return cls(position.step, position.step, position.data, position.record)


def run(config: Config) -> str:
    """Sets up one run on this rank and trains it to the end; returns how it ended, "finished" or "stopped".

    Raises ValueError, before the world starts, for settings or data that cannot work.
    """
    layout = check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    launcher = follow_launcher()
    with watchdog.watch(config.watchdog.timeout_s, config.watchdog.patience_s) as heartbeat:
        find(config.task).check_folders(config)
        data = open_data(config)  # grows the vocabulary of an LLM of a folder
        origins = open_origins(config)
        if config.train.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        device = local_device()
        start_world(device)
        status = run_in_world(config, layout, data, origins, device, heartbeat)
        if status == "stopped":
            end_launcher(launcher)
            dist.barrier()  # no rank ends before every torchrun knows that it is meant
        dist.destroy_process_group()  # after success alone: NCCL's waits for ranks that may be in another collective
    return status


def run_in_world(
    config: Config,
    layout: Layout,
    data: Data,
    origins: list[Origin],
    device: torch.device,
    heartbeat: Heartbeat,
) -> str:
    """The run itself, in a world that has started (collective); returns how it ended."""
    torch.use_deterministic_algorithms(config.train.deterministic)
    paths = agree_on_run_paths(config)
    heartbeat.place(paths.run_dir, paths.attempt)
    heartbeat.beat("build")
    trainer = find(config.task).trainer(config, layout, device, data)
    saver = Saver(
        paths.folder,
        trainer.engines,
        task=config.task,
        trainable=config.train.trainable,
        optimizer=config.optim.name,
        tokenizer=tokenizer.identity(data.reader.tokenizer),
        architecture=architecture(config),
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
    )
    heartbeat.beat("restore")
    position, messages = restore(config, trainer, data, origins, saver, paths)
    logger = Logger(config, paths, trainer.engines.grid.rank, position)
    logger.say(f"{config.label} at {config.scale['name']} scale on {layout.world} ranks, run directory {paths.run_dir}")
    if layout.cp > 1:
        messages = [context_sentence(config, layout), *messages]
    for name, engine in trainer.engines.by_name.items():
        if engine.trainable:
            logger.say(f"{name} is updated by {engine.optimizer_name}")
    for sentence in messages:
        logger.say(sentence)
    status = train(Run(config, trainer, data, paths, saver, logger, heartbeat), position)
    data.reader.close()
    return status


def train(run: Run, position: Position) -> str:
    """Trains from `position` to train.steps, saving checkpoints on the way; returns "finished" or "stopped".

    A wish to stop ends it after the same step on all ranks; what ends the prefetchers (AgreedError) does too, and is
    raised once the steps so far are saved.  Steps that the guards refuse are skipped on all ranks; too many of them
    send the run back to its last checkpoint.
    """
    config, trainer, saver, logger, heartbeat = run.config, run.trainer, run.saver, run.logger, run.heartbeat
    grid = trainer.engines.grid
    metrics = StepMetrics(config, grid)
    timer = PhaseTimer(grid.device, begins=heartbeat.beat)
    health = Health(run.paths.folder, grid.device)
    state, failure = Progress.at(position), None
    batches = trainer.steps(_steps_left(run, state))
    with stop_wish() as stop, _quiet_collector():
        begin = time.perf_counter()
        while True:
            try:
                with timer.phase("wait"):
                    prepared, batch = next(batches)
            except StopIteration:
                break
            except AgreedError as error:
                logger.unreadable(error.skipped)
                failure = error
                break
            lr = _set_lr(run, state.step)
            output = _step(run, batch, state.record, timer, stop.is_set())
            if not output.applied:
                _tell_skipped(run, state, batch, output, timer)
            batch = None  # gone before the copy after the next begins: two lie on the device, not three
            state.record = guards.after(config.guard, state.record, output.loss, output.grad_norm, output.applied)
            prepared.release()
            logger.unreadable(prepared.skipped)
            heartbeat.beat("metrics")
            facts = trainer.facts(prepared, output)
            now, phases = time.perf_counter(), timer.take()
            logger.log(metrics.numbers(state.step, lr, now - begin, prepared, output, facts), phases)
            health.add(phases)
            begin, state.step, state.data = now, state.step + 1, prepared.plan.state_after
            heartbeat.step_done(state.step)
            if state.step % COLLECT_EVERY == 0:
                gc.collect(1)
            if config.health.every and state.step % config.health.every == 0:
                logger.tell_health(*health.look(config.health.slow_factor))
            if (why := guards.should_roll_back(config.guard, state.record)) and not output.stop:
                batches.drain()
                try:
                    state = Progress.at(_roll_back(run, why, state))
                except AgreedError as error:
                    failure = error
                    break
                batches, begin = trainer.steps(_steps_left(run, state)), time.perf_counter()
                continue
            if config.checkpoint.every and state.step % config.checkpoint.every == 0:
                _save(run, state)
                begin = time.perf_counter()
            if sentence := saver.poll():
                logger.say(sentence)
            if output.stop:
                stop.set()
                batches.drain()
                break
        if state.step != state.saved:
            _save(run, state)
        with heartbeat.patient("save"):
            newest = saver.wait()
        if sentence := saver.poll():
            logger.say(sentence)
        status = "failed" if failure else "finished" if state.step >= config.train.steps else "stopped"
        logger.finish(status, state.step, newest)
    if failure:
        raise failure
    return status


def _step(run: Run, batch, record: guards.Record, timer: PhaseTimer, stop: bool, update: bool = True) -> StepOutput:
    """One step, applied if the guards have nothing against it."""

    def accept(loss: float, norm: float) -> bool:
        return update and guards.spike_reason(run.config.guard, record, loss, norm) is None

    return run.trainer.step(batch, timer=timer, stop=stop, accept=accept)


def _steps_left(run: Run, state: Progress) -> int:
    """Says so where a run begins behind its last step, as a resumed one may whose train.steps was lowered."""
    left = run.config.train.steps - state.step
    if left <= 0:
        run.logger.say(f"nothing to train: {state.step} steps are done, and train.steps={run.config.train.steps}")
    return max(left, 0)


def _tell_skipped(run: Run, state: Progress, batch, output: StepOutput, timer: PhaseTimer) -> None:
    """Records why a step was skipped and, where asked for, what computing it again says (collective)."""
    guard, first, finding = run.config.guard, (output.loss, output.grad_norm), None
    why = guards.spike_reason(guard, state.record, *first)
    if guard.replay and why:
        again = _step(run, batch, state.record, timer, stop=False, update=False)
        second = (again.loss, again.grad_norm)
        finding = guards.replay_finding(first, second, guards.spike_reason(guard, state.record, *second))
    run.logger.skipped(state.step, output, why or "nothing in it can be learnt from", finding)


def _roll_back(run: Run, why: str, state: Progress) -> Position:
    """Back to the last checkpoint, with the data after this step (collective); AgreedError where that cannot help."""
    with run.heartbeat.patient("roll back"):
        run.saver.wait()
        newest, _ = run.saver.newest_valid()
        if newest is None:
            raise AgreedError(f"{why}, and there is no checkpoint to go back to; see guard.* and checkpoint.every")
        target = checkpoint.step_of(newest)
        before = sum(to_step == target for to_step, _ in run.paths.rollbacks)
        if before >= run.config.guard.rollbacks:
            raise AgreedError(f"{why} after {before} rollbacks to step {target}; guard.rollbacks allows no more")
        run.paths.rollbacks.append((target, state.data))
        reader = checkpoint.Reader(newest)
        position = go_back(run.config, run.trainer, run.data, run.saver, reader, run.paths.rollbacks)
        run.logger.rolled_back(why, state.step, position)
        cleared = guards.Record(position.record.losses, position.record.norms)
        return Position(position.step, position.data, cleared, newest)


def _save(run: Run, state: Progress) -> None:
    with run.heartbeat.patient("save"):  # it may have to wait for the write before
        run.saver.save(state.step, state.data, {"guard": state.record.state()}, run.trainer.tensors())
    state.saved = state.step


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
