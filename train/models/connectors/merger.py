"""The patches of a block side by side, then a two-layer MLP as wide as they are: Qwen2-VL's patch merger.

    row = down(gelu(up(norm(patch 0) | norm(patch 1) | ...)))

Qwen2-VL norms by LayerNorm, Qwen2.5-VL by RMSNorm (arXiv:2409.12191, section 2.1; arXiv:2502.13923, section 2.1).

Legend: N patches, D encoder width, V visual tokens, X = merge^2 * D, E LLM width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from tandem.train.models.connectors.base import Connector, Sizes

NORMS = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


@dataclass(frozen=True)
class MergerOptions:
    """norm: of each patch, layer or rms."""

    norm: str = "rms"

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"model.connector.options.norm={self.norm}: must be one of {', '.join(NORMS)}")


class PatchMerger(nn.Module):
    """Features [N, D] to rows [V, E]."""

    def __init__(self, sizes: Sizes, norm: str):
        super().__init__()
        self.patches = sizes.merge**2
        block = self.patches * sizes.width
        self.norm = NORMS[norm](sizes.width, eps=sizes.norm_eps)
        self.up = nn.Linear(block, block)
        self.down = nn.Linear(block, sizes.llm_width)

    def forward(self, features_ND: torch.Tensor) -> torch.Tensor:
        block_VX = self.norm(features_ND).unflatten(0, (-1, self.patches)).flatten(1)
        return self.down(F.gelu(self.up(block_VX)))


class MergerConnector(Connector):
    Options = MergerOptions

    def build(self, sizes: Sizes, options: MergerOptions) -> PatchMerger:
        return PatchMerger(sizes, options.norm)

    def token_flops(self, sizes: Sizes, options: MergerOptions) -> int:
        block = sizes.merge**2 * sizes.width
        return 2 * block * (block + sizes.llm_width)

    def token_elements(self, sizes: Sizes, options: MergerOptions) -> int:
        return 4 * sizes.merge**2 * sizes.width  # features before and after the norm, hidden before and after GELU


CONNECTOR = MergerConnector()
