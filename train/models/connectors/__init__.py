"""Connectors, one module each: features of patches become rows of the LLM.  `model.connector.kind: mlp` in a recipe
names `train/models/connectors/mlp.py`, whose `CONNECTOR` builds it and counts its cost.

A module that is added here is a connector without an edit elsewhere; see docs/extending.md.
"""

from tandem.train.models.connectors.base import Connector
from tandem.train.registry import Registry

CONNECTORS: Registry[Connector] = Registry(__name__, __path__, "CONNECTOR", "model.connector.kind")
names, find = CONNECTORS.names, CONNECTORS.find
