"""Tiny vision models of transformers with random weights, and their features of single images, in our order of patches.

Legend: N patches of one image, D width.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

from tandem.data.vision import VisionSpec
from tandem.train.config.schema import Config
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.encoders.vit import PackedImages
from tests.train.toys import CPU

SIDE = 6  # patches of the models' own images
PATCH = 14
WIDTHS = {"hidden_size": 48, "intermediate_size": 80, "patch_size": PATCH}
SIZES = {**WIDTHS, "num_hidden_layers": 3, "num_attention_heads": 4}
FIXED = {**SIZES, "image_size": SIDE * PATCH}
QWEN = {**WIDTHS, "depth": 3, "num_heads": 4, "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
QWEN |= {"out_hidden_size": 32}
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 60}
TEXT |= {"bos_token_id": 1, "eos_token_id": 2}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**FIXED)),
    "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**FIXED)),
    "siglip2": lambda: transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SIZES, num_patches=SIDE**2)),
    "qwen2_5_vl": lambda: Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**QWEN)),
    "whole siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=FIXED)),
    "whole clip": lambda: transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=FIXED)),
    "projecting clip": lambda: transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**FIXED)),
    "whole qwen2_5_vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            vision_config=QWEN,
            text_config={
                **TEXT,
                "num_key_value_heads": 1,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
            },
        )
    ),
}


def model_of(kind: str) -> torch.nn.Module:
    """With weights so large that every one of them shows in the features."""
    torch.manual_seed(0)
    model = MODELS[kind]().float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model


def saved(kind: str, folder: Path) -> Path:
    """The folder, with the model in it."""
    model_of(kind).save_pretrained(folder / kind)
    return folder / kind


def images(config: Config, grids: list[tuple[int, int]], seed: int = 0) -> tuple[list[np.ndarray], PackedImages]:
    """Noise of these grids: pixels of each image, uint8 [H, W, 3], and all of them packed."""
    vision, generator = config.vision, np.random.default_rng(seed)
    pixels = [generator.integers(0, 256, (*vision.pixels_hw(grid), 3), np.uint8) for grid in grids]
    grids_I2 = np.array(grids)
    packed = (np.concatenate([vision.cut(each) for each in pixels]), vision.positions(grids_I2), grids_I2.prod(1), CPU)
    return pixels, PackedImages.of(*packed, arrangement=Arrangement.of(vision, grids_I2, CPU))


@torch.no_grad()
def features(model: torch.nn.Module, config: Config, pixels_HW3: np.ndarray, *, layer: int = -1) -> torch.Tensor:
    """[N, D], as the class computes them; layer: -1 for `last_hidden_state`, else of `hidden_states`."""
    vision, encoder = config.vision, config.model.encoder
    for name in ("vision_model", "visual"):
        model = getattr(getattr(model, "model", model), name, model)
    mean, std = (torch.tensor(numbers) for numbers in (encoder.image_mean, encoder.image_std))
    normalised_HW3 = (torch.from_numpy(pixels_HW3).float() / 255 - mean) / std
    h, w = (side // vision.patch_size for side in pixels_HW3.shape[:2])
    if encoder.window:
        return _of_windows(model, vision, normalised_HW3, (h, w))
    if encoder.interpolation == "antialias":
        cut = normalised_HW3.unflatten(1, (w, -1)).unflatten(0, (h, -1)).transpose(1, 2).reshape(1, h * w, -1)
        sizes = {
            "pixel_attention_mask": torch.ones(1, h * w, dtype=torch.long),
            "spatial_shapes": torch.tensor([[h, w]]),
        }
        out = model(pixel_values=cut, output_hidden_states=True, **sizes)
    else:
        pixels = {"pixel_values": normalised_HW3.permute(2, 0, 1)[None], "interpolate_pos_encoding": True}
        out = model(**pixels, output_hidden_states=True)
    found = out.last_hidden_state if layer == -1 else out.hidden_states[layer]
    y_N, x_N = torch.from_numpy(vision.positions([(h, w)])).long().T
    return found[0, -h * w :][y_N * w + x_N]


def _of_windows(model, vision: VisionSpec, normalised_HW3: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Of Qwen's tower, which takes patches in our order and gives features window by window."""
    patches = torch.from_numpy(vision.cut(normalised_HW3.numpy())).unflatten(
        1, (vision.patch_size, vision.patch_size, 3)
    )
    frames = patches.permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
    found = model(frames.flatten(1), grid_thw=torch.tensor([[1, *grid]])).last_hidden_state
    order_N, _ = vision.windows([grid])
    return torch.empty_like(found).index_copy(0, torch.from_numpy(order_N), found)
