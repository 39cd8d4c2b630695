"""Start of a run: its directory, its history, and the checkpoint or the initial weights that it starts from."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import torch.distributed as dist
from omegaconf import OmegaConf

from tandem.data.dataset import Data
from tandem.data.vision import OLDEST
from tandem.train.checkpoints import checkpoint, tokenizer
from tandem.train.checkpoints.origins import Origin, describe_origins
from tandem.train.checkpoints.saving import Saver
from tandem.train.config.architecture import check_architecture
from tandem.train.config.schema import Config
from tandem.train.reliability import history, watchdog
from tandem.train.reliability.guards import Record
from tandem.train.reliability.stopping import launch_id
from tandem.train.tasks import find
from tandem.train.tasks.base import Trainer

RUNS = Path("runs")
LOOKED_AT = 20  # a restarted rank searches this many of the newest run directories for its own


@dataclass(frozen=True)
class RunPaths:
    """run_dir has config.yaml and history.jsonl; folder has the checkpoints.

    attempt: number of earlier starts.  cause: why the previous start ended.  rollbacks: of all attempts, (step, data
    position to resume from).
    """

    run_dir: Path
    folder: Path
    attempt: int
    cause: str
    rollbacks: list[tuple[int, dict]] = field(default_factory=list)


@dataclass(frozen=True)
class Position:
    """Where training continues: completed steps, position in the data stream, and the guards' record."""

    step: int
    data: dict
    record: Record
    checkpoint: Path | None = None


def agree_on_run_paths(config: Config) -> RunPaths:
    """Return rank 0's paths on all ranks.

    Raises ValueError on all ranks if the directory cannot be written or belongs to another run.
    """
    agreed: list = [None]
    if dist.get_rank() == 0:
        try:
            agreed[0] = _paths(config)
        except (OSError, ValueError) as error:
            agreed[0] = f"run.dir={config.run.dir}: {error}"
    dist.broadcast_object_list(agreed, src=0)
    if isinstance(agreed[0], str):
        raise ValueError(agreed[0])
    return agreed[0]


def _paths(config: Config) -> RunPaths:
    new = RUNS / (config.run.name or f"{config.label}-{datetime.now():%Y%m%d-%H%M%S}")
    run_dir = Path(config.run.dir) if config.run.dir else _of_this_launch() or new
    folder = Path(config.checkpoint.dir) if config.checkpoint.dir else run_dir / "checkpoints"
    events = history.read(run_dir)
    restarted = launch_id() is not None and history.last_launch(events) == launch_id()
    if checkpoint.checkpoints(folder) and not config.checkpoint.resume and not restarted:
        raise ValueError(f"{folder} holds checkpoints of a run; set checkpoint.resume=true or name another directory")
    run_dir.mkdir(parents=True, exist_ok=True)
    unfinished = run_dir / ".config.yaml.partial"  # other ranks may still read the file of the start before
    unfinished.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    unfinished.replace(run_dir / "config.yaml")
    attempt = history.attempts(events)
    for alarm in (run_dir / watchdog.STACKS).glob("alarm-*"):
        alarm.unlink()
    rollbacks = [(event["to_step"], event["data"]) for event in events if event["event"] == "rollback"]
    return RunPaths(run_dir, folder, attempt, history.cause_of_start(events, history.take_ends(run_dir)), rollbacks)


