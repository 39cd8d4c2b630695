"""Encoder, 2x2 pooling and adapter in one module: packed images in, rows of the LLM's width out.

The adapter is the report's two-layer MLP (section 2); its hidden width, activation and norm are not stated: here a
LayerNorm on the pooled features, hidden width as wide as the LLM, GELU.

Legend: N patches, D encoder width, V = N/4 visual tokens, E LLM width.
"""

import zlib

import torch
import torch.nn.functional as F
from torch import nn

from train.models.vit import PackedImages, SeedViT, ViTConfig, pool

RECOMPUTE = ("none", "selective", "full", "replay")


class Adapter(nn.Module):
    """Two-layer MLP from pooled features to the LLM's embedding space."""

    def __init__(self, width: int, llm_width: int, norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.up = nn.Linear(width, llm_width)
        self.down = nn.Linear(llm_width, llm_width)

    def forward(self, pooled_VD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm(pooled_VD)), approximate="tanh"))


class VisionTower(nn.Module):
    """`encoder`, pooling and `adapter`; a frozen encoder runs without autograd.

    recompute: what the encoder keeps for its backward, see `SeedViT.forward`; "replay" is the caller's (the whole tower
    runs again), and keeps everything of the one chunk at hand.
    """

    def __init__(self, config: ViTConfig, llm_width: int, recompute: str = "none"):
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ValueError(f"parallel.encoder.recompute={recompute}: must be one of {', '.join(RECOMPUTE)}")
        self.encoder = SeedViT(config)
        self.adapter = Adapter(config.width, llm_width, config.norm_eps)
        self.recompute = "none" if recompute == "replay" else recompute

    def forward(self, images: PackedImages) -> torch.Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            pooled_VD = pool(self.encoder(images, self.recompute))
        return self.adapter(pooled_VD)


@torch.no_grad()
def initialize(tower: nn.Module, seed: int) -> None:
    """Weights normal(0, fan_in ** -0.5), biases zero, norms one; each parameter drawn from (seed, its name) alone."""
    for name, parameter in tower.named_parameters():
        if parameter.dim() > 1:
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[1] ** -0.5)
        else:
            parameter.fill_(1.0 if name.endswith("norm.weight") else 0.0)
