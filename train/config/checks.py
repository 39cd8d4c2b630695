"""Every rule between settings that types cannot say, checked before anything is allocated."""

import math
from collections.abc import Mapping
from operator import attrgetter

from tandem.parallel.engines.optimizers import NAMES as OPTIMIZERS
from tandem.parallel.kernels.attention import NAMES as ATTENTION
from tandem.parallel.kernels.compilation import MODES
from tandem.parallel.layout import Layout
from tandem.train.config.architecture import architecture
from tandem.train.config.schema import CheckpointConfig, Config
from tandem.train.input.dataset import source_settings, stream_config
from tandem.train.models.language.llm_recompute import RECOMPUTE as LLM_RECOMPUTE
from tandem.train.models.language.llm_spec import KERNELS
from tandem.train.models.layers.blocks import RECOMPUTE
from tandem.train.tasks import find
from tandem.train.tasks.base import Task

LEAST = {
    "train.steps": 1,
    "train.micro_batch_size": 1,
    "optim.lr": 0,
    "optim.min_lr": 0,
    "optim.warmup_steps": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "data.max_pixels": 1,
    "data.workers": 0,
    "data.prefetch": 1,
    "data.max_skip_rate": 0,
    "model.embedding": 1,
    "checkpoint.every": 0,
    "checkpoint.keep": 1,
    "checkpoint.keep_every": 0,
    "logger.every": 1,
    "watchdog.timeout_s": 0,
    "guard.window": 2,
    "guard.spike_loss": 0,
    "guard.spike_norm": 0,
    "guard.consecutive": 1,
    "guard.total": 1,
    "guard.rollbacks": 0,
    "health.every": 0,
    "health.slow_factor": 1,
}


def check_config(config: Config, world: int) -> Layout:
    """The layout.  Raises ValueError, one sentence naming keys and values, for any setting that cannot work."""
    layout, _ = config.layout(world), config.vision  # both checked as they are built
    for key, least in LEAST.items():
        if attrgetter(key)(config) < least:
            raise ValueError(f"{key}={attrgetter(key)(config)}: must be at least {least}")
    stream_config(config), source_settings(config.data)  # check themselves
    task = find(config.task)
    task.check(config, layout)
    _check_parallel(config, layout)
    _check_choices(config)
    _check_loading(config, task)
    _check_lr_scale(config)
    if config.watchdog.patience_s < config.watchdog.timeout_s:
        raise ValueError(
            f"watchdog.patience_s={config.watchdog.patience_s} is shorter than watchdog.timeout_s="
            f"{config.watchdog.timeout_s}"
        )
    if config.data.video.budget > config.train.seq_length:
        raise ValueError(
            f"data.video.budget={config.data.video.budget}: must be at most train.seq_length={config.train.seq_length}"
        )
    return layout


def _check_parallel(config: Config, layout: Layout) -> None:
    if config.parallel.sequence_parallel is False and layout.tp > 1:
        raise ValueError(
            f"parallel.sequence_parallel=false with parallel.tp={layout.tp}: visual rows and experts need sequence "
            "parallelism; leave it null"
        )
    if config.train.recompute.lower() in ("true", "false"):
        now = "full" if config.train.recompute.lower() == "true" else "none"
        raise ValueError(f"train.recompute={config.train.recompute}: say {now}, or one of {', '.join(LLM_RECOMPUTE)}")
    encoder = config.parallel.encoder
    if encoder.zero_stage not in (1, 2, 3):
        raise ValueError(f"parallel.encoder.zero_stage={encoder.zero_stage}: must be 1, 2 or 3")
    if encoder.chunk_patches < config.data.max_patches:
        raise ValueError(
            f"parallel.encoder.chunk_patches={encoder.chunk_patches} is smaller than one image of "
            f"data.max_patches={config.data.max_patches}"
        )


