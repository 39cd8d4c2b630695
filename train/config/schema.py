"""Every setting of a run, typed.

Hydra fills these dataclasses from recipes/ and the command line; an unknown key or a wrong type is refused there.
What types cannot say stands in `train/config/checks.py`.  Full-scale values and their sources stand in recipes/.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from tandem.data.media.tokenizer_files import ChatConfig, SpecialTokens
from tandem.data.planning.corpus import SourceSettings
from tandem.data.vision import VisionSpec
from tandem.parallel.layout import Layout, choose_cp_comm_type
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.text_encoder import TextConfig
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.towers.contrastive import ContrastiveConfig
from tandem.train.models.towers.masked import MimConfig
from tandem.train.models.towers.omni import OmniConfig
from tandem.train.vision import vision_spec


@dataclass
class ModelConfig:
    """text: the captions' encoder.  embedding: width of the space in which images and captions are compared."""

    encoder: ViTConfig
    llm: LLMConfig
    text: TextConfig
    embedding: int
    connector: ConnectorConfig = field(default_factory=ConnectorConfig)


@dataclass
class ObjectiveConfig:
    """What the encoder alone learns.  teacher of mim: a folder with a Hugging Face vision model, or a run or
    checkpoint of ours."""

    teacher: str | None
    mim: MimConfig
    contrastive: ContrastiveConfig
    omni: OmniConfig


@dataclass
class EncoderParallelConfig:
    """zero_stage: DeepSpeed ZeRO 1, 2 or 3 over the whole world.  chunk_patches: most patches encoded at once; lower it
    if memory runs out.  recompute: what is kept for the encoder's backward, see train/models/layers/blocks.py; replay
    keeps nothing (everything again, one chunk in memory)."""

    zero_stage: int
    chunk_patches: int
    recompute: str


@dataclass
class ParallelConfig:
    """Sizes of the two grids; see parallel/layout.py.  balance: move images between ranks by cost, inside groups of
    balance_group_size ranks (null: the whole world).  etp: null for tp where ep is 1, else 1.  cp_comm_type: auto, a2a
    or all_gather, see parallel/comm/context.py.  kernels: of the LLM, auto, torch or te, see
    train/models/language/llm_spec.py.  attention: see parallel/kernels/attention.py.  compile: auto, always or never,
    see parallel/kernels/compilation.py."""

    tp: int
    pp: int
    vpp: int
    ep: int
    etp: int | None
    cp: int
    cp_comm_type: str
    sequence_parallel: bool | None
    balance: bool
    balance_group_size: int | None
    kernels: str
    attention: str
    compile: str
    encoder: EncoderParallelConfig


