"""Encoder and connector in one module: packed images in, rows of the LLM's width out.

Legend: V visual tokens, E LLM width.
"""

import torch
from torch import nn

from tandem.train.models import connectors
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.blocks import kept_for_backward


class VisionTower(nn.Module):
    """`encoder` and `adapter`, the connector; a frozen encoder runs without autograd.

    recompute: what the encoder keeps for its backward, see `run_blocks`; "replay" is the caller's (the whole tower runs
    again), and keeps everything of the one chunk at hand.
    """

    def __init__(self, config: ViTConfig, connector: ConnectorConfig, llm_width: int, recompute: str = "none"):
        super().__init__()
        self.encoder = SeedViT(config)
        kind, sizes, options = connectors.between(config, connector, llm_width)
        self.adapter = kind.build(sizes, options)
        self.recompute = kept_for_backward(recompute)

    def forward(self, images: PackedImages) -> torch.Tensor:
        frozen = not any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
            features_ND = self.encoder(images, self.recompute)
        return self.adapter(features_ND)