def _of_this_launch() -> Path | None:
    """The run that this torchrun started earlier, so that a restart finds it without run.dir."""
    if launch_id() is None:
        return None
    found = sorted(RUNS.glob(f"*/{history.FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    same = [path.parent for path in found[:LOOKED_AT] if history.last_launch(history.read(path.parent)) == launch_id()]
    return same[0] if same else None


def restore(
    config: Config,
    trainer: Trainer,
    data: Data,
    origins: list[Origin],
    saver: Saver,
    paths: RunPaths,
) -> tuple[Position, list[str]]:
    """Resume from the newest checkpoint, or load the initial weights.  Return (position, messages to print)."""
    newest, damaged = saver.newest_valid()
    messages = [f"damaged checkpoint, using an older one: {sentence}" for sentence in damaged]
    if newest is not None:
        reader = checkpoint.Reader(newest)
        position = go_back(config, trainer, data, saver, reader, paths.rollbacks)
        if "vision" not in position.data:
            messages.append(f"{newest} records no vision settings; assuming {OLDEST}")
        return position, messages + _without_architecture([reader])
    readers = [origin.source for origin in origins if isinstance(origin.source, checkpoint.Reader)]
    if config.checkpoint.load_optimizer and readers:
        _check_moments(config, readers[0])
    origins = [origin.grown(data.reader.tokenizer, config.model.llm.width) for origin in origins]
    if added := data.reader.tokenizer.added:
        names = ", ".join(f"{name} ({token_id})" for name, token_id in added.items())
        messages.append(f"added to the vocabulary of data.tokenizer={config.data.tokenizer}: {names}")
    for origin in origins:
        if isinstance(origin.source, checkpoint.Reader):
            parts = set(origin.parts or find(config.task).parts) & origin.source.modules
            messages += tokenizer.check_start(
                origin.source, data.reader.tokenizer, parts, config.checkpoint.other_tokenizer
            )
    loaded = [origin.load(config, trainer.engines, saver) for origin in origins]
    if config.checkpoint.load_optimizer and readers and readers[0].state.task == config.task:
        trainer.load_tensors(readers[0].task_tensors())
    if (sources := describe_origins(origins, loaded, find(config.task).parts)) is not None:
        messages.append(sources)
    return Position(0, data.stream.state(), Record()), messages + _without_architecture(readers)


def _without_architecture(readers: list[checkpoint.Reader]) -> list[str]:
    """A message for each checkpoint that records no architecture."""
    return [
        f"{reader.path} records no architecture; only names and shapes were compared"
        for reader in readers
        if not reader.state.architecture
    ]


def _check_moments(config: Config, reader: checkpoint.Reader) -> None:
    """Raise ValueError if a checkpoint lacks the moments that checkpoint.load_optimizer requires."""
    _check_optimizer(config, "checkpoint.load_optimizer=true", reader.path, reader.state)
    if new := set(config.train.trainable) - reader.modules:
        raise ValueError(
            f"checkpoint.load_optimizer=true, but checkpoint {reader.path} has no "
            f"{', '.join(sorted(new))}; set checkpoint.load_optimizer=false"
        )


def go_back(
    config: Config,
    trainer: Trainer,
    data: Data,
    saver: Saver,
    reader: checkpoint.Reader,
    rollbacks: list[tuple[int, dict]],
) -> Position:
    """Restore a checkpoint of this run.  Data resumes after the batches skipped by rollbacks to this checkpoint."""
    path, state = reader.path, reader.state
    trainable = state.trainable or list(config.train.trainable)  # older checkpoints do not record it
    for key, theirs, ours in (
        ("task", state.task, config.task),
        ("train.trainable", sorted(trainable), sorted(config.train.trainable)),
    ):
        if theirs != ours:
            raise ValueError(
                f"checkpoint.resume=true, but {path} is of {key}={theirs}, not {ours}; "
                "start from it with checkpoint.load_from and another run.dir"
            )
    _check_optimizer(config, "checkpoint.resume=true", path, state)
    tokenizer.check_resume(reader, data.reader.tokenizer)
    check_architecture(config, state.architecture, find(config.task).parts, path)
    saver.keep_frozen(reader.read, checkpoint.load(reader, trainer.engines, optimizer=True))
    checkpoint.restore_random(reader, trainer.engines)
    trainer.load_tensors(reader.task_tensors())
    skipped = [position for step, position in rollbacks if step == state.step]
    position = skipped[-1] if skipped else state.data
    data.stream.load_state(position)
    record = Record.of(state.extra["guard"]) if "guard" in state.extra else Record()
    return Position(state.step, position, record, path)


def _check_optimizer(config: Config, asked: str, path: Path, state: checkpoint.TrainState) -> None:
    if state.optimizer != config.optim.name:
        raise ValueError(
            f"{asked}, but the moments of {path} are of optim.name={state.optimizer}, not {config.optim.name}; "
            f"set optim={state.optimizer}"
        )
