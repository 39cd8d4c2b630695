"""Rotary positions of the LLM: which channels of a head turn, how fast, and scaled for longer contexts how.

    linear   f / factor                                          (Chen et al. 2023, 2306.15595)
    llama3   f of short waves, f / factor of long ones, a line between        (Grattafiori et al. 2024)
    yarn     f of fast channels, f / factor of slow ones, a ramp between; cosines and sines times an attention factor
             (Peng et al. 2023, 2309.00071)

with f = base^(-2j / width), j < width / 2.  Names and numbers of a scaling are those of transformers'
`rope_parameters`.

M-RoPE (Qwen2-VL, 2409.12191, section 2.1) turns each frequency by one of three positions, (t, y, x): with `sections`
(2, 1, 1) the four frequencies turn by t t y x, interleaved (Qwen3-VL) by t y x t.

Legend: S tokens, J = width / 2 frequencies, K the channels that turn.
"""

import math
from collections.abc import Sequence
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


def check_sections(sections: Sequence[int] | None, interleaved: bool, width: int) -> None:
    """Raises ValueError for a `model.llm.mrope_sections` that does not divide the frequencies of `width` channels."""
    key, places = "model.llm.mrope_sections", width // 2
    if sections is None:
        if interleaved:
            raise ValueError(f"model.llm.mrope_interleaved=true needs {key}")
        return
    if len(sections) != 3 or min(sections) < 0 or sum(sections) != places:
        raise ValueError(f"{key}={list(sections)}: must be three numbers, for t, y and x, whose sum is {places}")
    if interleaved and any(axis + 3 * (sections[axis] - 1) >= places for axis in (1, 2)):
        raise ValueError(
            f"{key}={list(sections)} with model.llm.mrope_interleaved=true: y and x take a third of the frequencies "
            f"at most, there are not enough of {places}"
        )


@dataclass(frozen=True)
class Rope:
    """width: channels of a head that turn, the first ones.  scaling: as `check_scaling` passes it, empty for
    none.  sections, interleaved: as `check_sections` does; None for one position a token."""

    width: int
    base: float
    scaling: dict[str, Any] = field(default_factory=dict)
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [S, K], fp32, times the attention factor; positions: [S], or [S, 3] with sections."""
        cos_SK, sin_SK = tables(self._angles(positions.float(), self.frequencies(positions.device)))
        factor = self.attention_factor
        return (cos_SK, sin_SK) if factor == 1 else (cos_SK * factor, sin_SK * factor)

    def _angles(self, positions: torch.Tensor, frequencies_J: torch.Tensor) -> torch.Tensor:
        """[S, J].  Slices alone, so that no index is copied to the device."""
        if self.sections is None:
            assert positions.dim() == 1, "three positions a token, and no sections"
            return positions[:, None] * frequencies_J
        assert positions.dim() == 2, "sections, and one position a token"
        t, y, x = positions.split(1, dim=1)
        if not self.interleaved:
            parts_J = frequencies_J.split(self.sections)
            return torch.cat([place * part_J for place, part_J in zip((t, y, x), parts_J, strict=True)], dim=1)
        angles_SJ = t * frequencies_J
        for axis, place in ((1, y), (2, x)):
            here = slice(axis, 3 * self.sections[axis], 3)
            angles_SJ[:, here] = place * frequencies_J[here]
        return angles_SJ

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
