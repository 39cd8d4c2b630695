"""What decides the meaning of weights, shapes equal or not: settings by part of the model, kept in every checkpoint.

A setting that only training sees is left out; every other key of a part's sections counts, new ones too.
"""

import json
from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from tandem.train.config.schema import Config
from tandem.train.models.language.llm_config import NOT_OF_THE_MODEL

# Sections and keys of each part.
PARTS = {
    "encoder": ("model.encoder",),
    "adapter": ("model.connector", "model.encoder.norm_eps"),
    "llm": ("model.llm",),
    "text": ("model.text", "model.embedding"),
    "pool": ("model.embedding", "model.encoder.heads", "model.encoder.norm_eps"),
    "mim": ("objective.mim",),
    "contrastive": ("objective.contrastive",),
    "omni": ("objective.omni",),
}
OF_TRAINING = {
    "model.encoder.drop_path",
    "model.encoder.folder",
    "model.encoder.feature_layer",
    "model.connector.folder",
    *(f"model.llm.{key}" for key in NOT_OF_THE_MODEL),
    *(f"model.llm.balance.{key}" for key in ("bias_update", "by_modality", "aux_loss_type")),  # biases are compared
    "model.text.folder",
    "objective.mim.mask_ratio",
    "objective.contrastive.siglip_weight",
    "objective.contrastive.superclass_weight",
    "objective.omni.matching_weight",
    "objective.omni.caption_weight",
}


def architecture(config: Config) -> dict[str, Any]:
    """{key: value} of every setting that weights of some part depend on, fit for JSON."""
    found: dict[str, Any] = {}
    for sections in PARTS.values():
        for section in sections:
            found |= _flat(section, _select(config, section))
    found |= {f"model.llm.{key}": value for key, value in config.model.llm.architecture.items()}
    return json.loads(json.dumps({key: found[key] for key in sorted(found.keys() - OF_TRAINING)}))


def check_architecture(config: Config, saved: dict[str, Any], parts: Collection[str], path: Path) -> None:
    """Raises ValueError where a checkpoint's parts were of other settings, except those of checkpoint.allow_changed.

    saved: of the checkpoint; a key that is younger than it had its default then.  Empty: it does not say, all fits.
    """
    if not saved:
        return
    now = architecture(config)
    sections = [section for part in parts for section in PARTS.get(part, ())]
    wrong = []
    for key in sorted(now.keys() | saved.keys()):
        if not any(key == section or key.startswith(f"{section}.") for section in sections):
            continue
        was, value = saved.get(key, _default(key)), now.get(key)
        if was != value and was is not MISSING and key not in config.checkpoint.allow_changed:
            wrong.append(f"{key} was {was} and is {value}")
    if wrong:
        raise ValueError(
            f"checkpoint {path}: {', '.join(wrong)}; what is meant can be named in checkpoint.allow_changed"
        )


def _flat(key: str, value: Any) -> dict[str, Any]:
    if is_dataclass(value):
        parts = (_flat(f"{key}.{field.name}", getattr(value, field.name)) for field in fields(value))
        return {name: found for part in parts for name, found in part.items()}
    return {key: value}


def _select(config: Config, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _default(key: str) -> Any:
    """Of the schema; MISSING where it has none or no such key."""
    kind: Any = Config
    for name in key.split("."):
        field = {one.name: one for one in fields(kind)}.get(name) if is_dataclass(kind) else None
        if field is None:
            return MISSING
        kind = field.type
    return field.default_factory() if field.default_factory is not MISSING else field.default
