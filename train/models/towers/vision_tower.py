"""Encoder, pooling of merge x merge patches and adapter in one module: packed images in, rows of the LLM's width out.

The adapter is the report's two-layer MLP (section 2); its hidden width, activation and norm are not stated: here a
LayerNorm on the pooled features, hidden width as wide as the LLM, GELU.

Legend: N patches, D encoder width, V = N / merge^2 visual tokens, E LLM width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tandem.data.vision import VisionSpec
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig, pool
from tandem.train.models.layers.blocks import kept_for_backward


@dataclass
class ConnectorConfig:
    """How features become tokens of the LLM.  merge: a block of merge x merge patches becomes one token;
    `VisionSpec` checks it."""

    merge: int = VisionSpec.merge


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

    recompute: what the encoder keeps for its backward, see `run_blocks`; "replay" is the caller's (the whole tower runs
    again), and keeps everything of the one chunk at hand.
    """

    def __init__(self, config: ViTConfig, connector: ConnectorConfig, llm_width: int, recompute: str = "none"):
        super().__init__()
        self.encoder = SeedViT(config)
        self.adapter = Adapter(config.width, llm_width, config.norm_eps)
        self.merge = connector.merge
        self.recompute = kept_for_backward(recompute)

    def forward(self, images: PackedImages) -> torch.Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            pooled_VD = pool(self.encoder(images, self.recompute), self.merge)
        return self.adapter(pooled_VD)
