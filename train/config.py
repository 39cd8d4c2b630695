"""Every setting of a run, typed, and every rule between settings, checked before anything is allocated.

Hydra fills these dataclasses from recipes/ and the command line; an unknown key or a wrong type is refused there.
`Config.check` holds what types cannot say.  Full-scale values and their sources stand in recipes/.
"""

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from parallel.layout import Layout
from train.models.llm import LLMConfig
from train.models.vision_tower import RECOMPUTE
from train.models.vit import ViTConfig

PARTS = ("encoder", "adapter", "llm")
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


@dataclass
class ModelConfig:
    encoder: ViTConfig
    llm: LLMConfig


@dataclass
class EncoderParallelConfig:
    """zero_stage: DeepSpeed ZeRO 1, 2 or 3 over the whole world.  chunk_patches: most patches encoded at once; lower it
    if memory runs out.  recompute: what is kept for the encoder's backward, from fast to small: none, selective (MLPs
    again), full (blocks again), replay (everything again, one chunk in memory)."""

    zero_stage: int
    chunk_patches: int
    recompute: str


@dataclass
class ParallelConfig:
    """Sizes of the two grids; see parallel/layout.py.  balance: move images between ranks by cost, inside groups of
    balance_group_size ranks (null: the whole world).  etp: null for tp where ep is 1, else 1."""

    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int | None
    cp: int
    sequence_parallel: bool | None
    balance: bool
    balance_group_size: int | None
    encoder: EncoderParallelConfig


@dataclass
class TrainConfig:
    """global_batch_size and micro_batch_size count rows of seq_length tokens.  trainable: which of encoder, adapter and
    llm learn.  recompute: recompute the LLM's layers in the backward."""

    steps: int
    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    seed: int
    deterministic: bool
    precision: str
    recompute: bool
    trainable: list[str]


@dataclass
class OptimConfig:
    """AdamW; lr rises over warmup_steps and then follows `schedule` (cosine or constant) to min_lr.  clip_norm: joint
    over encoder, adapter and LLM, 0 for none."""

    lr: float
    min_lr: float
    warmup_steps: int
    schedule: str
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float


@dataclass
class SourceConfig:
    """One source of samples.  shards: paths or brace patterns of indexed WebDataset tars, or one .catalog file.
    weight: its share of the samples against the other sources' weights; null on all sources for shares by size, where
    `repeat` multiplies a source's size and `max_samples` bounds it.  entity_cap: most samples of one entity an epoch.
    rare_domain_copies: how often an epoch holds each sample of a domain that has under half of the mean domain's.
    train_roles: whose turns are trained on.  fps: frames a second taken from a video."""

    shards: list[str]
    weight: float | None = None
    repeat: float = 1.0
    max_samples: int | None = None
    entity_cap: int | None = None
    rare_domain_copies: int = 1
    train_roles: list[str] = field(default_factory=lambda: ["assistant"])
    fps: float = 1.0


@dataclass
class VideoConfig:
    """budget: most visual tokens of one video.  levels: tokens of a frame, falling; the first at which all frames fit
    the budget is taken, and at the last one frames are thinned out evenly until they do."""

    budget: int
    levels: list[int]


@dataclass
class DataConfig:
    """sources: by name, mixed by weight.  block_samples: samples packed together; window_shards: shards of a source
    shuffled together.  too_long: cut or refuse a sample longer than a row.  workers: processes of a rank that read and
    decode, 0 for none beside its own thread.  prefetch: steps read ahead.  max_skip_rate: share of unreadable samples
    above which the run stops."""

    sources: dict[str, SourceConfig]
    tokenizer: str
    min_patches: int
    max_patches: int
    max_pixels: int
    video: VideoConfig
    block_samples: int
    window_shards: int
    too_long: str
    workers: int
    prefetch: int
    max_skip_rate: float


