"""What a recipe does in the loop that the others do not: one class a family of recipes, one interface.

language.py   stage0, stage1, stage2: rows of tokens and images through encoder, adapter and LLM
vision.py     vit_mim, vit_contrastive, vit_omni: samples through the encoder and an objective
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from parallel.encoder_engine import EncoderEngine
from parallel.grid import Grid
from parallel.hybrid_step import StepOutput
from parallel.llm_engine import LLMEngine
from parallel.phases import PhaseTimer
from train.feed import PreparedStep
from train.staging import Staging

Accept = Callable[[float, float], bool]  # whether to update, from the loss and the gradient norm


class Engines(Protocol):
    """What a stage trains and a checkpoint holds."""

    grid: Grid

    @property
    def by_name(self) -> Mapping[str, EncoderEngine | LLMEngine]: ...


@dataclass(frozen=True)
class StepFacts:
    """What a step did, equal on all ranks: the tokens it went through, its model FLOPs over the world, and numbers of
    this stage's own for the metrics."""

    tokens: int
    flops: int
    encoder_flops: int
    load_max_over_mean: float
    more: dict[str, Any]


class Stage(Protocol):
    """One recipe at work on this rank."""

    engines: Engines

    def steps(self, count: int) -> Staging:
        """The next `count` steps of the stream, made ready ahead."""

    def step(self, batch: Any, *, timer: PhaseTimer, stop: bool, accept: Accept) -> StepOutput:
        """One training step of what `steps` gave (collective); the same again where it was not accepted."""

    def facts(self, prepared: PreparedStep, output: StepOutput) -> StepFacts:
        """What the metrics say of the step."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps besides weights and moments, equal on all ranks."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what `tensors` gave, found in a checkpoint of this run."""
