"""A few steps of a stage whose weights, moments and norms are kept, and the formulas that they must follow.

    m = b1 m + (1 - b1) g        v = b2 v + (1 - b2) g^2        g = clipped gradient
    AdamW    w -= lr * f * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay * w)
    LAMB     the same, times |w| / |update| for each decayed tensor

with f the factors of a part and of a layer of the encoder, and decay 0 for biases, norms and learned vectors.
"""

import itertools
import math
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

import torch
import torch.distributed as dist

from tandem.parallel.grid import destroy_grid
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.input.dataset import open_data
from tandem.train.loop import Run, _set_lr
from tandem.train.tasks import find
from tests.distributed.runs import train_run, whole_state
from tests.distributed.world import run_world
from tests.reference import optim as plain
from tests.support import corpus_overrides, settings

CPU = torch.device("cpu")
TASKS = MappingProxyType({"vit_mim": "photo", "vit_contrastive": "photo", "vit_omni": "sound"})

State = dict[tuple[str, str], torch.Tensor]


@dataclass(frozen=True)
class Followed:
    """states: by engine, at the start and after each step.  clipped: whether a joint norm was above the limit."""

    config: Config
    states: dict[str, list[State]]
    losses: list[float]
    reports: list
    grad_norms: list[float]
    part_norms: list[dict[str, float]]


def data_of(recipe: str, corpus: str) -> list[str]:
    """Overrides that read a toy corpus."""
    if recipe not in TASKS:
        return corpus_overrides(Path(corpus))
    shards = f"data.sources.main.shards=['{corpus}/vision/train/{TASKS[recipe]}-*.tar']"
    return [shards, f"data.tokenizer={corpus}/tokenizer.json", "train.global_batch_size=6"]


def open_stage(recipe: str, corpus: str, *overrides: str):
    """(config, stage, data) in this world of one; whatever stage was there before is forgotten."""
    config = settings(recipe, "logger.wandb=disabled", *data_of(recipe, corpus), *overrides)
    layout = check_config(config, dist.get_world_size())
    destroy_grid()
    data = open_data(config)
    return config, find(config.task).trainer(config, layout, CPU, data), data


def make_teacher(corpus: Path, folder: Path) -> Path:
    """A run whose encoder is 32 wide, after one step."""
    small = ["model.encoder.width=32", "train.steps=1", "train.global_batch_size=2"]
    run_world(train_run, 1, "vit_contrastive", [*data_of("vit_contrastive", str(corpus)), *small], str(folder))
    return folder


def follow(corpus: str, runs: list[tuple[str, list[str], int]]) -> list[Followed]:
    """Runs (recipe, overrides, steps) one after the other."""
    return [_follow(corpus, *run) for run in runs]


def _follow(corpus: str, recipe: str, overrides: list[str], steps: int) -> Followed:
    config, stage, data = open_stage(recipe, corpus, *overrides)
    others = dict.fromkeys(field.name for field in fields(Run))
    run = Run(**{**others, "config": config, "trainer": stage, "data": data})
    states, outputs = {name: [copied(engine)] for name, engine in stage.engines.by_name.items()}, []
    for step, (prepared, batch) in enumerate(itertools.islice(stage.steps(steps), steps)):
        _set_lr(run, step)
        outputs.append(stage.step(batch, timer=PhaseTimer(CPU), stop=False, accept=lambda loss, norm: True))
        prepared.release()
        for name, engine in stage.engines.by_name.items():
            states[name].append(copied(engine))
    assert all(output.applied for output in outputs)
    return Followed(
        config=config,
        states=states,
        losses=[output.loss for output in outputs],
        reports=[output.report for output in outputs],
        grad_norms=[output.grad_norm for output in outputs],
        part_norms=[output.part_norms for output in outputs],
    )


def copied(engine) -> State:
    return {key: tensor.clone() for key, tensor in whole_state(engine).items()}


def rate(optim, steps: int, step: int) -> float:
    keys = {key: getattr(optim, key) for key in ("lr", "min_lr", "warmup_steps", "schedule")}
    return plain.learning_rate(step, steps=steps, **keys)


def gradient(before: State, after: State, name: str, beta1: float) -> torch.Tensor:
    """The clipped gradient that moved the first moment."""
    mean0, mean1 = (state[name, "exp_avg"].double() for state in (before, after))
    return (mean1 - beta1 * mean0) / (1 - beta1)


def update_error(run: Followed, engine: str, steps: int | None = None, **changed) -> float:
    """Largest error of a tensor's update in a step, over the update's norm, against the formula with these settings.

    changed: settings of `optim` in place of the run's own; steps: of the schedule.
    """
    optim = _Changed(run.config.optim, changed)
    depth, worst = run.config.model.encoder.depth, 0.0
    for step, (before, after) in enumerate(itertools.pairwise(run.states[engine])):
        lr = rate(optim, steps or run.config.train.steps, step)
        for name, kind in after:
            if kind != "param" or (name, "exp_avg") not in after:
                continue
            factor = plain.part_factor(name, optim.lr_scale)
            if engine == "encoder":
                factor *= plain.layer_factor(name, depth, optim.layer_decay)
            wanted = -lr * factor * _direction(before, after, name, optim, step + 1)
            found = (after[name, "param"].double() - before[name, "param"].double()) - wanted
            worst = max(worst, float(found.norm() / (wanted.norm() + 1e-6 * wanted.numel() ** 0.5)))
    return worst


def _direction(before: State, after: State, name: str, optim, step: int) -> torch.Tensor:
    weight, mean, square = before[name, "param"], after[name, "exp_avg"], after[name, "exp_avg_sq"]
    how = {"betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay, "adapts": optim.name == "lamb"}
    return plain.direction(weight.double(), mean.double(), square.double(), step, **how)


def moment_error(run: Followed, engine: str, betas) -> float:
    """Largest error of what the moments say of a step's gradient.

    The first moment's gradient has the norm that was reported, after clipping; its square moved the second moment.
    """
    (beta1, beta2), worst = betas, 0.0
    for step, (before, after) in enumerate(itertools.pairwise(run.states[engine])):
        squares = 0.0
        for name in (name for name, kind in after if kind == "exp_avg"):
            clipped = gradient(before, after, name, beta1)
            squares += float(clipped.square().sum())
            wanted = beta2 * before[name, "exp_avg_sq"] + (1 - beta2) * clipped.square()
            error = (after[name, "exp_avg_sq"].double() - wanted).norm() / (wanted.norm() + 1e-30)
            worst = max(worst, float(error))
        parts = [norm for part, norm in run.part_norms[step].items() if (part == "llm") == (engine == "llm")]
        norm = math.hypot(*parts) * clip_factor(run, step)
        worst = max(worst, abs(math.sqrt(squares) / norm - 1))
    return worst


def clip_factor(run: Followed, step: int) -> float:
    limit = run.config.optim.clip_norm
    return min(1.0, limit / run.grad_norms[step]) if limit else 1.0


def joint_norm(run: Followed, step: int) -> float:
    """Of the gradients that reached the moments of all engines."""
    beta1, squares = run.config.optim.betas[0], 0.0
    for states in run.states.values():
        before, after = states[step : step + 2]
        for name in (name for name, kind in after if kind == "exp_avg"):
            squares += float(gradient(before, after, name, beta1).square().sum())
    return math.sqrt(squares)


class _Changed:
    """Settings with some in the place of others."""

    def __init__(self, settings, changed: dict):
        self._settings, self._changed = settings, changed

    def __getattr__(self, key: str):
        return self._changed[key] if key in self._changed else getattr(self._settings, key)
