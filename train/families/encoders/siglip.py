"""SigLIP (Zhai et al. 2023), and SigLIP2 of fixed resolution, which transformers has as SigLIP."""

from dataclasses import dataclass
from typing import Any

from tandem.train.families.encoders.base import EncoderFamily, activation, hidden_act, square
from tandem.train.families.encoders.tensors import Convolution
from tandem.train.models.encoders.vit import ViTConfig

SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "num_attention_heads": "heads",
    "layer_norm_eps": "norm_eps",
}
FIXED = {"num_channels": 3, "attention_dropout": 0.0}
DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
UNUSED = {
    r"text_model\.|logit_(scale|bias)$": "not of the encoder",
    r"head\.": "the pooling head, not of the encoder",
    r"embeddings\.position_ids$": "no weight",
}


@dataclass(frozen=True)
class Siglip(EncoderFamily):
    def read(self, said: dict) -> dict[str, Any]:
        size, patch = square(said, "image_size"), square(said, "patch_size")
        return {
            "patch_size": patch,
            "positions": "learned",
            "position_grid": size // patch,
            "interpolation": "bicubic",
            "activation": activation(said),
        }

    def write(self, model: ViTConfig) -> dict[str, Any]:
        return {
            "patch_size": model.patch_size,
            "image_size": model.position_grid * model.patch_size,
            "hidden_act": hidden_act(model),
            "vision_use_head": False,
        }

    def processor_sizes(self, model: ViTConfig) -> dict[str, Any]:
        side = model.position_grid * model.patch_size
        return {"size": {"height": side, "width": side}}

    def patch(self, model: ViTConfig) -> Convolution:
        return Convolution(0, model.patch_size)


FAMILY = Siglip(
    "siglip_vision_model",
    "SiglipVisionModel",
    "SiglipImageProcessor",
    sizes=SIZES,
    defaults={**DEFAULTS, "image_size": 224},
    fixed=FIXED,
    unused=UNUSED,
)
