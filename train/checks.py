"""Every rule between settings that types cannot say, checked before anything is allocated."""

import math
from operator import attrgetter

import torch

from data.audio import sound_grid
from parallel.attention import NAMES as ATTENTION
from parallel.compilation import MODES
from parallel.layout import Layout
from parallel.optimizers import NAMES as OPTIMIZERS
from train.config import Config
from train.models.blocks import RECOMPUTE
from train.models.llm_recompute import RECOMPUTE as LLM_RECOMPUTE
from train.models.llm_spec import KERNELS, choose_kernels

LANGUAGE_PARTS = ("encoder", "adapter", "llm")
VISION_PARTS = {
    "vit_mim": ("encoder", "mim"),
    "vit_contrastive": ("encoder", "pool", "text", "contrastive"),
    "vit_omni": ("encoder", "pool", "text", "omni"),
}
LEAST = {
    "train.steps": 1,
    "train.global_batch_size": 1,
    "train.micro_batch_size": 1,
    "train.seq_length": 1,
    "optim.lr": 0,
    "optim.min_lr": 0,
    "optim.warmup_steps": 0,
    "optim.eps": 0,
    "optim.weight_decay": 0,
    "optim.clip_norm": 0,
    "data.min_patches": 4,
    "data.max_patches": 4,
    "data.max_pixels": 1,
    "data.workers": 0,
    "data.prefetch": 1,
    "data.max_skip_rate": 0,
    "data.audio_seconds": 0,
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


def check(config: Config, world: int) -> Layout:
    """The layout.  Raises ValueError, one sentence naming keys and values, for any setting that cannot work."""
    layout = config.layout(world)
    for key, least in LEAST.items():
        if attrgetter(key)(config) < least:
            raise ValueError(f"{key}={attrgetter(key)(config)}: must be at least {least}")
    if config.is_vision:
        _check_vision(config, layout)
    else:
        config.model.llm.check(layout)
        choose_kernels(config.parallel.kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        _check_batch(config, layout)
        if config.data.audio_seconds > 0:
            seconds = config.data.audio_seconds
            raise ValueError(f"data.audio_seconds={seconds}: {config.recipe} hears no sound, set it to 0")
    _check_parallel(config, layout)
    _check_choices(config)
    _check_loading(config)
    if config.watchdog.patience_s < config.watchdog.timeout_s:
        raise ValueError(
            f"watchdog.patience_s={config.watchdog.patience_s} is shorter than watchdog.timeout_s="
            f"{config.watchdog.timeout_s}"
        )
    _check_data(config)
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


def _check_batch(config: Config, layout: Layout) -> None:
    t = config.train
    if t.global_batch_size % (layout.dp * t.micro_batch_size):
        raise ValueError(
            f"train.global_batch_size={t.global_batch_size} is not divisible by "
            f"dp*train.micro_batch_size = {layout.dp}*{t.micro_batch_size}"
        )
    row = t.seq_length * t.micro_batch_size
    parts = layout.tp * layout.row_chunks
    if row % parts:
        raise ValueError(
            f"train.seq_length*micro_batch_size = {row} is not divisible by {parts} (parallel.tp={layout.tp} times "
            f"{layout.row_chunks} chunks of a row for parallel.cp={layout.cp} with parallel.cp_comm_type="
            f"{layout.cp_comm_type})"
        )
    count = config.micro_batches(layout)
    if layout.vpp > 1 and count % layout.pp:
        raise ValueError(
            f"parallel.vpp={layout.vpp}: the {count} micro-batches of a replica (train.global_batch_size over "
            f"dp*train.micro_batch_size) must be a multiple of parallel.pp={layout.pp}"
        )
    if config.data.max_patches // 4 + 2 > t.seq_length:
        raise ValueError(
            f"train.seq_length={t.seq_length} is shorter than one image of data.max_patches="
            f"{config.data.max_patches} ({config.data.max_patches // 4} tokens)"
        )


def _check_data(config: Config) -> None:
    data, video = config.data, config.data.video
    if not data.sources:
        raise ValueError("data.sources is empty: name at least one source of shards")
    for name, source in data.sources.items():
        if not source.shards:
            raise ValueError(
                f"data.sources.{name}.shards is empty: name one or more WebDataset shards (paths or brace "
                "patterns) or a .catalog file"
            )
    levels = list(video.levels)
    if not levels or levels != sorted(set(levels), reverse=True) or levels[-1] < 1:
        raise ValueError(f"data.video.levels={levels}: must be tokens of a frame, falling, at least 1")
    if not levels[-1] <= video.budget <= config.train.seq_length:
        raise ValueError(
            f"data.video.budget={video.budget}: must be from {levels[-1]} (the last of data.video.levels) to "
            f"train.seq_length={config.train.seq_length}"
        )


def _check_choices(config: Config) -> None:
    choices = (
        ("data.too_long", config.data.too_long, ("cut", "refuse")),
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
    if config.optim.name == "lamb" and not config.is_vision and "llm" in config.train.trainable:
        raise ValueError(
            "optim.name=lamb: the LLM is trained by AdamW alone; set optim=adamw, or leave llm out of train.trainable"
        )
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"optim.betas={list(config.optim.betas)}: must be two numbers from 0 to below 1")
    for key in ("lr", "min_lr", "eps", "weight_decay", "clip_norm"):
        if not math.isfinite(getattr(config.optim, key)):
            raise ValueError(f"optim.{key}={getattr(config.optim, key)}: must be a finite number")
    if not 0 < config.optim.layer_decay <= 1:
        raise ValueError(f"optim.layer_decay={config.optim.layer_decay}: must be above 0, and at most 1 for none")
    if not 0 <= config.optim.ema < 1:
        raise ValueError(f"optim.ema={config.optim.ema}: must be from 0 to below 1")


def parts_of(recipe: str) -> tuple[str, ...]:
    """The modules that a recipe's model has."""
    return VISION_PARTS.get(recipe, LANGUAGE_PARTS)


def _check_loading(config: Config) -> None:
    """What is trained, and what is taken from another checkpoint."""
    parts, trainable = parts_of(config.recipe), set(config.train.trainable)
    needed = set() if config.is_vision else {"adapter"}
    if trainable - set(parts) or needed - trainable or not trainable:
        may = f"must name adapter and may name {', '.join(p for p in parts if p != 'adapter')}"
        may = f"must name one or more of {', '.join(parts)}" if config.is_vision else may
        raise ValueError(f"train.trainable={list(config.train.trainable)}: {may}")
    modules = config.checkpoint.load_modules
    if modules is None:
        return
    if not modules or set(modules) - set(parts):
        raise ValueError(f"checkpoint.load_modules={list(modules)}: must name one or more of {', '.join(parts)}")
    if config.checkpoint.load_optimizer and trainable - set(modules):
        raise ValueError(
            f"checkpoint.load_optimizer=true with checkpoint.load_modules={list(modules)}: must name all of "
            f"train.trainable={list(config.train.trainable)}; set checkpoint.load_optimizer=false"
        )


def _check_vision(config: Config, layout: Layout) -> None:
    """The encoder's own stages: no LLM, samples for rows."""
    for key in ("tp", "pp", "vpp", "ep", "cp"):
        if getattr(layout, key) > 1:
            raise ValueError(f"parallel.{key}={getattr(layout, key)}: {config.recipe} has no LLM to split, set it to 1")
    for key, value in (
        ("parallel.balance_group_size", config.parallel.balance_group_size),
        ("train.micro_batch_size", config.train.micro_batch_size),
    ):
        if value not in (None, 1):
            raise ValueError(f"{key}={value}: has no meaning in {config.recipe}, leave it out")
    if config.recipe == "vit_mim" and not config.objective.teacher:
        raise ValueError(
            "objective.teacher is missing: name a folder with a Hugging Face vision model, or a run or checkpoint"
        )
    seconds, omni = config.data.audio_seconds, config.recipe == "vit_omni"
    if omni != (seconds > 0):
        raise ValueError(f"data.audio_seconds={seconds}: must be {'above 0' if omni else '0'} in {config.recipe}")
    pairs = config.objective.omni.pairs
    if omni and not any("audio" in pair for pair in pairs):
        raise ValueError(
            f"objective.omni.pairs={list(pairs)}: none has audio, for frames alone there is vit_contrastive"
        )
    sample = 4 * config.data.video.budget + int(sound_grid(1000 * seconds, seconds).prod())
    if config.recipe == "vit_omni" and sample > config.parallel.encoder.chunk_patches:
        raise ValueError(
            f"parallel.encoder.chunk_patches={config.parallel.encoder.chunk_patches} is smaller than a sample of "
            f"data.video.budget={config.data.video.budget} and data.audio_seconds={seconds} ({sample} patches)"
        )
