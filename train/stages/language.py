"""stage0, stage1 and stage2: packed rows through encoder, adapter and LLM, by the hybrid step."""

import functools
from collections.abc import Mapping

import torch

from parallel.hybrid_step import StepInput, StepOutput, hybrid_step
from parallel.layout import Layout
from parallel.phases import PhaseTimer
from train.build import Data, build_engines, train_forward, train_loss
from train.config import Config
from train.feed import PreparedStep
from train.flops import step_flops
from train.rows import row_feed
from train.stages import Accept, StepFacts
from train.staging import Staging


class LanguageStage:
    """Trains which of encoder, adapter and llm `train.trainable` names (collective)."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, data: Data):
        self._config, self._data = config, data
        loss = functools.partial(train_loss, domains=len(data.stream.domains))
        self.engines = build_engines(config, layout, device, forward=train_forward, loss=loss)

    def steps(self, count: int) -> Staging:
        grid = self.engines.grid
        feed = row_feed(self._data, self._config, grid, steps=count)
        return Staging(feed, grid.device)

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
            config.model.encoder,
            config.model.llm,
            config.train.trainable,
            plan.patches_I,
            tokens,
            plan.length_S,
        )
        by_domain = zip(domains, loss_D, trained_D, strict=True)
        return StepFacts(
            tokens=tokens,
            flops=flops.total,
            encoder_flops=flops.encoder,
            load_max_over_mean=prepared.share.routes.load_max_over_mean,
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
