"""Where a run lives and where it goes on: its directory, its history so far, and the checkpoint it starts from."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import cast

import torch.distributed as dist
from omegaconf import OmegaConf

from tandem.data.dataset import Data
from tandem.data.vision import OLDEST
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.train import families
from tandem.train.checkpoints import checkpoint, tokenizer
from tandem.train.checkpoints.saving import Saver, verify_together
from tandem.train.config.schema import Config
from tandem.train.config.settings import resumed
from tandem.train.families import encoders
from tandem.train.families.folder import Folder
from tandem.train.reliability import history, watchdog
from tandem.train.reliability.guards import Record
from tandem.train.reliability.stopping import launch_id
from tandem.train.tasks import find
from tandem.train.tasks.base import Trainer

RUNS = Path("runs")
LOOKED_AT = 20  # newest run directories among which a restarted rank looks for its own


@dataclass(frozen=True)
class RunPaths:
    """run_dir has config.yaml and history.jsonl; folder holds the checkpoints.  attempt: starts before this one; cause:
    why the one before ended.  rollbacks: of all attempts, (to step, where the data went on)."""

    run_dir: Path
    folder: Path
    attempt: int
    cause: str
    rollbacks: list[tuple[int, dict]] = field(default_factory=list)


@dataclass(frozen=True)
class Position:
    """Where training goes on: steps done, place in the stream, and what the guards remember."""

    step: int
    data: dict
    record: Record
    checkpoint: Path | None = None


def agree_on_run_paths(config: Config) -> RunPaths:
    """Rank 0's paths, on all ranks.

    Raises ValueError on all of them where the directory cannot be written or belongs to another run.
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
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    attempt = history.attempts(events)
    for alarm in (run_dir / watchdog.STACKS).glob("alarm-*"):
        alarm.unlink()
    rollbacks = [(event["to_step"], event["data"]) for event in events if event["event"] == "rollback"]
    return RunPaths(run_dir, folder, attempt, history.cause_of_start(events, history.take_ends(run_dir)), rollbacks)


def _of_this_launch() -> Path | None:
    """The run that this torchrun has started before, so that a restart finds it without a run.dir."""
    if launch_id() is None:
        return None
    found = sorted(RUNS.glob(f"*/{history.FILE}"), key=lambda path: path.stat().st_mtime, reverse=True)
    same = [path.parent for path in found[:LOOKED_AT] if history.last_launch(history.read(path.parent)) == launch_id()]
    return same[0] if same else None


def check_folders(config: Config) -> None:
    """Raises ValueError, one sentence, where a folder that a setting names cannot serve; a run that goes on does not
    read those of its model."""
    find(config.task).check_folders(config)
    if resumed(config) is None:
        _model_folders(config)


def _model_folders(config: Config) -> dict[str, Folder]:
    """The folders that parts of the model start from, by part."""
    model, found = config.model, {}
    if model.encoder.folder:
        found["encoder"] = encoders.open_folder(model.encoder.folder, model.encoder)
    if model.llm.folder and find(config.task).has_llm:
        found["llm"] = families.open_folder(model.llm)
    return found


def restore(
    config: Config,
    trainer: Trainer,
    data: Data,
    start: checkpoint.Reader | None,
    saver: Saver,
    paths: RunPaths,
) -> tuple[Position, list[str]]:
    """(position to go on from, what to tell about it): resumes, or starts from `checkpoint.load_from`, which replaces
    what the folders of the model's parts give."""
    newest, damaged = saver.newest_valid()
    told = [f"DAMAGED, an older one is used: {sentence}" for sentence in damaged]
    if newest is not None:
        position = go_back(config, trainer, data, newest, paths.rollbacks)
        if "vision" not in position.data:
            told.append(f"{newest} does not say its vision settings: those of its time are taken, {OLDEST}")
        return position, told
    for part, folder in _model_folders(config).items():
        if part == "llm":
            cast(LLMEngine, trainer.engines.by_name["llm"]).load(folder.read, optimizer=False)
        else:
            read = lambda name, *box, of=folder: of.read(name.removeprefix("encoder."), *box)  # noqa: E731
            cast(EncoderEngine, trainer.engines.by_name["encoder"]).load(read, optimizer=False, parts={"encoder"})
        told.append(f"{part} from {folder.told}")
    if start is not None:
        if wrong := verify_together(start.path, trainer.engines):
            raise ValueError(f"checkpoint.load_from={config.checkpoint.load_from}: {'; '.join(wrong)}")
        wanted = config.checkpoint
        if wanted.load_optimizer:
            _check_optimizer(config, "checkpoint.load_optimizer=true", start.path, start.state)
        if wanted.load_optimizer and (new := set(config.train.trainable) - start.modules):
            raise ValueError(
                f"checkpoint.load_optimizer=true, but checkpoint {start.path} has no "
                f"{', '.join(sorted(new))}; set checkpoint.load_optimizer=false"
            )
        given = set(wanted.load_modules or find(config.task).parts) & start.modules
        told += tokenizer.check_start(start, data.reader.tokenizer, given, wanted.other_tokenizer)
        taken = checkpoint.load(start, trainer.engines, optimizer=wanted.load_optimizer, modules=wanted.load_modules)
        if wanted.load_optimizer and start.state.task == config.task:
            trainer.load_tensors(start.task_tensors())
        others = [part for part in find(config.task).parts if part not in taken]
        told.append(f"{', '.join(taken)} from {start.path}" + (f"; first weights: {', '.join(others)}" * bool(others)))
    return Position(0, data.stream.state(), Record()), told


def go_back(config: Config, trainer: Trainer, data: Data, path: Path, rollbacks: list[tuple[int, dict]]) -> Position:
    """Takes everything from a checkpoint of this run; the data goes on behind what rollbacks to it left out."""
    reader = checkpoint.Reader(path)
    state = reader.state
    trainable = state.trainable or list(config.train.trainable)  # older checkpoints do not say
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
    checkpoint.load(reader, trainer.engines, optimizer=True)
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