def _check_choices(config: Config) -> None:
    choices = (
        ("train.precision", config.train.precision, ("fp32", "bf16")),
        ("optim.name", config.optim.name, OPTIMIZERS),
        ("parallel.attention", config.parallel.attention, ATTENTION),
        ("parallel.kernels", config.parallel.kernels, KERNELS),
        ("parallel.compile", config.parallel.compile, MODES),
        ("parallel.encoder.recompute", config.parallel.encoder.recompute, RECOMPUTE),
        ("train.recompute", config.train.recompute, LLM_RECOMPUTE),
        ("optim.schedule", config.optim.schedule, ("cosine", "constant")),
        ("logger.wandb", config.logger.wandb, ("offline", "online", "disabled")),
    )
    for key, value, allowed in choices:
        if value not in allowed:
            raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"optim.betas={list(config.optim.betas)}: must be two numbers from 0 to below 1")
    for key in ("lr", "min_lr", "eps", "weight_decay", "clip_norm"):
        if not math.isfinite(getattr(config.optim, key)):
            raise ValueError(f"optim.{key}={getattr(config.optim, key)}: must be a finite number")
    if config.optim.min_lr > config.optim.lr:
        raise ValueError(f"optim.min_lr={config.optim.min_lr}: must be at most optim.lr={config.optim.lr}")
    if not 0 < config.optim.layer_decay <= 1:
        raise ValueError(f"optim.layer_decay={config.optim.layer_decay}: must be above 0, and at most 1 for none")
    if not 0 <= config.optim.ema < 1:
        raise ValueError(f"optim.ema={config.optim.ema}: must be from 0 to below 1")


def _check_lr_scale(config: Config) -> None:
    """Factors are positive, and of parts that this run trains."""
    for part, factor in vars(config.optim.lr_scale).items():
        if not 0 < factor < math.inf:
            raise ValueError(
                f"optim.lr_scale.{part}={factor}: must be a finite number above 0; to freeze a part, leave it out of "
                "train.trainable"
            )
        if factor != 1 and part not in config.trained_parts:
            raise ValueError(
                f"optim.lr_scale.{part}={factor}: this run trains no {part} (task={config.task}, train.trainable="
                f"{list(config.train.trainable)}), set it to 1"
            )


def _check_loading(config: Config, task: Task) -> None:
    """What is trained, and what is taken from another checkpoint."""
    trainable = set(config.train.trainable)
    if trainable - set(task.parts) or not trainable:
        raise ValueError(
            f"train.trainable={list(config.train.trainable)}: must name one or more of {', '.join(task.parts)}"
        )
    modules = config.checkpoint.load_modules
    if config.checkpoint.other_tokenizer and not (config.checkpoint.load_from or config.model.llm.folder):
        raise ValueError("checkpoint.other_tokenizer=true: has no use without checkpoint.load_from or model.llm.folder")
    _check_places(config.checkpoint, task.parts)
    if unknown := sorted(set(config.checkpoint.allow_changed) - architecture(config).keys()):
        raise ValueError(
            f"checkpoint.allow_changed names {', '.join(unknown)}: no settings of the architecture, such as "
            "model.llm.rope_base"
        )
    if modules is None:
        return
    if not modules or set(modules) - set(task.parts):
        raise ValueError(f"checkpoint.load_modules={list(modules)}: must name one or more of {', '.join(task.parts)}")
    if config.checkpoint.load_optimizer and trainable - set(modules):
        raise ValueError(
            f"checkpoint.load_optimizer=true with checkpoint.load_modules={list(modules)}: must name all of "
            f"train.trainable={list(config.train.trainable)}; set checkpoint.load_optimizer=false"
        )


def _check_places(wanted: CheckpointConfig, parts: tuple[str, ...]) -> None:
    """checkpoint.load_from, where it names a place for each part."""
    load_from = wanted.load_from
    if load_from is None or isinstance(load_from, str):
        return
    if not isinstance(load_from, Mapping) or not all(isinstance(place, str) for place in load_from.values()):
        raise ValueError(
            f"checkpoint.load_from={load_from}: must be one place, or places by part, as in '{{encoder: runs/a}}'"
        )
    if unknown := [str(part) for part in load_from if part not in parts]:
        raise ValueError(f"checkpoint.load_from names {', '.join(unknown)}: parts are {', '.join(parts)}")
    if wanted.load_modules is not None:
        raise ValueError(
            f"checkpoint.load_modules={wanted.load_modules} with places by part in checkpoint.load_from: leave it null"
        )
    if wanted.load_optimizer:
        raise ValueError(
            "checkpoint.load_optimizer=true with places by part in checkpoint.load_from: the moments of several runs "
            "do not go together, set it to false"
        )
