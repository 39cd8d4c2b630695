"""A pack of images of mixed size through the vision tower: forward, backward, fused AdamW.  Needs no Megatron-core.

Image areas are log-uniform in 196 to 6,400 patches, aspect ratios log-uniform in e^-0.6 to e^0.6, in whole blocks of
patches; images are drawn until the next would not fit.  A full pack of 32,768 patches then has 26 images and 32,076
patches.

Legend: N patches, D width, I images.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tandem.data.vision import VisionSpec
from tandem.train.cost.flops import encoder_flops
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.initial import initialize

VISION = VisionSpec()
SMALLEST, LARGEST, ASPECT = 196, 6400, 0.6
SEED = 2678155
ADAM = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class Pack:
    """Images of one step: patches down and across, int64 [I, 2]."""

    grid_I2: np.ndarray

    @property
    def lengths_I(self) -> np.ndarray:
        return self.grid_I2.prod(1)

    @property
    def patches(self) -> int:
        return int(self.lengths_I.sum())

    def flops(self, vit: ViTConfig) -> int:
        """Of forward and backward, as three forwards."""
        return 3 * encoder_flops(vit, self.grid_I2)

    def images(self, device: torch.device) -> PackedImages:
        """Random patches."""
        patches_NP = np.random.default_rng(0).integers(0, 256, (self.patches, VISION.patch_values), np.uint8)
        return PackedImages.of(patches_NP, VISION.positions(self.grid_I2), self.lengths_I, device)


def draw_pack(most: int, seed: int = SEED, smallest: int = SMALLEST, largest: int = LARGEST) -> Pack:
    """Images of the mix, at most `most` patches in all."""
    draw, grids, filled = np.random.default_rng(seed), [], 0
    while True:
        area = smallest * (largest / smallest) ** draw.random()
        aspect = np.exp(ASPECT * (2 * draw.random() - 1))
        sides_2 = np.array([(area * aspect) ** 0.5, (area / aspect) ** 0.5])
        grid_2 = VISION.merge * np.maximum(1, np.rint(sides_2 / VISION.merge)).astype(np.int64)
        filled += int(grid_2.prod())
        if filled > most:
            return Pack(np.array(grids, np.int64).reshape(-1, 2))
        grids.append(grid_2)


@dataclass(frozen=True)
class TowerSlice:
    """A tower, its optimizer and its input on one device; `step` is one training step."""

    vit: SeedViT
    optimizer: torch.optim.Optimizer
    images: PackedImages
    gradient_ND: torch.Tensor
    recompute: str

    def step(self) -> None:
        self.vit(self.images, self.recompute).backward(self.gradient_ND)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def build_tower(config: ViTConfig, pack: Pack, device: torch.device, dtype: torch.dtype, recompute: str) -> TowerSlice:
    """A tower in `dtype` with AdamW beside it, fused on CUDA, moments in `dtype` as well."""
    vit = build_vit(config).to(device, dtype)
    return TowerSlice(
        vit=vit,
        optimizer=torch.optim.AdamW(vit.parameters(), fused=device.type == "cuda", **ADAM),
        images=pack.images(device),
        gradient_ND=random_like((pack.patches, config.width), device, dtype),
        recompute=recompute,
    )


def build_vit(config: ViTConfig) -> SeedViT:
    """Weights from seed 0, on the CPU in fp32."""
    vit = SeedViT(config)
    initialize(vit, seed=0)
    return vit


def random_like(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, seed: int = 1) -> torch.Tensor:
    """Normal numbers, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def floors(config: ViTConfig, pack: Pack, matmul_flops: float, copy_bytes: float, element: int) -> dict[str, float]:
    """Seconds that each kind of work takes at least, at a matrix product's FLOP/s and a copy's bytes/s.

    Elementwise: every tensor moved once, neighbouring operations in one kernel: of each block norms with the residual
    sum before them, rotation, GELU, forward 20 and backward 24 times a row of D numbers.
    """
    d, n = config.width, pack.lengths_I
    scores = 4 * d * int((n * n).sum()) * config.depth
    linear = encoder_flops(config, pack.grid_I2) - scores
    weights = sum(parameter.numel() for parameter in _meta(config).parameters())
    return {
        "GEMM": 3 * linear / matmul_flops,
        "attention forward": scores / matmul_flops,
        "attention backward": 2.5 * scores / matmul_flops,
        "elementwise": 44 * d * element * pack.patches * config.depth / copy_bytes,
        "optimizer": 7 * weights * element / copy_bytes,
    }


def _meta(config: ViTConfig) -> SeedViT:
    with torch.device("meta"):
        return SeedViT(config)
