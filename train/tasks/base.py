"""What a task is to the rest of the program: a `Task`, which needs no process group, makes a `Trainer` on every rank.

Task       parts of the model, checks, towers         one object a task, without state
Trainer    engines, prefetched steps, one step        one object a run and rank
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.parallel.grid import Grid
from tandem.parallel.hybrid_step import StepOutput
from tandem.parallel.layout import Layout
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.input.device_prefetcher import DevicePrefetcher

if TYPE_CHECKING:  # both ask the registry for tasks
    from tandem.data.dataset import Data
    from tandem.train.config.schema import Config
    from tandem.train.input.prefetcher import PreparedStep

Accept = Callable[[float, float], bool]  # whether to update, from the loss and the gradient norm


class Engines(Protocol):
    """What a task trains and a checkpoint holds."""

    @property
    def grid(self) -> Grid: ...

    @property
    def by_name(self) -> Mapping[str, EncoderEngine | LLMEngine]: ...


@dataclass(frozen=True)
class StepFacts:
    """What a step did, equal on all ranks: the tokens it went through, its model FLOPs over the world, and numbers of
    this task's own for the metrics."""

    tokens: int
    flops: int
    encoder_flops: int
    load_max_over_mean: float
    more: dict[str, Any]


class Trainer(Protocol):
    """A task at work on this rank."""

    @property
    def engines(self) -> Engines: ...

    def steps(self, count: int) -> DevicePrefetcher:
        """The next `count` steps of the stream, made ready ahead."""

    def step(self, batch: Any, *, timer: PhaseTimer, stop: bool, accept: Accept) -> StepOutput:
        """One training step of what `steps` gave (collective); the same again where it was not accepted."""

    def facts(self, prepared: "PreparedStep[Any]", output: StepOutput) -> StepFacts:
        """What the metrics say of the step."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps besides weights and moments, equal on all ranks."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what `tensors` gave, found in a checkpoint of this task."""


class Task(ABC):
    """One kind of training.

    parts: modules of the model, in order; any of them may be frozen, not all.
    has_llm: whether rows of packed samples go through an LLM; else each sample is a row of its own, for the encoder.
    vocabulary: the part of `model` whose vocab_size the tokenizer must fit.  reads_texts: whether the loss needs them.
    """

    parts: tuple[str, ...]
    has_llm: bool
    vocabulary: str
    reads_texts: bool = True

    @abstractmethod
    def check(self, config: "Config", layout: Layout) -> None:
        """Raises ValueError, one sentence naming keys and values, for settings that cannot work; reads no file."""

    def check_folders(self, config: "Config") -> None:
        """Raises ValueError, one sentence, where a folder that a setting names cannot serve; reads no weights."""
        return None

    @abstractmethod
    def trainer(self, config: "Config", layout: Layout, device: torch.device, data: "Data") -> Trainer:
        """This rank's trainer, with initial weights (collective over the world)."""
