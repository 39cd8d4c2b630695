"""Connectors, one module each: features of patches become rows of the LLM.  `model.connector.kind: mlp` in a recipe
names `train/models/connectors/mlp.py`, whose `CONNECTOR` builds it and counts its cost.

A module that is added here is a connector without an edit elsewhere; see docs/extending.md.
"""

from tandem.data.registry import Registry
from tandem.train.models.connectors.base import Connector, ConnectorConfig, Sizes
from tandem.train.models.encoders.vit import ViTConfig

CONNECTORS: Registry[Connector] = Registry(__name__, __path__, "CONNECTOR", "model.connector.kind")
names, find = CONNECTORS.names, CONNECTORS.find


def between(encoder: ViTConfig, config: ConnectorConfig, llm_width: int) -> tuple[Connector, Sizes, object]:
    """(kind, sizes, options) of the connector between an encoder and an LLM."""
    kind = find(config.kind)
    return kind, Sizes(encoder.width, llm_width, config.merge, encoder.norm_eps), kind.read(config.options)
