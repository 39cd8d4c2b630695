"""A small text transformer that looks at features of images: what matching and caption losses need beside two towers.

One stack of weights reads a text in either of two manners, as in BLIP (2201.12086) and VAST (2305.18500): both ways, to
say whether a text fits what it looks at, or causally, to write it.  It looks at the features of its own sample alone.
All readings of a chunk go through together, packed: ZeRO-3 gathers the weights once.

Legend: T tokens of all readings, B texts of a reading, N features, C their width, D width, H heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tandem.parallel.kernels.attention import Segments, attention
from tandem.train.models.layers.blocks import Block, ResidualLinear
from tandem.train.models.layers.rotary import axis_angles, tables

MLP_RATIO = 4.0
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Reading:
    """B packed texts, what they look at, and how they are read.

    tokens_T, positions_T: int64 and int32.  own: B segments of tokens.  seen: B segments, queries tokens of the text,
    keys the features it looks at.  causal: a place has read the start sign and the tokens before it, not its own, so
    that its output predicts its token; otherwise every place has read the whole text.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    own: Segments
    seen: Segments
    causal: bool = False


class DecoderBlock(Block):
    """Pre-norm self-attention, cross-attention and MLP, each with a residual."""

    def __init__(self, width: int, heads: int, norm_eps: float):
        super().__init__(width, heads, MLP_RATIO, norm_eps)
        self.cross_norm = nn.LayerNorm(width, eps=norm_eps)
        self.cross_query = nn.Linear(width, width)
        self.cross_key_value = nn.Linear(width, 2 * width)
        self.cross_projection = ResidualLinear(width, width)

    def forward(self, x_TD, context_ND, cos_TK, sin_TK, readings: Sequence[Reading], recompute_mlp: bool):
        q_THK, k_THK, v_THK = self.qkv(self.attention_norm(x_TD), cos_TK, sin_TK)
        parts = zip(*(split(x, readings) for x in (q_THK, k_THK, v_THK)), readings, strict=True)
        read = [attention(q, k, v, reading.own, causal=reading.causal) for q, k, v, reading in parts]
        x_TD = self.projection(torch.cat(read).flatten(1), x_TD)

        q_THK = self.cross_query(self.cross_norm(x_TD)).unflatten(-1, (self.qkv.heads, -1))
        k_NHK, v_NHK = self.cross_key_value(context_ND).unflatten(-1, (2, self.qkv.heads, -1)).unbind(1)
        parts = zip(split(q_THK, readings), readings, strict=True)
        looked = [attention(q, k_NHK, v_NHK, reading.seen, causal=False) for q, reading in parts]
        x_TD = self.cross_projection(torch.cat(looked).flatten(1), x_TD)
        if recompute_mlp and torch.is_grad_enabled():
            return checkpoint(self.mlp, x_TD, use_reentrant=False)
        return self.mlp(x_TD)


class TextDecoder(nn.Module):
    """Readings and what they look at -> one feature a token, for each reading.

    kinds: how many kinds of features there are; each has a learned vector, and a feature's number in its kind (of a
    frame in its video) is told by sines, so that any number of them can be.  writes: whether readings may be causal,
    which takes a start sign.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        *,
        context_width: int,
        vocab: int,
        kinds: int,
        writes: bool,
        eps: float,
    ):
        super().__init__()
        self.head_width = width // heads
        self.tokens = nn.Embedding(vocab, width)
        self.start = nn.Embedding(1, width) if writes else None
        self.kinds = nn.Embedding(kinds, width)
        self.context = nn.Linear(context_width, width)
        self.context_norm = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, eps) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, readings: Sequence[Reading], features_NC, kind_N, number_N, recompute: str = "none"):
        """kind_N, number_N: int64, of each feature.  recompute: what is kept for the backward, see `run_blocks`."""
        context_ND = self.context_norm(self.context(features_NC)) + self.kinds(kind_N)
        angles_NJ = axis_angles(number_N, context_ND.shape[1], ROPE_BASE)
        context_ND = context_ND + torch.cat((angles_NJ.sin(), angles_NJ.cos()), dim=-1).to(context_ND.dtype)
        x_TD = self._embed(readings)
        cos_TK, sin_TK = tables(axis_angles(torch.cat([r.positions_T for r in readings]), self.head_width, ROPE_BASE))
        for block in self.blocks:
            arguments = (x_TD, context_ND, cos_TK, sin_TK, readings, recompute in ("selective", "offload"))
            if recompute == "full" and torch.is_grad_enabled():
                x_TD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_TD = block(*arguments)
        return split(self.final_norm(x_TD), readings)

    def _embed(self, readings):
        """Token embeddings; where a text is written they move one place on, so that each place follows what is read."""
        embedded = list(split(self.tokens(torch.cat([reading.tokens_T for reading in readings])), readings))
        for place, reading in enumerate(readings):
            if reading.causal and self.start is not None:
                first_B = reading.own.cu_q_N1[:-1].long()
                start_BD = self.start(torch.zeros_like(first_B))
                embedded[place] = embedded[place].roll(1, 0).index_copy(0, first_B, start_BD)
        return torch.cat(embedded)


def split(x_T, readings: Sequence[Reading]) -> tuple[torch.Tensor, ...]:
    """The rows of each reading."""
    return x_T.split([len(reading.tokens_T) for reading in readings])
