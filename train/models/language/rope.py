"""Rotary positions of the LLM: which channels of a head turn, how fast, and scaled for longer contexts how.

    linear   f / factor                                          (Chen et al. 2023, 2306.15595)
    llama3   f of short waves, f / factor of long ones, a line between        (Grattafiori et al. 2024)
    yarn     f of fast channels, f / factor of slow ones, a ramp between; cosines and sines times an attention factor
             (Peng et al. 2023, 2309.00071)

with f = base^(-2j / width), j < width / 2.  Names and numbers of a scaling are those of transformers'
`rope_parameters`.

Legend: S tokens, J = width / 2 frequencies, K the channels that turn.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from tandem.train.models.layers.rotary import axis_frequencies, tables

POSITIVE = ("factor", "original_max_position_embeddings")
NEEDED = {
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings"},
}
MORE = {"yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}}


def check_scaling(scaling: dict[str, Any] | None) -> None:
    """Raises ValueError for a `model.llm.rope_scaling` that is not whole, or has more than its kind uses."""
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in NEEDED:
        raise ValueError(f"model.llm.rope_scaling.rope_type={kind}: must be one of {', '.join(NEEDED)}")
    given = scaling.keys() - {"rope_type"}
    if missing := NEEDED[kind] - given:
        raise ValueError(f"model.llm.rope_scaling: {kind} needs {', '.join(sorted(missing))}")
    if unused := given - NEEDED[kind] - MORE.get(kind, set()):
        raise ValueError(f"model.llm.rope_scaling: {kind} does not use {', '.join(sorted(unused))}")
    for name in given - {"truncate"}:
        value, least = scaling[name], 0 if name not in POSITIVE else 1
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise ValueError(f"model.llm.rope_scaling.{name}={value}: must be a number of at least {least}")
    if kind == "llama3" and scaling["low_freq_factor"] >= scaling["high_freq_factor"]:
        raise ValueError(
            f"model.llm.rope_scaling.low_freq_factor={scaling['low_freq_factor']}: must be below high_freq_factor="
            f"{scaling['high_freq_factor']}"
        )


@dataclass(frozen=True)
class Rope:
    """width: channels of a head that turn, the first ones.  scaling: as `check_scaling` passes it, empty for none."""

    width: int
    base: float
    scaling: dict[str, Any] = field(default_factory=dict)

    def tables(self, positions_S: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [S, K], fp32, times the attention factor."""
        frequencies_J = self.frequencies(positions_S.device)
        cos_SK, sin_SK = tables(positions_S.float()[:, None] * frequencies_J)
        factor = self.attention_factor
        return (cos_SK, sin_SK) if factor == 1 else (cos_SK * factor, sin_SK * factor)

    def frequencies(self, device: torch.device) -> torch.Tensor:
        """Radians per position, [J]."""
        plain_J = axis_frequencies(self.width, self.base, device)
        if not self.scaling:
            return plain_J
        return {"linear": self._linear, "llama3": self._llama3, "yarn": self._yarn}[self.scaling["rope_type"]](plain_J)

    @property
    def attention_factor(self) -> float:
        """What queries and keys are multiplied by: yarn's correction of the logits' temperature, else 1."""
        if self.scaling.get("rope_type") != "yarn":
            return 1.0
        if (given := self.scaling.get("attention_factor")) is not None:
            return float(given)
        over, under = self.scaling.get("mscale"), self.scaling.get("mscale_all_dim")
        if over and under:
            return self._mscale(over) / self._mscale(under)
        return self._mscale(1.0)

    def _mscale(self, weight: float) -> float:
        return 0.1 * weight * math.log(self.scaling["factor"]) + 1.0

    def _linear(self, plain_J):
        return plain_J / self.scaling["factor"]

    def _llama3(self, plain_J):
        low, high = self.scaling["low_freq_factor"], self.scaling["high_freq_factor"]
        turns_J = self.scaling["original_max_position_embeddings"] * plain_J / (2 * math.pi)
        kept_J = ((turns_J - low) / (high - low)).clamp(0, 1)
        return plain_J * (kept_J + (1 - kept_J) / self.scaling["factor"])

    def _yarn(self, plain_J):
        low, high = (self._channel_of(turns) for turns in (self._given("beta_fast", 32), self._given("beta_slow", 1)))
        if self.scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.width - 1)
        places_J = torch.arange(len(plain_J), dtype=torch.float32, device=plain_J.device)
        scaled_J = ((places_J - low) / max(high - low, 0.001)).clamp(0, 1)
        return plain_J * (1 - scaled_J + scaled_J / self.scaling["factor"])

    def _channel_of(self, turns: float) -> float:
        """The channel, not a whole number, that turns so often within the original context."""
        length = self.scaling["original_max_position_embeddings"]
        return self.width * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(self.base))

    def _given(self, name: str, usual: float) -> float:
        return self.scaling.get(name) or usual
