"""A vision transformer of Hugging Face as teacher: CLIP, SigLIP, SigLIP2 of fixed resolution, DINOv2, ViT, EVA-02.

A model of the families in SERVED will do that takes square images of one size and returns g * g patch features, with or
without one class token before them.  A feature is the patch's last hidden state after the model's final norm
and, where the model has one (CLIP), after its visual projection.  CLIP norms only its class token: here the same norm
is laid on the patches.  Which it is, is seen in one trial run at load.  The report's teacher, EVA-02-CLIP-E, is there
as a folder of timm's, which transformers reads where timm is installed.

Legend: N patches of I images, C teacher width, D hidden width, T tokens, g patches a side, S pixels a side, n images of
one size that are h x w of the student's patches.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tandem.data.vision import CHANNELS, VisionSpec
from tandem.train.models.encoders.vit import PackedImages
from tandem.train.models.pretrained.hugging_face import (
    first_line,
    load,
    normalisation,
    read_config,
    single_number,
    transformers_for,
    weight_names,
)

SERVED = (  # model types that are tried; what siglip2, registers and deit give does not map onto a grid, and says so
    *("clip", "clip_vision_model", "siglip", "siglip_vision_model", "siglip2", "siglip2_vision_model"),
    *("dinov2", "dinov2_with_registers", "vit", "vit_msn", "deit", "beit", "data2vec-vision", "ijepa", "timm_wrapper"),
)
IMAGES_AT_ONCE = 64  # all of them resized to the model's square
MOST_DOWN = 32  # an antialiased downscale beyond about 90 wants more shared memory than a GPU's block has
POOLERS = ("pooler", "head.")  # weights behind the features that are used


@dataclass(frozen=True)
class Parts:
    """What is used of a model.

    hidden: normalised pixels [n, 3, S, S] to last hidden states [n, T, D].  norm: the final one, if `hidden` may have
    left it out on patches.  size, grid: pixels and patches a side.  mean, deviation: of pixels from 0 to 1.
    """

    module: nn.Module
    hidden: Callable[[torch.Tensor], torch.Tensor]
    norm: nn.Module | None
    projection: nn.Module | None
    size: int
    grid: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]


def check_folder(folder: Path, what: str) -> None:
    """Raises ValueError, one sentence, for a folder that cannot serve, as far as can be seen without its weights."""
    weight_names(folder, what)
    config = read_config(folder, what, SERVED)
    if config.model_type != "timm_wrapper":
        _sizes(config, what)
        normalisation(folder, config.model_type, what)


class HuggingFaceTeacher:
    """A frozen model from a folder, see the module; width: channels of its features."""

    def __init__(self, folder: Path, what: str, device: torch.device, dtype: torch.dtype, vision: VisionSpec):
        names = weight_names(folder, what)
        config = read_config(folder, what, SERVED)
        if config.model_type == "timm_wrapper":
            parts = _timm_parts(config, folder, what, dtype)
        else:
            parts = _parts(config, folder, names, what, dtype)
        parts.module.to(device).eval().requires_grad_(False)
        self._model, self._size, self._grid, self._dtype = parts.hidden, parts.size, parts.grid, dtype
        self._vision = vision
        self._mean_311, self._deviation_311 = (
            torch.tensor(numbers, device=device)[:, None, None] for numbers in (parts.mean, parts.deviation)
        )
        normed, hidden_width = self._try(parts.norm, what, device)
        self._norm = nn.Identity() if normed or parts.norm is None else parts.norm
        self._projection = parts.projection or nn.Identity()
        self.width = getattr(self._projection, "out_features", hidden_width)

    @torch.no_grad()
    def features(self, images: PackedImages, grid_hw_I2: np.ndarray) -> torch.Tensor:
        """fp32 [N, C] in the order of the patches; grid_hw_I2: patches of each image down and across, on the host."""
        grids = [tuple(grid) for grid in np.asarray(grid_hw_I2).tolist()]
        patches = images.patches_NP.split([h * w for h, w in grids])
        order = sorted(range(len(grids)), key=grids.__getitem__)
        found: list[torch.Tensor] = [patches[0]] * len(grids)  # each is replaced
        for begin in range(0, len(order), IMAGES_AT_ONCE):
            taken = order[begin : begin + IMAGES_AT_ONCE]
            runs = [(grid, list(run)) for grid, run in itertools.groupby(taken, key=grids.__getitem__)]
            images = [pixels_of(torch.cat([patches[i] for i in run]), grid, self._vision) for grid, run in runs]
            pixels = [squared(image, self._size) for image in images]
            features_nCgg = self._patch_features(torch.cat(pixels))
            for (grid, run), part in zip(runs, features_nCgg.split([len(run) for _, run in runs]), strict=True):
                for image, rows in zip(run, regridded(part, grid, self._vision.merge).chunk(len(run)), strict=True):
                    found[image] = rows
        return torch.cat(found)

    def _patch_features(self, pixels_n3SS: torch.Tensor) -> torch.Tensor:
        """[n, C, g, g] of pixels from 0 to 255."""
        hidden_nTD = self._hidden((pixels_n3SS / 255.0 - self._mean_311) / self._deviation_311)
        patch_nTC = self._projection(self._norm(hidden_nTD[:, -(self._grid**2) :]))
        return patch_nTC.transpose(1, 2).unflatten(2, (self._grid, self._grid))

    def _hidden(self, normalised_n3SS: torch.Tensor) -> torch.Tensor:
        return self._model(normalised_n3SS.to(self._dtype))

    @torch.no_grad()
    def _try(self, norm: nn.Module | None, what: str, device: torch.device) -> tuple[bool, int]:
        """(whether the model itself lays its norm on patches, hidden width), from features of one black image."""
        seen, handles = [], []
        if norm is not None:
            handles.append(norm.register_forward_hook(lambda module, inputs, output: seen.append(output.dim())))
        try:
            tokens, width = self._hidden(torch.zeros(1, 3, self._size, self._size, device=device)).shape[1:]
        except (ValueError, TypeError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{what}: gives no features of an image: {first_line(error)}") from error
        finally:
            for handle in handles:
                handle.remove()
        if tokens - self._grid**2 not in (0, 1):
            raise ValueError(
                f"{what}: gives {tokens} tokens for an image, where {self._grid} x {self._grid} patches and at most "
                "one class token are wanted"
            )
        return 3 in seen, width


def _parts(config, folder: Path, names: set[str], what: str, dtype: torch.dtype) -> Parts:
    """Of a model of transformers."""
    size, grid = _sizes(config, what)
    mean, deviation = normalisation(folder, config.model_type, what)
    model = _load_vision(config, folder, names, what, dtype)
    trunk = getattr(model, "vision_model", model)
    return Parts(
        module=model,
        hidden=lambda pixels: trunk(pixel_values=pixels).last_hidden_state,
        norm=getattr(trunk, "post_layernorm", None),
        projection=getattr(model, "visual_projection", None),
        size=size,
        grid=grid,
        mean=mean,
        deviation=deviation,
    )


def _timm_parts(config, folder: Path, what: str, dtype: torch.dtype) -> Parts:
    """Of a model of timm.  Its head is the visual projection where it is a CLIP that was not made a classifier."""
    transformers, said = transformers_for(what), config.pretrained_cfg
    projected = "_clip_" in config.architecture and "_ft_" not in str(said.get("tag")) and config.num_labels > 0
    name = "TimmWrapperForImageClassification" if projected else "TimmWrapperModel"
    model = load(getattr(transformers, name), folder, what, dtype=dtype)
    inner: Any = model.timm_model
    if not hasattr(inner, "patch_embed"):
        raise ValueError(f"{what}: {config.architecture} is not a vision transformer")
    sizes = [
        single_number(x, what, "the model's size") for x in (inner.patch_embed.img_size, inner.patch_embed.grid_size)
    ]
    return Parts(
        module=model,
        hidden=inner.forward_features,
        norm=None if isinstance(inner.fc_norm, nn.Identity) else inner.fc_norm,
        projection=inner.head if projected else None,
        size=sizes[0],
        grid=sizes[1],
        mean=tuple(said["mean"]),
        deviation=tuple(said["std"]),
    )


def _sizes(config, what: str) -> tuple[int, int]:
    """(pixels, patches) a side."""
    vision = getattr(config, "vision_config", config)
    if getattr(vision, "patch_size", None) is not None and hasattr(vision, "num_patches"):
        raise ValueError(f"{what}: {config.model_type} has no fixed resolution; take one of its models that has")
    if getattr(vision, "image_size", None) is None or getattr(vision, "patch_size", None) is None:
        raise ValueError(
            f"{what}: {config.model_type} is not a vision transformer, it has no image_size and patch_size"
        )
    size, patch = (single_number(getattr(vision, key), what, key) for key in ("image_size", "patch_size"))
    if size % patch:
        raise ValueError(f"{what}: image_size={size} is not divisible by patch_size={patch}, so it has no whole grid")
    return size, size // patch


def _load_vision(config, folder: Path, names: set[str], what: str, dtype: torch.dtype) -> nn.Module:
    transformers = transformers_for(what)
    family = config.model_type.removesuffix("_vision_model")
    if family == "clip" and any(name.endswith("visual_projection.weight") for name in names):
        vision_class = transformers.CLIPVisionModelWithProjection
        width = config.projection_dim  # of a whole CLIP: what its vision part says of it is not used and may be wrong
        return load(vision_class, folder, what, dtype=dtype, projection_dim=width)
    if family == "clip":
        vision_class = transformers.CLIPVisionModel
    elif family == "siglip":
        vision_class = transformers.SiglipVisionModel
    else:
        vision_class = transformers.AutoModel
    return load(vision_class, folder, what, unused=POOLERS, dtype=dtype)


# ---- between packed patches and square images ------------------------------------------------------------------------


def pixels_of(patches_NP: torch.Tensor, grid: tuple[int, int], vision: VisionSpec) -> torch.Tensor:
    """uint8 [n, 3, H, W] of n images of this grid of patches that lie end to end, each block by block."""
    (h, w), merge, patch = grid, vision.merge, vision.patch_size
    cut = patches_NP.reshape(-1, h // merge, w // merge, merge, merge, patch, patch, CHANNELS)
    return cut.permute(0, 7, 1, 3, 5, 2, 4, 6).reshape(-1, CHANNELS, *vision.pixels_hw(grid))


def squared(pixels_n3HW: torch.Tensor, size: int) -> torch.Tensor:
    """fp32 [n, 3, size, size] in 0 ... 255: bilinear with antialiasing, whatever the aspect.

    An axis of more than MOST_DOWN * size pixels is first averaged over whole runs of pixels, the last maybe shorter.
    """
    pixels = pixels_n3HW.float()
    runs = tuple(-(-pixels_a_side // (MOST_DOWN * size)) for pixels_a_side in pixels.shape[2:])
    if max(runs) > 1:
        pixels = F.avg_pool2d(pixels, runs, ceil_mode=True)
    return F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)


def regridded(features_nCgg: torch.Tensor, grid: tuple[int, int], merge: int) -> torch.Tensor:
    """fp32 [n * h * w, C] in patch order: bilinear, align_corners=False, so that both grids span the whole image."""
    (h, w), b = grid, merge
    features_nChw = F.interpolate(features_nCgg.float(), (h, w), mode="bilinear", align_corners=False)
    cut = features_nChw.unflatten(3, (w // b, b)).unflatten(2, (h // b, b))  # n C h/b b w/b b
    return cut.permute(0, 2, 4, 3, 5, 1).flatten(0, 4)
