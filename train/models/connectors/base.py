"""What a connector is to the rest of the program: settings, a module, and what a token of it costs.

Legend: N patches of whole blocks, D encoder width, V = N / merge^2 visual tokens, E LLM width.
"""

import dataclasses
import difflib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from torch import nn

from tandem.data.vision import VisionSpec


@dataclass
class ConnectorConfig:
    """How features become tokens of the LLM.  kind: a module of train/models/connectors.  merge: a block of merge x
    merge patches becomes one token; `VisionSpec` checks it.  options: settings of this kind alone.  folder: of a whole
    model in Hugging Face's format, from which all of these and initial weights come."""

    kind: str = "mlp"
    merge: int = VisionSpec.merge
    options: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None


@dataclass(frozen=True)
class Sizes:
    """What a connector stands between."""

    width: int
    llm_width: int
    merge: int
    norm_eps: float


@dataclass(frozen=True)
class NoOptions:
    """Of a connector without settings of its own."""


class Connector(ABC):
    """One kind of connector.  Options: a dataclass of its own settings; a field without a default must be set."""

    Options: ClassVar[type] = NoOptions

    @abstractmethod
    def build(self, sizes: Sizes, options: Any) -> nn.Module:
        """Takes features [N, D] in the order of `VisionSpec.cut`, a block's merge^2 patches in a row, to rows [V, E].

        A block's patches belong to one token: rows do not depend on other blocks.
        """

    @abstractmethod
    def token_flops(self, sizes: Sizes, options: Any) -> int:
        """Forward FLOPs of the matrix products of one token."""

    @abstractmethod
    def token_elements(self, sizes: Sizes, options: Any) -> int:
        """Numbers that the backward pass needs of one token."""

    def shapes(self, sizes: Sizes, options: Any) -> list[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter of the module."""
        with torch.device("meta"):
            return [(name, tuple(each.shape)) for name, each in self.build(sizes, options).named_parameters()]

    def parameters(self, sizes: Sizes, options: Any) -> int:
        """Of the module."""
        return sum(math.prod(shape) for _, shape in self.shapes(sizes, options))

    def read(self, options: dict[str, Any]) -> Any:
        """Typed options.  Raises ValueError, naming the key, for one that is unknown, missing or of another type."""
        known = [one.name for one in dataclasses.fields(self.Options)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"model.connector.options.{name}: there is no such option{hint}")
        try:
            return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(self.Options), options))
        except MissingMandatoryValue as error:
            raise ValueError(f"model.connector.options.{error.key} is missing") from error
        except OmegaConfBaseException as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"model.connector.options.{error.key}={options.get(error.key)}: {why}") from error
