"""The geometry and the cost of vision: how an image becomes patches, patches become tokens, and what both cost.

A side of an image is resized to the nearest multiple of a block of merge x merge patches, and each block becomes one
visual token. The patches of a block are successive rows, row by row; blocks come in raster order. With merge = 2:

    0 1 | 4 5
    2 3 | 6 7        (Seed1.5-VL section 2.1.1)

One frozen object answers all of this as functions of arrays. Nothing else in the project knows a patch size or how many
patches make a token.

Shapes: I images, N patches, P = patch_size * patch_size * 3 values of a patch (y, x, channel; channel last), H W
pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

CHANNELS = 3
# What a checkpoint was trained with that does not say it.
OLDEST = {"patch_size": 14, "merge": 2, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
KEYS = {
    "patch_size": "model.encoder.patch_size",
    "merge": "model.connector.merge",
    "mean": "model.encoder.image_mean",
    "std": "model.encoder.image_std",
}


@dataclass(frozen=True)
class ViewLayout:
    """The text tokens around the visual tokens of a view; `stamp` stands before the view of a frame."""

    before: tuple[str, ...] = ("[SOI]",)
    after: tuple[str, ...] = ("[EOI]",)

    def stamp(self, tenths: int) -> str:
        """The time stamp of a frame, as text, from its time in tenths of a second."""
        return f"[{tenths // 10}.{tenths % 10} second]"


@dataclass(frozen=True)
class VisionSpec:
    """Everything about geometry and cost, built from plain numbers; `train.vision` builds it from the settings.

    min_patches, max_patches: of one image.  merge: patches a side of a block that becomes one token.  mean, std: of
    pixel values from 0 to 1, by channel.  width, depth, mlp_width, mlp_matrices: of the encoder's blocks; token_flops:
    of the connector, forward, for one token; 0 where nobody asks for cost.  class_tokens: of each image beside its
    patches.  window: patches a side of the windows to which all but `whole_layers` of the blocks confine attention, 0
    for none.  learned: whether positions come from a table of one grid.  Raises ValueError, one sentence with the key,
    for a value that cannot work.
    """

    min_patches: int = 4
    max_patches: int = 16384
    patch_size: int = 14
    merge: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    width: int = 0
    depth: int = 0
    mlp_width: int = 0
    mlp_matrices: int = 2
    token_flops: int = 0
    class_tokens: int = 0
    window: int = 0
    whole_layers: int = 0
    learned: bool = False

    INTERPOLATION: ClassVar[str] = "bilinear"
    layout: ClassVar[ViewLayout] = ViewLayout()

    def __post_init__(self):
        for field in ("patch_size", "merge"):
            value = getattr(self, field)
            if not _whole(value, 1):
                raise ValueError(f"{KEYS[field]}={value!r}: must be a whole number, at least 1")
        for field in ("mean", "std"):
            values = tuple(map(float, getattr(self, field)))
            object.__setattr__(self, field, values)
            if len(values) != CHANNELS or not all(math.isfinite(value) for value in values):
                raise ValueError(
                    f"{KEYS[field]}={list(values)}: must be {CHANNELS} finite numbers, one for each of red, green, blue"
                )
        if min(self.std) <= 0:
            raise ValueError(f"{KEYS['std']}={list(self.std)}: must be above 0")
        for field, least in (("min_patches", 1), ("max_patches", self.merge**2)):
            value = getattr(self, field)
            if not _whole(value, least):
                raise ValueError(f"data.{field} is {value!r}; it must be a whole number, at least {least}")
        if self.min_patches > self.max_patches:
            raise ValueError(f"data.min_patches is {self.min_patches}, above data.max_patches, {self.max_patches}")

    # Views and tokens

    @property
    def block(self) -> int:
        """Pixels a side of a block of patches that becomes one token."""
        return self.patch_size * self.merge

    @property
    def patch_values(self) -> int:
        """Values of one patch."""
        return patch_values(self.patch_size)

    @property
    def most_tokens(self) -> int:
        """Visual tokens of the largest view."""
        return int(self.tokens_of(self.max_patches))

    @property
    def marks(self) -> int:
        """Text tokens around the visual tokens of a view, without a time stamp."""
        return len(self.layout.before) + len(self.layout.after)

    def views(self, height_I, width_I, most_tokens: int | None = None) -> np.ndarray:
        """Patches down and across of the one view of each image or frame of these pixel sizes, int32 [..., 2].

        Each side goes to its nearest multiple of a block, at least one. An image under min_patches or over max_patches
        (or most_tokens) is scaled with its aspect kept, as far as whole blocks allow; where both limits cannot hold,
        the upper one does.
        """
        height_I, width_I = np.asarray(height_I, np.int64), np.asarray(width_I, np.int64)
        block, least = self.block, -(-self.min_patches // self.merge**2)
        most = self.most_tokens if most_tokens is None else min(self.most_tokens, most_tokens)
        down_I = np.maximum((height_I + block // 2) // block, 1)
        across_I = np.maximum((width_I + block // 2) // block, 1)
        area_I = np.maximum(height_I * width_I, 1)

        up_I = np.sqrt(least / area_I)
        small_I = down_I * across_I < least
        down_I = np.where(small_I, np.maximum(np.ceil(height_I * up_I - 1e-9), 1).astype(np.int64), down_I)
        across_I = np.where(small_I, np.maximum(np.ceil(width_I * up_I - 1e-9), 1).astype(np.int64), across_I)

        shrink_I = np.sqrt(most / area_I)
        large_I = down_I * across_I > most
        down_I = np.where(large_I, np.maximum(np.floor(height_I * shrink_I + 1e-9), 1).astype(np.int64), down_I)
        across_I = np.where(large_I, np.maximum(np.floor(width_I * shrink_I + 1e-9), 1).astype(np.int64), across_I)
        down_I = np.minimum(down_I, most)
        across_I = np.minimum(across_I, most // down_I)
        return (self.merge * np.stack([down_I, across_I], -1)).astype(np.int32)

    def covering(self, height_I, width_I) -> np.ndarray:
        """Patches down and across of the fewest whole blocks that cover these pixels, int32 [..., 2]; at least one."""
        sides = np.stack(np.broadcast_arrays(np.asarray(height_I, np.int64), np.asarray(width_I, np.int64)), -1)
        return (self.merge * np.maximum(-(-sides // self.block), 1)).astype(np.int32)

    def tokens(self, grid_hw_I2: np.ndarray) -> np.ndarray:
        """Visual tokens of views of these grids, int32 [...]."""
        grid_hw_I2 = np.asarray(grid_hw_I2)
        return self.tokens_of(grid_hw_I2[..., 0] * grid_hw_I2[..., 1])

    def token_grids(self, grid_hw_I2: np.ndarray) -> np.ndarray:
        """Visual tokens down and across of views of these grids, int64 [..., 2]; tokens come in raster order."""
        return np.asarray(grid_hw_I2, np.int64) // self.merge

    def tokens_of(self, patches):
        """Whole visual tokens of this many patches."""
        return patches // self.merge**2

    def patches_of(self, tokens):
        """Patches of this many visual tokens."""
        return tokens * self.merge**2

    @property
    def blank_grid(self) -> tuple[int, int]:
        """The smallest view of at least two patches a side, for ranks without images."""
        side = self.merge * -(-2 // self.merge)
        return side, side

    # Pixels

    def pixels_hw(self, grid_hw: Sequence[int] | np.ndarray) -> tuple[int, int]:
        """Height and width in pixels of a view of this grid."""
        down, across = grid_hw
        return int(down) * self.patch_size, int(across) * self.patch_size

    def cut(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """The patches of an image of whole blocks, uint8 [N, P], block by block."""
        height, width = pixels_HW3.shape[:2]
        if height % self.block or width % self.block:
            raise ValueError(f"patches need sides that are multiples of {self.block}, got {height} x {width}")
        merge, patch = self.merge, self.patch_size
        cut = pixels_HW3.reshape(height // self.block, merge, patch, width // self.block, merge, patch, CHANNELS)
        return cut.transpose(0, 3, 1, 4, 2, 5, 6).reshape(-1, self.patch_values)

    def to_pixels(self, patches_NP: np.ndarray, grid_hw: Sequence[int] | np.ndarray) -> np.ndarray:
        """The image of these patches, uint8 [H, W, 3]: what `cut` has cut."""
        (down, across), merge, patch = grid_hw, self.merge, self.patch_size
        blocks = patches_NP.reshape(down // merge, across // merge, merge, merge, patch, patch, CHANNELS)
        return blocks.transpose(0, 2, 4, 1, 3, 5, 6).reshape(*self.pixels_hw(grid_hw), CHANNELS)

    def positions(self, grid_hw_I2: np.ndarray | Sequence) -> np.ndarray:
        """(y, x) of every patch of every view, int32 [N, 2], in the order of `cut`."""
        grid_hw_I2, merge = np.asarray(grid_hw_I2, np.int64).reshape(-1, 2), self.merge
        patches_I = grid_hw_I2.prod(1)
        first_I = np.cumsum(patches_I) - patches_I
        within_N = np.arange(patches_I.sum()) - np.repeat(first_I, patches_I)
        across_N = np.repeat(grid_hw_I2[:, 1] // merge, patches_I)
        block_N, corner_N = within_N // merge**2, within_N % merge**2
        y_N = merge * (block_N // across_N) + corner_N // merge
        x_N = merge * (block_N % across_N) + corner_N % merge
        return np.stack([y_N, x_N], 1).astype(np.int32)

    def windows(self, grid_hw_I2: np.ndarray | Sequence) -> tuple[np.ndarray, np.ndarray]:
        """(order int64 [N], patches of each window): patches in the order of `cut`, taken window by window.

        Windows of an image come in raster order, the last of a row or column may be smaller, and patches keep their
        order inside a window.
        """
        grid_hw_I2, positions_N2 = np.asarray(grid_hw_I2, np.int64).reshape(-1, 2), self.positions(grid_hw_I2)
        windows_I2 = -(-grid_hw_I2 // self.window)
        first_I = np.cumsum(windows_I2.prod(1)) - windows_I2.prod(1)
        patches_I = grid_hw_I2.prod(1)
        y_N, x_N = (positions_N2 // self.window).T
        window_N = np.repeat(first_I, patches_I) + y_N * np.repeat(windows_I2[:, 1], patches_I) + x_N
        return np.argsort(window_N, kind="stable"), np.bincount(window_N)

    # Cost

    def encoder_flops(self, grid_hw_I2) -> np.ndarray:
        """Forward FLOPs of the encoder for each view, int64 [I]."""
        patches_I = np.asarray(grid_hw_I2, np.int64).prod(-1)
        return 2 * patches_I * self.patch_values * self.width + self.cost(grid_hw_I2)

    def connector_flops(self, tokens) -> np.ndarray:
        """Forward FLOPs of the connector that makes these tokens, int64."""
        return np.asarray(tokens, np.int64) * self.token_flops

    def cost(self, grid_hw_I2: np.ndarray) -> np.ndarray:
        """Forward FLOPs of the encoder's blocks for each view, int64 [I]: what balancing sorts by.

        The patch embedding and the connector are left out: 2% of the report's encoder, and plans of before stay as
        they are.
        """
        grid_hw_I2 = np.asarray(grid_hw_I2, np.int64)
        tokens_I = grid_hw_I2.prod(-1) + self.class_tokens
        pairs_I = self.depth * tokens_I**2
        if self.window:
            whole_I2, rest_I2 = np.divmod(grid_hw_I2, self.window)
            of_windows_I = (whole_I2 * self.window**2 + rest_I2**2).prod(-1)  # sum of squares, axis by axis
            pairs_I = self.whole_layers * tokens_I**2 + (self.depth - self.whole_layers) * of_windows_I
        sizes = (self.width, self.depth, self.mlp_width, self.mlp_matrices)
        return transformer_flops(tokens_I, *sizes, pairs_I=pairs_I)

    # Identity

    @property
    def identity(self) -> dict:
        """What a stream of data is bound to, besides its limits of patches; fit for JSON."""
        return {
            "patch_size": self.patch_size,
            "merge": self.merge,
            "mean": list(self.mean),
            "std": list(self.std),
        }


def patch_values(patch_size: int) -> int:
    """Values of a patch of this size."""
    return patch_size * patch_size * CHANNELS


def transformer_flops(
    tokens_I, width: int, depth: int, mlp_width: int, mlp_matrices: int = 2, pairs_I: np.ndarray | None = None
) -> np.ndarray:
    """Forward FLOPs of `depth` blocks for each segment of these tokens, int64 [I].

    mlp_matrices: of mlp_width x width in each block.  pairs_I: query-key pairs of all blocks together; where they are
    not given, tokens attend to all of their segment.
    """
    n, d = np.asarray(tokens_I, np.int64), width
    pairs_I = depth * n * n if pairs_I is None else pairs_I
    return depth * n * (8 * d * d + 2 * mlp_matrices * d * mlp_width) + 4 * pairs_I * d


def changed(was: dict, now: dict) -> str:
    """The settings in which two identities differ, as a list in words; empty where they are the same."""
    return ", ".join(f"{KEYS[name]} was {was[name]} and is {now[name]}" for name in now if was[name] != now[name])


def _whole(value, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 62
