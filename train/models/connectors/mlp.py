"""The mean of each block of patches, then a two-layer MLP: the report's connector (Seed1.5-VL, section 2).

    row = down(gelu(up(norm(mean of the block))))

Hidden width, activation and norm are not stated there: here a LayerNorm on the pooled features, hidden width as wide as
the LLM, GELU.

Legend: N patches, D encoder width, V visual tokens, E LLM width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tandem.train.models.connectors.base import Connector, NoOptions, Sizes
from tandem.train.models.encoders.vit import pool


class Adapter(nn.Module):
    """Pooled and mapped features, [N, D] to [V, E]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm = nn.LayerNorm(sizes.width, eps=sizes.norm_eps)
        self.up = nn.Linear(sizes.width, sizes.llm_width)
        self.down = nn.Linear(sizes.llm_width, sizes.llm_width)
        self.merge = sizes.merge

    def forward(self, features_ND: torch.Tensor) -> torch.Tensor:
        pooled_VD = pool(features_ND, self.merge)
        return self.down(F.gelu(self.up(self.norm(pooled_VD)), approximate="tanh"))


class PooledMLP(Connector):
    def build(self, sizes: Sizes, options: NoOptions) -> Adapter:
        return Adapter(sizes)

    def token_flops(self, sizes: Sizes, options: NoOptions) -> int:
        return 2 * sizes.llm_width * (sizes.width + sizes.llm_width)

    def token_elements(self, sizes: Sizes, options: NoOptions) -> int:
        return 2 * sizes.width + 2 * sizes.llm_width  # pooled and normed, hidden before and after GELU


CONNECTOR = PooledMLP()
