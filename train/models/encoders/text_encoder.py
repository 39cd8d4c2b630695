"""The text encoder of contrastive training: a bidirectional pre-norm transformer over packed texts, 1D positions.

Texts lie end to end and attend inside themselves; a text's embedding is the feature of its last token, <eos>, which has
seen all of it.  With `folder` the text tower of a CLIP or SigLIP model takes its place (`hf_text.py`).

Legend: T tokens of B texts, D width, K head width, V words of the vocabulary.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments
from tandem.train.models.layers.blocks import Block, run_blocks
from tandem.train.models.layers.rotary import axis_angles, tables


@dataclass
class TextConfig:
    """Sizes of the text encoder.  max_tokens: of one text, <eos> included.  folder: of a Hugging Face CLIP or SigLIP
    text model whose sizes and weights are taken, see `hf_text.py`; vocab_size and max_tokens must fit it, the other
    sizes are then not read."""

    width: int = 1280
    depth: int = 32
    heads: int = 20
    vocab_size: int = 131072
    max_tokens: int = 80
    mlp_ratio: float = 4.0
    rope_base: float = 10000.0
    norm_eps: float = 1e-6
    folder: str | None = None

    def __post_init__(self):
        if self.max_tokens < 2:
            raise ValueError(f"model.text.max_tokens={self.max_tokens}: must be at least 2, a word and <eos>")
        for key in ("width", "depth", "heads", "vocab_size", "max_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.text.{key}={getattr(self, key)}: must be at least 1")
        if self.width % (2 * self.heads):
            raise ValueError(
                f"model.text.width={self.width} over model.text.heads={self.heads}: each head needs an even number of "
                "channels, rotary positions turn pairs"
            )


@dataclass(frozen=True)
class PackedTexts:
    """Tokens of B texts end to end, int64 [T], their positions in their texts, int32 [T], and where texts begin."""

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    segments: Segments

    @staticmethod
    def of(tokens_T: np.ndarray, lengths_B: np.ndarray, device: torch.device) -> "PackedTexts":
        """Moves packed texts to `device`; lengths_B counts the tokens of each, at least one."""
        lengths_B = np.asarray(lengths_B, np.int64)
        first_B = np.cumsum(lengths_B) - lengths_B
        positions_T = np.arange(lengths_B.sum()) - np.repeat(first_B, lengths_B)
        return PackedTexts(
            host_to_device(np.asarray(tokens_T, np.int64), device),
            host_to_device(positions_T.astype(np.int32), device),
            Segments.of(lengths_B, device=device),
        )

    @staticmethod
    def blank(device: torch.device) -> "PackedTexts":
        """One text of token 0: what a rank without texts encodes, with a zero gradient."""
        return PackedTexts.of(np.zeros(1, np.int64), np.ones(1, np.int64), device)


class TextEncoder(nn.Module):
    """Packed texts to one feature a token, [T, D]; `pool` takes one a text."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config, self.width = config, config.width
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        sizes = (config.width, config.heads, config.mlp_ratio, config.norm_eps)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(config.depth))
        self.final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)

    def forward(self, texts: PackedTexts, recompute: str = "none") -> torch.Tensor:
        """Features of every token; recompute: what is kept for the backward, see `run_blocks`."""
        assert max(texts.segments.q_lengths_N) <= self.config.max_tokens, "a text longer than max_tokens"
        angles = axis_angles(texts.positions_T, self.config.width // self.config.heads, self.config.rope_base)
        x_TD = self.embedding(texts.tokens_T)
        return self.final_norm(run_blocks(self.blocks, x_TD, *tables(angles), texts.segments, recompute))

    def pool(self, features_TD: torch.Tensor, texts: PackedTexts) -> torch.Tensor:
        """[B, D]: the feature of each text's last token."""
        return last_of_each(features_TD, texts.segments)


def last_of_each(features_TD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Last row of each segment, [B, D]."""
    return features_TD.index_select(0, segments.cu_q_N1[1:] - 1)
