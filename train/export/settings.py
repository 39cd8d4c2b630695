"""A model's settings as the configuration files of an exported folder, read by the sources in train/export/remote.

What those sources cannot compute is refused by name.
"""

import dataclasses
from typing import Any

from tandem.train.config.schema import ModelConfig
from tandem.train.families.base import Family
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import ViTConfig

CODE = {"config": "configuration_tandem", "model": "modeling_tandem", "processor": "processing_tandem"}
CONNECTORS = ("mlp",)  # of the modeling file
# Field of the exported configuration to key of model.encoder; whatever else an encoder has must be at its default.
ENCODER = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
    "rope_theta": "rope_base",
    "patch_size": "patch_size",
    "image_mean": "image_mean",
    "image_std": "image_std",
}
SWITCHES = (  # of one name there and here
    *("positions", "position_grid", "interpolation", "class_token", "pre_norm", "final_norm", "norm", "activation"),
    *("bias", "patch_bias", "frames", "window", "whole_layers"),
)
OF_TRAINING = ("drop_path", "folder", "feature_layer")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def vision(encoder: ViTConfig, connector: ConnectorConfig) -> dict[str, Any]:
    """The encoder's configuration.  Raises ValueError for a setting that the modeling file does not have."""
    written, plain = {*ENCODER.values(), *SWITCHES, *OF_TRAINING, "mlp_ratio"}, ViTConfig()
    for field in dataclasses.fields(encoder):
        value = getattr(encoder, field.name)
        if field.name not in written and value != getattr(plain, field.name):
            raise ValueError(f"model.encoder.{field.name}={value}: the exported encoder cannot have this yet")
    switches = {key: getattr(encoder, key) for key in SWITCHES}
    out = {name: getattr(encoder, key) for name, key in ENCODER.items()}
    out["intermediate_size"] = encoder.mlp_width
    return {"model_type": "tandem_vision", "kind": "vit", "merge": connector.merge, **out, **switches}


def encoder_alone(encoder: ViTConfig, connector: ConnectorConfig, dtype: str) -> dict[str, Any]:
    """config.json of a folder with the encoder alone."""
    return {
        **vision(encoder, connector),
        "architectures": ["TandemVisionModel"],
        "dtype": DTYPES[dtype],
        "auto_map": {
            "AutoConfig": f"{CODE['config']}.TandemVisionConfig",
            "AutoModel": f"{CODE['model']}.TandemVisionModel",
        },
    }


def whole(model: ModelConfig, family: Family, dtype: str, image_token_id: int) -> dict[str, Any]:
    """config.json of a folder with the whole model.  Raises ValueError for a connector or positions that it cannot
    have."""
    connector = model.connector
    if connector.kind not in CONNECTORS:
        kinds = ", ".join(CONNECTORS)
        raise ValueError(
            f"model.connector.kind={connector.kind}: the exported model cannot have this yet, only {kinds}"
        )
    if model.llm.mrope_sections is not None:
        raise ValueError(
            f"model.llm.mrope_sections={list(model.llm.mrope_sections)}: the exported model can have this only beside "
            f"the encoder and the connector of a {family.architecture}; --part llm exports the language model"
        )
    text = family.config(model.llm, DTYPES[dtype])
    return {
        "architectures": ["TandemForConditionalGeneration"],
        "model_type": "tandem",
        "dtype": DTYPES[dtype],
        "auto_map": {
            "AutoConfig": f"{CODE['config']}.TandemConfig",
            "AutoModelForImageTextToText": f"{CODE['model']}.TandemForConditionalGeneration",
        },
        "image_token_id": image_token_id,
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        "connector": {"kind": connector.kind, "options": dict(connector.options)},
        "vision_config": vision(model.encoder, connector),
        "text_config": text,
    }
