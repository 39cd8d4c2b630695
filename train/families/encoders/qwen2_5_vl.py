"""The vision tower of Qwen2.5-VL (Bai et al. 2025).

RMSNorm, SwiGLU, 2D rotary positions, windows in most layers, a patch embedding of two frames.

Its merger is a connector, with the norm before it, and not part of the encoder.  An image is two equal frames to the
patch embedding, as transformers makes of one; here every frame of a video is an image of its own.
"""

from dataclasses import dataclass
from typing import Any

from tandem.train.families.encoders.base import EncoderFamily, square
from tandem.train.families.encoders.tensors import Convolution, Names
from tandem.train.models.encoders.vit import ViTConfig

MERGE = 2  # of the models that are written: windows are whole blocks of it
SIZES = {"hidden_size": "width", "depth": "depth", "num_heads": "heads"}
DEFAULTS = {
    "depth": 32,
    "hidden_size": 3584,
    "hidden_act": "silu",
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": None,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "out_hidden_size": 3584,
    "tokens_per_second": 4,
    "rope_parameters": None,
}
NAMES = Names(
    patch="patch_embed.proj",
    layer="blocks.{layer}.",
    norms=("norm1", "norm2"),
    qkv=("attn.qkv",),
    projection="attn.proj",
    up=("mlp.gate_proj", "mlp.up_proj"),
    down="mlp.down_proj",
)


@dataclass(frozen=True)
class Tower(EncoderFamily):
    def read(self, said: dict) -> dict[str, Any]:
        rope = said["rope_parameters"] or {}
        if rope.get("rope_type", "axial") not in ("axial", "default") or rope.keys() - {"rope_type", "rope_theta"}:
            raise ValueError(f"config.json: rope_parameters={rope} is not supported, only axial and its rope_theta")
        patch, merge = square(said, "patch_size"), said["spatial_merge_size"]
        whole = sorted(set(said["fullatt_block_indexes"]) & set(range(said["depth"])))
        return {
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "activation": "swiglu",
            "rope_base": float(rope.get("rope_theta", 10000.0)),
            "patch_size": patch,
            "patch_bias": False,
            "frames": said["temporal_patch_size"],
            "window": said["window_size"] // merge // patch * merge,
            "whole_layers": whole,
        }

    def write(self, model: ViTConfig) -> dict[str, Any]:
        return {
            "patch_size": model.patch_size,
            "temporal_patch_size": model.frames,
            "window_size": model.window * model.patch_size,
            "fullatt_block_indexes": list(model.whole_layers),
            "rope_parameters": {"rope_type": "axial", "rope_theta": model.rope_base},
            "out_hidden_size": model.width,
        }

    def processor_sizes(self, model: ViTConfig) -> dict[str, Any]:
        sizes = {"patch_size": model.patch_size, "temporal_patch_size": model.frames, "merge_size": MERGE}
        return sizes

    def patch(self, model: ViTConfig) -> Convolution:
        return Convolution(model.frames, model.patch_size)

    def fills(self, model: ViTConfig) -> dict[str, tuple[tuple[int, ...], float]]:
        wide = model.width * MERGE**2
        return {
            "merger.ln_q.weight": ((model.width,), 1.0),
            "merger.mlp.0.weight": ((wide, wide), 0.0),
            "merger.mlp.0.bias": ((wide,), 0.0),
            "merger.mlp.2.weight": ((model.width, wide), 0.0),
            "merger.mlp.2.bias": ((model.width,), 0.0),
        }


FAMILY = Tower(
    "qwen2_5_vl_vision",
    "Qwen2_5_VisionTransformerPretrainedModel",
    "Qwen2VLImageProcessor",
    sizes=SIZES,
    defaults=DEFAULTS,
    fixed={"in_channels": 3, "in_chans": 3, "hidden_act": "silu"},
    unused={r"merger\.": "the merger, a connector", r"(model|lm_head)\.": "not of the encoder"},
    names=NAMES,
    prefixes=("visual.", "model.visual.", ""),
    final_norm=False,
    call='model(inputs["pixel_values"], inputs["image_grid_thw"])',
)
