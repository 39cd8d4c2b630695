"""Seed-ViT: a plain pre-norm ViT at native resolution over packed images (Seed1.5-VL report, section 2.1.1, Table 1).

Patches of many images lie end to end; attention stays inside an image; 2D rotary positions, half of every head for the
row and half for the column, need no table to resize.  Patches come in blocks of merge x merge, so that pooling is a
mean over neighbours in memory (data/vision.py).  At full size (27 x 1280, MLP 5120, biases everywhere) this is
532,047,360 parameters.

Legend: N patches, P values a patch, D width, K head width, I images, L = 2 * depth residual branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tandem.data.vision import CHANNELS, VisionSpec, patch_values
from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments
from tandem.train.models.layers.blocks import Block, run_blocks
from tandem.train.models.layers.rotary import axis_angles, tables


@dataclass
class ViTConfig:
    """Sizes of the encoder; the defaults are the report's.

    drop_path: chance that an image skips a residual branch of the last block, falling linearly to the first; the
    factors come with the images.  patch_size: pixels a side of a patch.  image_mean, image_std: of pixel values from 0
    to 1, by channel, by which they are normalised.  `VisionSpec` checks these three.
    """

    width: int = 1280
    depth: int = 27
    heads: int = 20
    mlp_ratio: float = 4.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    drop_path: float = 0.0
    patch_size: int = VisionSpec.patch_size
    image_mean: list[float] = field(default_factory=lambda: list(VisionSpec.mean))
    image_std: list[float] = field(default_factory=lambda: list(VisionSpec.std))

    def __post_init__(self):
        for key in ("width", "depth", "heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.encoder.{key}={getattr(self, key)}: must be at least 1")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"model.encoder.width={self.width} over model.encoder.heads={self.heads}: "
                "each head needs a multiple of 4 channels, half for rows and half for columns"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.encoder.drop_path={self.drop_path}: must be from 0 to below 1")


@dataclass(frozen=True)
class PackedImages:
    """Patches of I images end to end, uint8 [N, P], with what attention and rotary positions need.

    keep_LI: fp32 factors of each image's residual branches (`masking.drop_path_factors`), None for all ones.
    """

    patches_NP: torch.Tensor
    positions_N2: torch.Tensor
    segments: Segments
    keep_LI: torch.Tensor | None = None

    @staticmethod
    def of(
        patches_NP: np.ndarray,
        positions_N2: np.ndarray,
        patches_I,
        device: torch.device,
        keep_LI: np.ndarray | None = None,
    ) -> "PackedImages":
        """Moves packed patches to `device`; patches_I counts the patches of each image."""
        return PackedImages(
            host_to_device(patches_NP, device),
            host_to_device(positions_N2, device),
            Segments.of(patches_I, device=device),
            None if keep_LI is None else host_to_device(keep_LI, device),
        )

    @staticmethod
    def blank(vision: VisionSpec, device: torch.device) -> "PackedImages":
        """One small black image: what a rank without images encodes, with a zero gradient."""
        positions_N2 = vision.positions([vision.blank_grid])
        patches_NP = np.zeros((len(positions_N2), vision.patch_values), dtype=np.uint8)
        return PackedImages.of(patches_NP, positions_N2, [len(positions_N2)], device)


class SeedViT(nn.Module):
    """Packed images to one feature a patch, [N, D]; pooling is `pool`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(patch_values(config.patch_size), config.width)
        sizes = (config.width, config.heads, config.mlp_ratio, config.norm_eps)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: PackedImages, recompute: str = "none") -> torch.Tensor:
        """Features of every patch; recompute: what is kept for the backward, see `run_blocks`."""
        x_ND = self.embed(images.patches_NP)
        return self.trunk(x_ND, *self.rotary(images.positions_N2), images.segments, recompute, images.keep_LI)

    def embed(self, patches_NP: torch.Tensor) -> torch.Tensor:
        """Linear embedding of uint8 patches, which it normalises."""
        dtype = self.patch_embedding.bias.dtype  # of the bias: ZeRO-3 keeps whatever weight is touched here gathered
        normalised_NP = normalise(patches_NP, self.config.image_mean, self.config.image_std)
        return self.patch_embedding(normalised_NP.to(dtype))

    def trunk(self, x_ND, cos_NK, sin_NK, segments: Segments, recompute: str = "none", keep_LI=None) -> torch.Tensor:
        """Embedded tokens through all blocks and the final norm."""
        return self.final_norm(run_blocks(self.blocks, x_ND, cos_NK, sin_NK, segments, recompute, keep_LI))

    def rotary(self, positions_N2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines [N, K] of (y, x) positions."""
        return grid_rotary(positions_N2, self.config.width // self.config.heads, self.config.rope_base)


def grid_rotary(positions_N2: torch.Tensor, head_width: int, base: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [N, K]: half of every head turns with y, half with x."""
    angles = [axis_angles(positions_N2[:, axis], head_width // 2, base) for axis in (0, 1)]
    return tables(torch.cat(angles, dim=-1))


def normalise(patches_NP: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(x / 255 - mean) / std of uint8 patches, by channel, as x / (255 std) - mean / std in fp32.

    Means and deviations are numbers of the host, so nothing waits for the device; equal channels are one operation.
    """
    x_NP = patches_NP.float()
    scales = [(255 * s, m / s) for m, s in zip(mean, std, strict=True)]
    if len(set(scales)) == 1:
        scale, shift = scales[0]
        return x_NP / scale - shift
    channels = zip(x_NP.unflatten(1, (-1, CHANNELS)).unbind(-1), scales, strict=True)
    return torch.stack([channel / scale - shift for channel, (scale, shift) in channels], dim=-1).flatten(1)


def pool(features_ND: torch.Tensor, merge: int) -> torch.Tensor:
    """Mean over each block of merge x merge patches, [N / merge^2, D]: one LLM token for each."""
    return features_ND.unflatten(0, (-1, merge * merge)).mean(dim=1)
