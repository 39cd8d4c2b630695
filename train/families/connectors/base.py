"""What a family of connectors is: a kind of ours with its options, and a table of tensors."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tandem.train.families.tensors import Run, Tensor
from tandem.train.models import connectors
from tandem.train.models.connectors.base import ConnectorConfig, Sizes


@dataclass(frozen=True)
class ConnectorFamily(ABC):
    """One family.

    model_type, architecture: of the whole model.  kind, options: of `model.connector`.  names: our tensor to theirs,
    of equal shape.  prefixes: that may stand before theirs.
    """

    model_type: str
    architecture: str
    kind: str
    names: dict[str, str]
    prefixes: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @abstractmethod
    def merge(self, said: dict) -> int:
        """Patches a side of a block that becomes one token, from a config.json."""

    @abstractmethod
    def widths(self, said: dict) -> tuple[int | None, int | None]:
        """Width of the encoder and of the LLM that it stands between, from a config.json."""

    @abstractmethod
    def fields(self, config: ConnectorConfig, sizes: Sizes) -> dict[str, Any]:
        """Fields of the vision_config of the whole model."""

    def tensors(self, model: Sizes) -> Iterator[Tensor]:
        """Every tensor of the connector, by our names."""
        for name, shape in connectors.find(self.kind).shapes(model, connectors.find(self.kind).read(self.options)):
            yield Tensor(name, shape, (Run(self.names[name], 0, 0, shape[0]),))

    def left_out(self, names: Iterable[str], model: Sizes) -> dict[str, str]:
        """Tensors of the folder that are no part of the connector."""
        return {name: "not of the connector" for name in names if not name.startswith(self.prefixes)}
