"""Families of image encoders in Hugging Face's format, one module each.  A module that is added here is a family
without an edit elsewhere.
"""

from pathlib import Path
from typing import Any

from tandem.data.registry import Registry
from tandem.train.families.encoders.base import EncoderFamily
from tandem.train.families.folder import Folder, compare, family_in
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.pretrained.hugging_face import normalisation

FAMILIES: Registry[EncoderFamily] = Registry(__name__, __path__, "FAMILY", "model_type")
FREE = ("final_norm",)  # keys whose value a folder proposes and does not impose


def of_folder(folder: str | Path) -> tuple[EncoderFamily, dict]:
    """The family of a folder, and its `config.json`.  Raises ValueError, naming the folder, where there is none."""
    bare = lambda kind: kind.removesuffix("_vision_model").removesuffix("_vision")  # noqa: E731
    return family_in(folder, FAMILIES, "model.encoder.folder", bare)


def settings_of(folder: str | Path, feature_layer: int = -1) -> dict[str, Any]:
    """The keys of `model.encoder` that a folder decides or proposes, with `feature_layer` for the last layer."""
    family, said = of_folder(folder)
    what = f"model.encoder.folder={folder}"
    try:
        out = family.settings(said, feature_layer)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
    mean, std = normalisation(Path(folder), family.model_type, what)
    return out | {"final_norm": family.final_norm, "image_mean": list(mean), "image_std": list(std)}


def open_folder(folder: str | Path, config: ViTConfig) -> Folder:
    """The weights in a folder.  Raises ValueError where it is not an encoder of these settings."""
    family, _ = of_folder(folder)
    found = settings_of(folder, config.feature_layer)
    compare(config, {key: value for key, value in found.items() if key not in FREE}, "encoder", folder)
    if config.final_norm and not (family.final_norm or family.either):
        raise ValueError(
            f"model.encoder.final_norm=true, but model.encoder.folder={folder} has no norm after its layers: "
            "leave model.encoder.final_norm out"
        )
    try:
        return Folder(folder, family, config, family.prefixes)
    except ValueError as error:
        raise ValueError(f"model.encoder.folder={error}") from error


def of_model(config: ViTConfig) -> EncoderFamily | None:
    """A family that can hold this encoder: that of the folder it came from while there is one, else the first."""
    names = FAMILIES.names()
    if config.folder and (Path(config.folder) / "config.json").is_file():
        first, _ = of_folder(config.folder)
        names.sort(key=lambda name: FAMILIES.find(name) is not first)
    return next((family for family in map(FAMILIES.find, names) if family.holds(config)), None)
