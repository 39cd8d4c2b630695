"""Families of connectors in Hugging Face's format, one module each: what stands between encoder and language model in a
folder of a whole model.  A module that is added here is a family without an edit elsewhere.
"""

from pathlib import Path
from typing import Any

from tandem.data.registry import Registry
from tandem.train.families.connectors.base import ConnectorFamily
from tandem.train.families.folder import Folder, compare, family_in
from tandem.train.models.connectors.base import ConnectorConfig, Sizes

FAMILIES: Registry[ConnectorFamily] = Registry(__name__, __path__, "FAMILY", "model_type")


def settings_of(folder: str | Path) -> dict[str, Any]:
    """The keys of `model.connector` that a folder decides.  Raises ValueError, naming the folder."""
    family, said = _of_folder(folder)
    return {"kind": family.kind, "merge": family.merge(said), "options": dict(family.options)}


def open_folder(folder: str | Path, config: ConnectorConfig, sizes: Sizes) -> Folder:
    """The weights in a folder.  Raises ValueError where it is not a connector of these settings and sizes."""
    compare(config, settings_of(folder), "connector", folder)
    family, said = _of_folder(folder)
    if (widths := family.widths(said)) != (sizes.width, sizes.llm_width):
        raise ValueError(
            f"model.connector.folder={folder}: its connector stands between an encoder of width {widths[0]} and an LLM "
            f"of width {widths[1]}, here they have {sizes.width} and {sizes.llm_width}; name the folder as "
            "model.encoder.folder and model.llm.folder too"
        )
    try:
        return Folder(folder, family, sizes, family.prefixes)
    except ValueError as error:
        raise ValueError(f"model.connector.folder={error}") from error


def of_model(config: ConnectorConfig) -> ConnectorFamily | None:
    """A family that can hold this connector."""
    found = (FAMILIES.find(name) for name in FAMILIES.names())
    return next((each for each in found if (each.kind, each.options) == (config.kind, dict(config.options))), None)


def _of_folder(folder: str | Path) -> tuple[ConnectorFamily, dict]:
    return family_in(folder, FAMILIES, "model.connector.folder")