@dataclass
class CheckpointConfig:
    """dir: null for <run.dir>/checkpoints.  every: steps between checkpoints, 0 for only the last.  keep: newest ones
    kept; keep_every: and those whose step is a multiple of it.  resume: go on from the newest valid checkpoint in dir.
    load_from: a run or checkpoint to start from, under any layout; load_modules: which of encoder, adapter and llm to
    take; load_optimizer: their Adam moments too."""

    dir: str | None
    every: int
    keep: int
    keep_every: int
    resume: bool
    load_from: str | None
    load_modules: list[str]
    load_optimizer: bool


@dataclass
class LoggerConfig:
    """every: steps between lines of the console.  wandb: offline, online or disabled.  peak_tflops: of one device, for
    MFU; null to know it by the device's name, or to measure a matrix product on a CPU."""

    every: int
    wandb: str
    project: str
    peak_tflops: float | None


@dataclass
class WatchdogConfig:
    """timeout_s: silence of a rank inside a step after which the run is aborted, 0 for no watchdog; longer than any
    phase of a step.  patience_s: the same until the first step is done, while a checkpoint is written or loaded, and in
    evaluations."""

    timeout_s: float
    patience_s: float


@dataclass
class GuardConfig:
    """window: steps looked back at; values are judged once half of it is seen.  spike_loss, spike_norm: robust standard
    deviations above the median from which a step is skipped, 0 for never.  consecutive, total: skipped steps in a row,
    or in the window, after which the run goes back to its last checkpoint.  rollbacks: to one checkpoint, after which
    the run ends.  replay: compute a suspicious step again to see whether the fault is transient."""

    window: int
    spike_loss: float
    spike_norm: float
    consecutive: int
    total: int
    rollbacks: int
    replay: bool


@dataclass
class HealthConfig:
    """every: steps between looks at slow ranks, memory and disk, 0 for none.  slow_factor: times the median of the
    ranks from which a phase of a rank is reported."""

    every: int
    slow_factor: float


@dataclass
class RunConfig:
    """dir: where everything of a run goes; name: null for the recipe and the time."""

    dir: str | None
    name: str | None


