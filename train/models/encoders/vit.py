"""A pre-norm ViT at native resolution over packed images.  By default Seed-ViT (Seed1.5-VL report, section 2.1.1).

Patches of many images lie end to end; attention stays inside an image; 2D rotary positions, half of every head for the
row and half for the column, need no table to resize.  Patches come in blocks of merge x merge, so that pooling is a
mean over neighbours in memory (data/vision.py).  At full size (27 x 1280, MLP 5120, biases everywhere) this is
532,047,360 parameters.

Switches of `ViTConfig` make it the encoder of CLIP, SigLIP, SigLIP2 or Qwen2.5-VL (train/families/encoders).  One that
is off adds no parameter and no operation.

Legend: N patches, P values a patch, T tokens, D width, K head width, I images, L = 2 * depth residual branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tandem.data.vision import CHANNELS, VisionSpec, patch_values
from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.layers.activations import ACTIVATIONS
from tandem.train.models.layers.blocks import NORMS, Block, Style, hidden_width, new_norm, run_blocks
from tandem.train.models.layers.positions import INTERPOLATIONS, ClassToken, PositionTable
from tandem.train.models.layers.rotary import axis_angles, tables


@dataclass
class ViTConfig:
    """Sizes and switches of the encoder; the defaults are the report's.

    drop_path: chance that an image skips a residual branch of the last block, falling linearly to the first; the
    factors come with the images.  patch_size: pixels a side of a patch.  image_mean, image_std: of pixel values from 0
    to 1, by channel, by which they are normalised.  `VisionSpec` checks these three.
    positions: rotary, or learned, a table of position_grid x position_grid that is resized by `interpolation` (bicubic
    or antialias).  class_token: one before each image's patches.  pre_norm: a norm before the blocks.  final_norm: one
    after them.  norm: layernorm or rmsnorm.  activation: gelu_tanh, gelu, quick_gelu or swiglu.  bias: of the blocks'
    linear layers; patch_bias: of the patch embedding.  frames: for which the patch embedding has weights; an image is
    that many equal frames.  window: patches a side of the windows that attention stays in, 0 for none, in all blocks
    but `whole_layers`.  folder: a Hugging Face folder whose encoder this is; feature_layer: which of its layers is the
    last here, -1 or -2.
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
    positions: str = "rotary"
    position_grid: int = 16
    interpolation: str = "bicubic"
    class_token: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    norm: str = "layernorm"
    activation: str = "gelu_tanh"
    bias: bool = True
    patch_bias: bool = True
    frames: int = 1
    window: int = 0
    whole_layers: list[int] = field(default_factory=list)
    folder: str | None = None
    feature_layer: int = -1

    def __post_init__(self):
        for key in ("width", "depth", "heads", "position_grid", "frames"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.encoder.{key}={getattr(self, key)}: must be at least 1")
        for key, allowed in (
            ("positions", ("rotary", "learned")),
            ("interpolation", INTERPOLATIONS),
            ("norm", NORMS),
            ("activation", ACTIVATIONS),
            ("feature_layer", (-1, -2)),
        ):
            if getattr(self, key) not in allowed:
                may = ", ".join(map(str, allowed))
                raise ValueError(f"model.encoder.{key}={getattr(self, key)}: must be one of {may}")
        self._check_heads()
        self._check_windows()
        if self.class_token and self.positions != "learned":
            raise ValueError(
                f"model.encoder.class_token=true with model.encoder.positions={self.positions}: a class token has no "
                "row and column, set model.encoder.positions=learned"
            )
        if self.feature_layer != -1 and self.folder is None:
            raise ValueError(
                f"model.encoder.feature_layer={self.feature_layer} without model.encoder.folder: counts the layers of "
                "a folder; set model.encoder.depth instead"
            )
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"model.encoder.drop_path={self.drop_path}: must be from 0 to below 1")

    def _check_heads(self) -> None:
        where = f"model.encoder.width={self.width} over model.encoder.heads={self.heads}"
        if self.width % self.heads:
            raise ValueError(f"{where}: every head needs as many channels")
        if self.positions == "rotary" and self.width // self.heads % 4:
            raise ValueError(f"{where}: each head needs a multiple of 4 channels, half for rows and half for columns")

    def _check_windows(self) -> None:
        if self.window < 0:
            raise ValueError(f"model.encoder.window={self.window}: must be patches a side of a window, or 0 for none")
        whole = list(self.whole_layers)
        if whole and not self.window:
            raise ValueError(f"model.encoder.whole_layers={whole} without model.encoder.window: all layers are whole")
        if whole != sorted(set(whole) & set(range(self.depth))):
            raise ValueError(
                f"model.encoder.whole_layers={whole}: must be rising numbers of layers, from 0 to below "
                f"model.encoder.depth={self.depth}"
            )
        if self.window and self.class_token:
            raise ValueError(
                f"model.encoder.class_token=true with model.encoder.window={self.window}: a class token is in no window"
            )

    @property
    def mlp_width(self) -> int:
        return hidden_width(self.width, self.mlp_ratio)

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate: a third matrix."""
        return self.activation == "swiglu"

    @property
    def plain(self) -> bool:
        """Whether tokens are the patches alone, in their order, with rotary positions: what masking can take apart."""
        return self.positions == "rotary" and not self.window


@dataclass(frozen=True)
class PackedImages:
    """Patches of I images end to end, uint8 [N, P], with what attention and rotary positions need.

    keep_LI: fp32 factors of each image's residual branches (`masking.drop_path_factors`), None for all ones.
    arrangement: None for an encoder that needs none.
    """

    patches_NP: torch.Tensor
    positions_N2: torch.Tensor
    segments: Segments
    keep_LI: torch.Tensor | None = None
    arrangement: Arrangement | None = None

    @staticmethod
    def of(
        patches_NP: np.ndarray,
        positions_N2: np.ndarray,
        patches_I,
        device: torch.device,
        keep_LI: np.ndarray | None = None,
        arrangement: Arrangement | None = None,
    ) -> "PackedImages":
        """Moves packed patches to `device`; patches_I counts the patches of each image."""
        return PackedImages(
            host_to_device(patches_NP, device),
            host_to_device(positions_N2, device),
            Segments.of(patches_I, device=device),
            None if keep_LI is None else host_to_device(keep_LI, device),
            arrangement,
        )

    @staticmethod
    def blank(vision: VisionSpec, device: torch.device) -> "PackedImages":
        """One small black image: what a rank without images encodes, with a zero gradient."""
        grid_hw_I2 = np.array([vision.blank_grid])
        positions_N2 = vision.positions(grid_hw_I2)
        patches_NP = np.zeros((len(positions_N2), vision.patch_values), dtype=np.uint8)
        arrangement = Arrangement.of(vision, grid_hw_I2, device)
        return PackedImages.of(patches_NP, positions_N2, [len(positions_N2)], device, arrangement=arrangement)


class PatchEmbedding(nn.Linear):
    """Normalised patches [N, P] to [N, D].  With weights for several frames, [D, frames * P], all frames are the image,
    so that their weights are added."""

    def __init__(self, values: int, width: int, bias: bool, frames: int):
        super().__init__(values * frames, width, bias=bias)
        self.frames = frames

    def forward(self, patches_NP: torch.Tensor) -> torch.Tensor:
        weight = self.weight if self.frames == 1 else self.weight.unflatten(1, (self.frames, -1)).sum(1)
        return F.linear(patches_NP.to(weight.dtype), weight, self.bias)


class SeedViT(nn.Module):
    """Packed images to one feature a patch, [N, D]; pooling is `pool`."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.config, width = config, config.width
        self.patch_embedding = PatchEmbedding(patch_values(config.patch_size), width, config.patch_bias, config.frames)
        table = (width, config.position_grid, config.interpolation, config.class_token)
        self.positions = PositionTable(*table) if config.positions == "learned" else None
        self.class_token = ClassToken(width) if config.class_token else None
        self.pre_norm = new_norm(config.norm, width, config.norm_eps) if config.pre_norm else None
        sizes = (width, config.heads, config.mlp_ratio, config.norm_eps)
        style = Style(config.norm, config.activation, config.bias)
        self.blocks = nn.ModuleList(Block(*sizes, style) for _ in range(config.depth))
        self.final_norm = new_norm(config.norm, width, config.norm_eps) if config.final_norm else nn.Identity()

    def forward(self, images: PackedImages, recompute: str = "none") -> torch.Tensor:
        """Features of every patch; recompute: what is kept for the backward, see `run_blocks`."""
        x_ND, arranged = self.embed(images.patches_NP), images.arrangement
        if arranged is None:
            assert self.config.plain, "images were packed without the arrangement that this encoder needs"
            return self.trunk(x_ND, *self.rotary(images.positions_N2), images.segments, recompute, images.keep_LI)
        positions_N2, rows = images.positions_N2, []
        if self.positions is not None:
            position_ND, position_D = self.positions(positions_N2, arranged.grid_N2)
            x_ND = x_ND + position_ND
            if self.class_token is not None:
                rows = [self.class_token(position_D, len(arranged.images.q_lengths_N))]
        if arranged.token_T is not None:
            x_ND = torch.cat((*rows, x_ND)).index_select(0, arranged.token_T)
        if arranged.windows is not None and arranged.token_T is not None:
            positions_N2 = positions_N2.index_select(0, arranged.token_T)
        cos_TK, sin_TK = self.rotary(positions_N2) if self.positions is None else (None, None)
        x_TD = self.trunk(x_ND, cos_TK, sin_TK, arranged.images, recompute, images.keep_LI, arranged.windows)
        return x_TD if arranged.place_N is None else x_TD.index_select(0, arranged.place_N)

    def embed(self, patches_NP: torch.Tensor) -> torch.Tensor:
        """Linear embedding of uint8 patches, which it normalises."""
        return self.patch_embedding(normalise(patches_NP, self.config.image_mean, self.config.image_std))

    def trunk(
        self, x_TD, cos_TK, sin_TK, segments: Segments, recompute: str = "none", keep_LI=None, windows=None
    ) -> torch.Tensor:
        """Embedded tokens through all blocks and the final norm; windows: segments of all but the whole layers."""
        if self.pre_norm is not None:
            x_TD = self.pre_norm(x_TD)
        by_block = None
        if windows is not None:
            whole = set(self.config.whole_layers)
            by_block = [segments if layer in whole else windows for layer in range(len(self.blocks))]
        return self.final_norm(run_blocks(self.blocks, x_TD, cos_TK, sin_TK, segments, recompute, keep_LI, by_block))

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
