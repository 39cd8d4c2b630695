"""Which rows of a vision model's tensors are which rows of our encoder's.

    queries, keys, values    theirs one tensor each, or one in this order      ours one
    patch embedding          theirs a convolution (channel, frame, y, x)       ours a matrix (frame, y, x, channel)
    gate, up                 theirs one tensor each                            ours one

Legend: R rows, C channels, F frames, S pixels a side, X values of a patch in all frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from tandem.data.vision import CHANNELS, patch_values
from tandem.train.families.tensors import Form, Run, Tensor
from tandem.train.models.encoders.vit import ViTConfig


@dataclass(frozen=True)
class Convolution:
    """A row of a patch embedding as the kernel of a convolution, over `frames` frames or, with 0, over an image."""

    frames: int
    side: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (CHANNELS, *([self.frames] if self.frames else []), self.side, self.side)

    def ours(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(-1, CHANNELS, max(self.frames, 1), self.side, self.side).permute(0, 2, 3, 4, 1).flatten(1)

    def theirs(self, rows_RX: torch.Tensor) -> torch.Tensor:
        rows_RFSSC = rows_RX.reshape(-1, max(self.frames, 1), self.side, self.side, CHANNELS)
        return rows_RFSSC.permute(0, 4, 1, 2, 3).reshape(-1, *self.shape)


@dataclass(frozen=True)
class Names:
    """Their names.  layer: what stands before a layer's parts, {layer} for its number; qkv, up: one or several."""

    patch: str = "embeddings.patch_embedding"
    positions: str = "embeddings.position_embedding.weight"
    class_token: str = "embeddings.class_embedding"
    pre_norm: str = "pre_layrnorm"
    layer: str = "encoder.layers.{layer}."
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    projection: str = "self_attn.out_proj"
    up: tuple[str, ...] = ("mlp.fc1",)
    down: str = "mlp.fc2"
    final_norm: str = "post_layernorm"


def tensors(config: ViTConfig, names: Names, patch: Form | None) -> Iterator[Tensor]:
    """Every tensor of an encoder.  patch: form of the patch embedding's rows, None where it is a matrix as ours."""
    d, hidden, values = config.width, config.mlp_width, patch_values(config.patch_size) * config.frames
    yield Tensor("patch_embedding.weight", (d, values), (Run(f"{names.patch}.weight", 0, 0, d),), patch)
    if config.patch_bias:
        yield joined("patch_embedding.bias", (d,), f"{names.patch}.bias")
    if config.positions == "learned":
        yield joined("positions.weight", (config.class_token + config.position_grid**2, d), names.positions)
    if config.class_token:
        yield joined("class_token.token", (d,), names.class_token)
    if config.pre_norm:
        yield from _norm(config, "pre_norm", names.pre_norm)
    for layer in range(config.depth):
        ours, theirs = f"blocks.{layer}.", names.layer.format(layer=layer)
        yield from _norm(config, f"{ours}attention_norm", theirs + names.norms[0])
        yield from _linear(config, f"{ours}qkv", 3 * d, d, *(theirs + part for part in names.qkv))
        yield from _linear(config, f"{ours}projection", d, d, theirs + names.projection)
        yield from _norm(config, f"{ours}mlp_norm", theirs + names.norms[1])
        rows = 2 * hidden if config.gated else hidden
        yield from _linear(config, f"{ours}mlp_up", rows, d, *(theirs + part for part in names.up))
        yield from _linear(config, f"{ours}mlp_down", d, hidden, theirs + names.down)
    if config.final_norm:
        yield from _norm(config, "final_norm", names.final_norm)


def _linear(config: ViTConfig, ours: str, rows: int, width: int, *theirs: str) -> Iterator[Tensor]:
    yield joined(f"{ours}.weight", (rows, width), *(f"{name}.weight" for name in theirs))
    if config.bias:
        yield joined(f"{ours}.bias", (rows,), *(f"{name}.bias" for name in theirs))


def _norm(config: ViTConfig, ours: str, theirs: str) -> Iterator[Tensor]:
    yield joined(f"{ours}.weight", (config.width,), f"{theirs}.weight")
    if config.norm == "layernorm":
        yield joined(f"{ours}.bias", (config.width,), f"{theirs}.bias")


def joined(name: str, shape: tuple[int, ...], *theirs: str) -> Tensor:
    """A tensor of ours that is equal parts of theirs, one after the other."""
    rows = shape[0] // len(theirs)
    return Tensor(name, shape, tuple(Run(each, 0, place * rows, rows) for place, each in enumerate(theirs)))