@dataclass
class Config:
    recipe: str
    model: ModelConfig
    parallel: ParallelConfig
    train: TrainConfig
    optim: OptimConfig
    data: DataConfig
    checkpoint: CheckpointConfig
    logger: LoggerConfig
    watchdog: WatchdogConfig
    guard: GuardConfig
    health: HealthConfig
    run: RunConfig
    scale: dict[str, Any] = field(default_factory=dict)

    def layout(self, world: int) -> Layout:
        """The rank layout in a world of `world` ranks; ValueError where it is impossible."""
        p = self.parallel
        return Layout(
            world=world,
            tp=p.tp,
            cp=p.cp,
            pp=p.pp,
            vpp=p.vpp,
            ep=p.ep,
            etp=p.etp,
            balance_group_size=p.balance_group_size,
        )

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one step in one replica."""
        return self.train.global_batch_size // (layout.dp * self.train.micro_batch_size)

    def check(self, world: int) -> Layout:
        """The layout.  Raises ValueError, one sentence naming keys and values, for any setting that cannot work."""
        layout = self.layout(world)
        for key, least in LEAST.items():
            if attrgetter(key)(self) < least:
                raise ValueError(f"{key}={attrgetter(key)(self)}: must be at least {least}")
        self.model.llm.check(layout)
        self._check_parallel(layout)
        self._check_batch(layout)
        self._check_choices()
        if self.watchdog.patience_s < self.watchdog.timeout_s:
            raise ValueError(
                f"watchdog.patience_s={self.watchdog.patience_s} is shorter than watchdog.timeout_s="
                f"{self.watchdog.timeout_s}"
            )
        self._check_data()
        return layout

    def _check_parallel(self, layout: Layout) -> None:
        if self.parallel.sequence_parallel is False and layout.tp > 1:
            raise ValueError(
                f"parallel.sequence_parallel=false with parallel.tp={layout.tp}: visual rows and experts need sequence "
                "parallelism; leave it null"
            )
        encoder = self.parallel.encoder
        if encoder.zero_stage not in (1, 2, 3):
            raise ValueError(f"parallel.encoder.zero_stage={encoder.zero_stage}: must be 1, 2 or 3")
        if encoder.recompute not in RECOMPUTE:
            raise ValueError(f"parallel.encoder.recompute={encoder.recompute}: must be one of {', '.join(RECOMPUTE)}")
        if encoder.chunk_patches < self.data.max_patches:
            raise ValueError(
                f"parallel.encoder.chunk_patches={encoder.chunk_patches} is smaller than one image of "
                f"data.max_patches={self.data.max_patches}"
            )

    def _check_batch(self, layout: Layout) -> None:
        t = self.train
        if t.global_batch_size % (layout.dp * t.micro_batch_size):
            raise ValueError(
                f"train.global_batch_size={t.global_batch_size} is not divisible by "
                f"dp*train.micro_batch_size = {layout.dp}*{t.micro_batch_size}"
            )
        row = t.seq_length * t.micro_batch_size
        parts = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
        if row % parts:
            raise ValueError(
                f"train.seq_length*micro_batch_size = {row} is not divisible by {parts} "
                f"(parallel.tp={layout.tp}, and twice parallel.cp={layout.cp} where cp > 1)"
            )
        count = self.micro_batches(layout)
        if layout.vpp > 1 and count % layout.pp:
            raise ValueError(
                f"parallel.vpp={layout.vpp}: the {count} micro-batches of a replica (train.global_batch_size over "
                f"dp*train.micro_batch_size) must be a multiple of parallel.pp={layout.pp}"
            )
        if self.data.max_patches // 4 + 2 > t.seq_length:
            raise ValueError(
                f"train.seq_length={t.seq_length} is shorter than one image of data.max_patches="
                f"{self.data.max_patches} ({self.data.max_patches // 4} tokens)"
            )

    def _check_data(self) -> None:
        data, video = self.data, self.data.video
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
        if not levels[-1] <= video.budget <= self.train.seq_length:
            raise ValueError(
                f"data.video.budget={video.budget}: must be from {levels[-1]} (the last of data.video.levels) to "
                f"train.seq_length={self.train.seq_length}"
            )

    def _check_choices(self) -> None:
        choices = (
            ("data.too_long", self.data.too_long, ("cut", "refuse")),
            ("train.precision", self.train.precision, ("fp32", "bf16")),
            ("optim.schedule", self.optim.schedule, ("cosine", "constant")),
            ("logger.wandb", self.logger.wandb, ("offline", "online", "disabled")),
        )
        for key, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"{key}={value}: must be one of {', '.join(allowed)}")
        unknown = set(self.train.trainable) - set(PARTS)
        if unknown or "adapter" not in self.train.trainable:
            raise ValueError(
                f"train.trainable={list(self.train.trainable)}: must name adapter and may name encoder and llm"
            )
        self._check_loading()
        if len(self.optim.betas) != 2 or not all(0 <= beta < 1 for beta in self.optim.betas):
            raise ValueError(f"optim.betas={list(self.optim.betas)}: must be two numbers from 0 to below 1")

    def _check_loading(self) -> None:
        modules, trainable = set(self.checkpoint.load_modules), set(self.train.trainable)
        if not modules or modules - set(PARTS):
            raise ValueError(
                f"checkpoint.load_modules={list(self.checkpoint.load_modules)}: must name one or more of "
                f"{', '.join(PARTS)}"
            )
        if self.checkpoint.load_optimizer and trainable - modules:
            raise ValueError(
                f"checkpoint.load_optimizer=true with checkpoint.load_modules={list(self.checkpoint.load_modules)}: "
                f"must name all of train.trainable={list(self.train.trainable)}; set checkpoint.load_optimizer=false"
            )
