"""Attention pooling: one embedding an image, from a learned query that attends to the image's patches.

The head of SigLIP's encoder (multi-head attention pooling, Zhai et al. 2022), over packed images:

    y = attention(query, features of the image);   y = y + mlp(norm(y));   embedding = projection(y)

The report has it between encoder and the 1280-wide image embedding (Seed1.5-VL, section 2.1.2) without its shape.

Legend: N patches of I images, D width, E embedding width, H heads, K head width.
"""

import torch
import torch.nn.functional as F
from torch import nn

from tandem.parallel.kernels.attention import Segments, attention


class AttentionPool(nn.Module):
    """Packed features [N, D] to [I, E].  The query starts small, so that pooling starts close to a mean."""

    def __init__(self, width: int, heads: int, out_width: int, norm_eps: float, mlp_ratio: float = 4.0):
        super().__init__()
        self.heads = heads
        self.query = nn.Parameter(torch.zeros(1, width))
        self.to_query = nn.Linear(width, width)
        self.to_keys_values = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp_up = nn.Linear(width, int(width * mlp_ratio))
        self.mlp_down = nn.Linear(int(width * mlp_ratio), width)
        self.out = nn.Linear(width, out_width) if out_width != width else nn.Identity()

    def forward(self, features_ND: torch.Tensor, segments: Segments) -> torch.Tensor:
        """[I, E]; segments: of the images' patches, as the encoder has them."""
        q_1HK = self.to_query(self.query).unflatten(-1, (self.heads, -1))
        k_NHK, v_NHK = self.to_keys_values(features_ND).unflatten(-1, (2, self.heads, -1)).unbind(1)
        one_each = _one_query_each(segments)
        pooled_IHK = attention(q_1HK.expand(len(one_each.q_lengths_N), -1, -1), k_NHK, v_NHK, one_each, causal=False)
        y_ID = self.projection(pooled_IHK.flatten(1))
        y_ID = y_ID + self.mlp_down(F.gelu(self.mlp_up(self.mlp_norm(y_ID)), approximate="tanh"))
        return self.out(y_ID)


def _one_query_each(segments: Segments) -> Segments:
    """The same keys, with one query a segment; its borders are counted on the device."""
    images = len(segments.k_lengths_N)
    borders_I1 = torch.arange(images + 1, dtype=torch.int32, device=segments.cu_k_N1.device)
    return Segments((1,) * images, segments.k_lengths_N, borders_I1, segments.cu_k_N1)
