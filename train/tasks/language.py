"""Rows of packed samples through encoder, adapter and LLM, by the hybrid step: the report's stages 0, 1 and 2."""

import functools
from collections.abc import Mapping

import torch

from tandem.data.dataset import Data
from tandem.parallel.hybrid_step import StepInput, StepOutput, hybrid_step
from tandem.parallel.layout import Layout
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.build import build_engines
from tandem.train.config.schema import Config
from tandem.train.cost.flops import step_flops
from tandem.train.input.device_prefetcher import DevicePrefetcher
from tandem.train.input.prefetcher import PreparedStep
from tandem.train.input.rows import row_prefetcher
from tandem.train.models.language.llm_spec import choose_kernels
from tandem.train.objectives.language import train_forward, train_loss
from tandem.train.tasks.base import Accept, StepFacts, Task


class LanguageTrainer:
    """Trains which of encoder, adapter and llm `train.trainable` names (collective)."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, data: Data):
        self._config, self._data = config, data
        loss = functools.partial(train_loss, domains=len(data.stream.domains))
        self.engines = build_engines(config, layout, device, forward=train_forward, loss=loss)

    def steps(self, count: int) -> DevicePrefetcher:
        grid = self.engines.grid
        prefetcher = row_prefetcher(self._data, self._config, grid, steps=count)
        return DevicePrefetcher(prefetcher, grid.device)

    def step(self, batch: StepInput, *, timer: PhaseTimer, stop: bool, accept: Accept) -> StepOutput:
        return hybrid_step(
            self.engines,
            batch,
            report_shape=(2, len(self._data.stream.domains)),
            clip_norm=self._config.optim.clip_norm,
            replay=self._config.parallel.encoder.recompute == "replay",
            stop=stop,
            timer=timer,
            accept=accept,
        )

    def facts(self, prepared: PreparedStep, output: StepOutput) -> StepFacts:
        config, plan, domains = self._config, prepared.plan, self._data.stream.domains
        loss_D, trained_D = output.report
        tokens = config.train.global_batch_size * config.train.seq_length
        flops = step_flops(
            config.vision,
            config.model.llm,
            config.train.trainable,
            plan.grid_hw_I2,
            tokens,
            plan.length_S,
        )
        by_domain = zip(domains, loss_D, trained_D, strict=True)
        return StepFacts(
            tokens=tokens,
            flops=flops.total,
            encoder_flops=flops.encoder,
            load_max_over_mean=prepared.rank_shard.routes.load_max_over_mean,
            more={
                "trained_tokens": prepared.trained_tokens,
                "fill": float(plan.length_S.sum() / tokens),
                "visual_tokens": int(plan.tokens_I.sum()),
                "cut": int(plan.cut_S.sum()),
                "loss_by_domain": {name: float(loss / count) for name, loss, count in by_domain if count},
            },
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class LanguageTask(Task):
    parts = ("encoder", "adapter", "llm")
    has_llm = True
    vocabulary = "llm"

    def check(self, config: Config, layout: Layout) -> None:
        config.model.llm.check(layout)
        choose_kernels(config.parallel.kernels, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        _check_batch(config, layout)
        if config.data.audio_seconds > 0:
            seconds = config.data.audio_seconds
            raise ValueError(f"data.audio_seconds={seconds}: task=language has no use for sound, set it to 0")
        if config.optim.name == "lamb" and "llm" in config.train.trainable:
            raise ValueError(
                "optim.name=lamb: the LLM is trained by AdamW alone; set optim=adamw, or leave llm out of "
                "train.trainable"
            )

    def trainer(self, config: Config, layout: Layout, device: torch.device, data: Data) -> LanguageTrainer:
        return LanguageTrainer(config, layout, device, data)


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
    if config.vision.most_tokens + config.vision.marks > t.seq_length:
        raise ValueError(
            f"train.seq_length={t.seq_length} is shorter than one image of data.max_patches="
            f"{config.data.max_patches} ({config.vision.most_tokens} tokens)"
        )


TASK = LanguageTask()
