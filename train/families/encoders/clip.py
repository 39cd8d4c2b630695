"""CLIP (Radford et al. 2021): a class token, a norm before the layers, quick GELU.

The model's own features of patches have no norm; its last one is of the class token alone, which no LLM is given.
"""

from dataclasses import dataclass
from typing import Any

from tandem.train.families.encoders.base import hidden_act
from tandem.train.families.encoders.siglip import DEFAULTS, FIXED, SIZES, UNUSED, Siglip
from tandem.train.models.encoders.vit import ViTConfig


@dataclass(frozen=True)
class Clip(Siglip):
    def read(self, said: dict) -> dict[str, Any]:
        return super().read(said) | {"class_token": True, "pre_norm": True, "patch_bias": False}

    def write(self, model: ViTConfig) -> dict[str, Any]:
        side = model.position_grid * model.patch_size
        return {"patch_size": model.patch_size, "image_size": side, "hidden_act": hidden_act(model)}

    def processor_sizes(self, model: ViTConfig) -> dict[str, Any]:
        side = model.position_grid * model.patch_size
        return {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}


FAMILY = Clip(
    "clip_vision_model",
    "CLIPVisionModel",
    "CLIPImageProcessor",
    sizes=SIZES,
    defaults={**DEFAULTS, "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5},
    fixed={**FIXED, "dropout": 0.0},
    unused={**UNUSED, r"(text|visual)_projection\.": "not of the encoder"},
    final_norm=False,
    either=True,
)
