"""SigLIP2 of native resolution (NaFlex, Tschannen et al. 2025): patches come cut, positions resize antialiased."""

import math
from dataclasses import dataclass
from typing import Any

from tandem.train.families.encoders.base import EncoderFamily, activation, hidden_act, square
from tandem.train.families.encoders.siglip import DEFAULTS, FIXED, SIZES, UNUSED
from tandem.train.models.encoders.vit import ViTConfig


@dataclass(frozen=True)
class Siglip2(EncoderFamily):
    def read(self, said: dict) -> dict[str, Any]:
        patches = said["num_patches"]
        if (side := math.isqrt(patches)) ** 2 != patches:
            raise ValueError(f"config.json: num_patches={patches} is not supported, only squares")
        return {
            "patch_size": square(said, "patch_size"),
            "positions": "learned",
            "position_grid": side,
            "interpolation": "antialias",
            "activation": activation(said),
        }

    def write(self, model: ViTConfig) -> dict[str, Any]:
        return {
            "patch_size": model.patch_size,
            "num_patches": model.position_grid**2,
            "hidden_act": hidden_act(model),
            "vision_use_head": False,
        }

    def processor_sizes(self, model: ViTConfig) -> dict[str, Any]:
        sizes = {"patch_size": model.patch_size, "max_num_patches": model.position_grid**2}
        return sizes

    def patch(self, model: ViTConfig) -> None:
        return None


FAMILY = Siglip2(
    "siglip2_vision_model",
    "Siglip2VisionModel",
    "Siglip2ImageProcessor",
    sizes=SIZES,
    defaults={**DEFAULTS, "num_patches": 256},
    fixed=FIXED,
    unused=UNUSED,
)
