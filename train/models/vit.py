"""Seed-ViT: a plain pre-norm ViT at native resolution over packed images (Seed1.5-VL report, section 2.1.1, Table 1).

Patches of many images lie end to end; attention stays inside an image; 2D rotary positions, half of every head for the
row and half for the column, need no table to resize.  Patches come in 2x2 blocks, so that pooling is a mean over four
neighbours in memory.  At full size (27 x 1280, MLP 5120, biases everywhere) this is 532,047,360 parameters.

Legend: N patches, P values a patch (14*14*3), D width, H heads, K head width, I images.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parallel.attention import Segments, attention
from parallel.transfer import host_to_device
from train.models.rotary import axis_angles, rotate, tables

PATCH = 14
PATCH_VALUES = PATCH * PATCH * 3


@dataclass
class ViTConfig:
    """Sizes of the encoder; the defaults are the report's."""

    width: int = 1280
    depth: int = 27
    heads: int = 20
    mlp_ratio: float = 4.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        for key in ("width", "depth", "heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.encoder.{key}={getattr(self, key)}: must be at least 1")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(
                f"model.encoder.width={self.width} over model.encoder.heads={self.heads}: "
                "each head needs a multiple of 4 channels, half for rows and half for columns"
            )


@dataclass(frozen=True)
class PackedImages:
    """Patches of I images end to end, uint8 [N, P], with what attention and rotary positions need."""

    patches_NP: torch.Tensor
    positions_N2: torch.Tensor
    segments: Segments

    @staticmethod
    def of(patches_NP: np.ndarray, positions_N2: np.ndarray, patches_I, device: torch.device) -> "PackedImages":
        """Moves packed patches to `device`; patches_I counts the patches of each image."""
        return PackedImages(
            host_to_device(patches_NP, device),
            host_to_device(positions_N2, device),
            Segments.of(patches_I, device=device),
        )

    @staticmethod
    def blank(device: torch.device) -> "PackedImages":
        """One black 2x2-patch image: what a rank without images encodes, with a zero gradient."""
        corner_N2 = np.array([[0, 0], [0, 1], [1, 0], [1, 1]], dtype=np.int32)
        return PackedImages.of(np.zeros((4, PATCH_VALUES), dtype=np.uint8), corner_N2, [4], device)


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp_up = nn.Linear(width, hidden)
        self.mlp_down = nn.Linear(hidden, width)

    def forward(self, x_ND, cos_NK, sin_NK, segments: Segments, recompute_mlp: bool):
        q_NHK, k_NHK, v_NHK = self.qkv(self.attention_norm(x_ND)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        q_NHK, k_NHK = rotate(q_NHK, cos_NK, sin_NK), rotate(k_NHK, cos_NK, sin_NK)
        x_ND = x_ND + self.projection(attention(q_NHK, k_NHK, v_NHK, segments, causal=False).flatten(1))
        if recompute_mlp and torch.is_grad_enabled():
            return x_ND + checkpoint(self._mlp, x_ND, use_reentrant=False)
        return x_ND + self._mlp(x_ND)

    def _mlp(self, x_ND):
        return self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(x_ND)), approximate="tanh"))


class SeedViT(nn.Module):
    """Packed images to one feature a patch, [N, D]; 2x2 pooling is `pool`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config = config
        self.patch_embedding = nn.Linear(PATCH_VALUES, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, images: PackedImages, recompute: str = "none") -> torch.Tensor:
        """recompute: "none" keeps all activations, "selective" recomputes the MLPs, "full" recomputes whole blocks."""
        cos_NK, sin_NK = self._rotary(images.positions_N2)
        dtype = self.patch_embedding.bias.dtype  # of the bias: ZeRO-3 keeps whatever weight is touched here gathered
        x_ND = self.patch_embedding((images.patches_NP.float() / 127.5 - 1.0).to(dtype))
        for block in self.blocks:
            arguments = (x_ND, cos_NK, sin_NK, images.segments, recompute == "selective")
            if recompute == "full" and torch.is_grad_enabled():
                x_ND = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_ND = block(*arguments)
        return self.final_norm(x_ND)

    def _rotary(self, positions_N2):
        half = self.config.width // self.config.heads // 2
        angles = [axis_angles(positions_N2[:, axis], half, self.config.rope_base) for axis in (0, 1)]
        return tables(torch.cat(angles, dim=-1))


def pool(features_ND: torch.Tensor) -> torch.Tensor:
    """Mean over each 2x2 block of patches, [N/4, D]: one LLM token for 28x28 pixels."""
    return features_ND.unflatten(0, (-1, 4)).mean(dim=1)