@dataclass
class TrainConfig:
    """global_batch_size and micro_batch_size count rows of seq_length tokens; without an LLM samples, of at most
    seq_length tokens.  trainable: which modules learn, of encoder, adapter and llm, or without an LLM of encoder,
    mim, pool, text, contrastive and omni.  recompute: what is kept for the LLM's backward, see
    train/models/language/llm_recompute.py."""

    steps: int
    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    seed: int
    deterministic: bool
    precision: str
    recompute: str
    trainable: list[str]

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and activations."""
        return torch.bfloat16 if self.precision == "bf16" else torch.float32


@dataclass
class LrScaleConfig:
    """Factors of the learning rate of a part of the model; the router's is on top of the LLM's."""

    encoder: float = 1.0
    adapter: float = 1.0
    llm: float = 1.0
    router: float = 1.0

    def of(self, part: str) -> float:
        """The whole factor of a part; 1 for parts without a key."""
        of_parts = {"encoder": self.encoder, "adapter": self.adapter, "llm": self.llm, "router": self.llm * self.router}
        return of_parts.get(part, 1.0)


@dataclass
class OptimConfig:
    """name: adamw, or lamb where no LLM is trained.  lr rises over warmup_steps and then follows `schedule` (cosine or
    constant) to min_lr.  clip_norm: joint over all modules, 0 for none.  layer_decay: factor of the learning rate from
    each layer of the encoder to the one below, 1 for none.  lr_scale: factors of lr and min_lr by part.  ema: decay of
    the running mean of encoder weights that is kept beside them, 0 for none."""

    name: str
    lr: float
    min_lr: float
    warmup_steps: int
    schedule: str
    betas: list[float]
    eps: float
    weight_decay: float
    clip_norm: float
    layer_decay: float
    lr_scale: LrScaleConfig
    ema: float


@dataclass
class SourceConfig:
    """One source of samples.  shards: paths or brace patterns of indexed WebDataset tars, or one .catalog file.
    weight: its share of the samples against the other sources' weights; null on all sources for shares by size, where
    `repeat` multiplies a source's size and `max_samples` bounds it.  entity_cap: most samples of one entity an epoch.
    rare_domain_copies: how often an epoch holds each sample of a domain that has under half of the mean domain's.
    train_roles: whose turns are trained on.  fps: frames a second taken from a video.  format: that its shards must
    have been indexed as, auto for any."""

    shards: list[str]
    weight: float | None = SourceSettings.weight
    repeat: float = SourceSettings.repeat
    max_samples: int | None = SourceSettings.max_samples
    entity_cap: int | None = SourceSettings.entity_cap
    rare_domain_copies: int = SourceSettings.rare_domain_copies
    train_roles: list[str] = field(default_factory=lambda: list(SourceSettings.train_roles))
    fps: float = SourceSettings.fps
    format: str = SourceSettings.format


@dataclass
class VideoConfig:
    """budget: most visual tokens of one video.  levels: tokens of a frame, falling; the first at which all frames fit
    the budget is taken, and at the last one frames are thinned out evenly until they do."""

    budget: int
    levels: list[int]


@dataclass
class DataConfig:
    """sources: by name, mixed by weight.  tokenizer: a tokenizer.json or a Hugging Face folder.  special_tokens,
    chat: see data/media/tokenizer_files.py.  block_samples: samples packed together; window_shards: shards of a source
    shuffled together.  too_long: cut or refuse a sample longer than a row.  audio_seconds: most sound read of a video,
    0 for none.  workers: processes of a rank that read and decode, 0 for none beside its own thread.  prefetch: steps
    read ahead.  max_skip_rate: share of unreadable samples above which the run stops."""

    sources: dict[str, SourceConfig]
    tokenizer: str
    min_patches: int
    max_patches: int
    max_pixels: int
    video: VideoConfig
    block_samples: int
    window_shards: int
    too_long: str
    audio_seconds: float
    workers: int
    prefetch: int
    max_skip_rate: float
    special_tokens: SpecialTokens = field(default_factory=SpecialTokens)
    chat: ChatConfig = field(default_factory=ChatConfig)


@dataclass
class CheckpointConfig:
    """dir: null for <run.dir>/checkpoints.  every: steps between checkpoints, 0 for only the last.  keep: newest ones
    kept; keep_every: and those whose step is a multiple of it.  resume: go on from the newest valid checkpoint in dir.
    load_from: a run or checkpoint to start from, under any layout, or a place for each part, as in
    {encoder: runs/a, llm: /models/qwen3}; load_modules: which modules to take, null for all that the two share;
    load_optimizer: their Adam moments too.  other_tokenizer: start even where it was trained with another tokenizer.
    allow_changed: keys of the architecture that may differ from the checkpoint's."""

    dir: str | None
    every: int
    keep: int
    keep_every: int
    resume: bool
    load_from: Any
    load_modules: list[str] | None
    load_optimizer: bool
    other_tokenizer: bool = False
    allow_changed: list[str] = field(default_factory=list)


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
    step.  patience_s: the same until the first step is done, while a checkpoint is written or loaded, and in
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
    """dir: where everything of a run goes; name: of its directory in runs/, null for label and time.  label: free text
    that stands in front of both, null for the task."""

    dir: str | None
    name: str | None
    label: str | None


@dataclass
class Config:
    """task: the kind of training, a module of train/tasks."""

    task: str
    model: ModelConfig
    objective: ObjectiveConfig
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

    @property
    def label(self) -> str:
        """What the run is called in logs and in the name of its directory."""
        return self.run.label or self.task

    def layout(self, world: int) -> Layout:
        """The rank layout in a world of `world` ranks; ValueError where it is impossible."""
        p = self.parallel
        layout = Layout(
            world=world,
            tp=p.tp,
            cp=p.cp,
            pp=p.pp,
            vpp=p.vpp,
            ep=p.ep,
            etp=p.etp,  # type: ignore[arg-type]  # None: the layout's choice
            balance_group_size=p.balance_group_size,  # type: ignore[arg-type]
        )
        return replace(layout, cp_comm_type=choose_cp_comm_type(p.cp_comm_type, layout, self.model.llm.kv_heads))

    @property
    def vision(self) -> VisionSpec:
        """Geometry and cost of vision under these settings.  Raises ValueError where they cannot work."""
        model, data = self.model, self.data
        limits = {"min_patches": data.min_patches, "max_patches": data.max_patches}
        return vision_spec(model.encoder, model.connector, model.llm.width, **limits)

    def micro_batches(self, layout: Layout) -> int:
        """Micro-batches of one step in one replica."""
        return self.train.global_batch_size // (layout.dp * self.train.micro_batch_size)

    @property
    def trained_parts(self) -> list[str]:
        """What learns, with `router` where that is in it."""
        routed = "llm" in self.train.trainable and self.model.llm.num_experts > 0
        return [*self.train.trainable, *(["router"] if routed else [])]
