"""Where each parameter of a Megatron-core model chunk lies in the whole model: one name and one box, in any layout.

A local parameter is one or more pieces of a global tensor: layers are counted over the pipeline, experts over ep, and a
tensor-parallel dimension is cut (SwiGLU's fc1 twice, gate and up apart).  Every expert's matrix is a tensor of its own
in the whole model, however the kernels of a run hold it:

    experts.local_experts.3.linear_fc1.weight     SequentialMLP, and the name in the whole model
    experts.linear_fc1.weight3                    Transformer Engine's TEGroupedMLP
    experts.linear_fc1, entry 3 of [E, G, D]      parallel.kernels.experts.GroupedExperts: one parameter, E shards

Initial weights and checkpoints both go through this map, so they are the same whatever the layout and the kernels.
"""

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from megatron.core import parallel_state

from tandem.parallel.engines.state import ROUTER_BIAS, VOCABULARY, Piece

EXPERT = re.compile(
    r"(?P<layer>.+\.experts\.)"
    r"(?:local_experts\.(?P<own>\d+)\.(?P<own_part>\w+)\.weight|(?P<te_part>\w+)\.weight(?P<te>\d+)|(?P<stacked_part>\w+))"
)


@dataclass(frozen=True)
class Shard:
    """What a parameter, or one `entry` of its first dimension, holds of a tensor of the whole model.

    name, shape: of that tensor; pieces: the parts of it that are here.  A router's stored bias is no parameter of the
    optimizer: `trained` is false.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    parameter: torch.Tensor
    entry: int | None = None

    @property
    def padded(self) -> bool:
        """Whether entries here are no part of the whole tensor."""
        dim = self.pieces[0].dim
        return sum(piece.length for piece in self.pieces) < self.local.shape[dim]

    @property
    def local(self) -> torch.Tensor:
        """The values here, a view of the parameter."""
        whole = self.parameter.detach()
        return whole if self.entry is None else whole[self.entry]

    @property
    def trained(self) -> bool:
        return isinstance(self.parameter, torch.nn.Parameter)

    @property
    def begin(self) -> int:
        """Where the first of them is among the parameter's entries."""
        return (self.entry or 0) * self.local.numel()


def shards_of(chunk: torch.nn.Module) -> Iterator[Shard]:
    """Shards of every parameter, and of the routers' biases, of one unwrapped model chunk."""
    for name, parameter in chunk.named_parameters():
        name = _in_whole_pipeline(chunk, name)
        match = EXPERT.fullmatch(name)
        if match:
            yield from _expert_shards(chunk, match, parameter)
        else:
            dim = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
            size = parallel_state.get_tensor_model_parallel_world_size()
            shard = _shard(name, parameter, dim, size, parallel_state.get_tensor_model_parallel_rank())
            yield _without_padding(shard, cast(int, chunk.words)) if name in VOCABULARY else shard
    for name, buffer in chunk.named_buffers():
        if ROUTER_BIAS.fullmatch(name):
            yield _shard(_in_whole_pipeline(chunk, name), buffer, -1, 1, 0)


def _expert_shards(chunk, match: re.Match, parameter) -> Iterator[Shard]:
    part = match["own_part"] or match["te_part"] or match["stacked_part"]
    here = chunk.config.num_moe_experts // chunk.config.expert_model_parallel_size
    first = here * parallel_state.get_expert_model_parallel_rank()
    dim = 0 if part == "linear_fc1" else 1  # Transformer Engine does not know: Megatron-core hands it the cut sizes
    size = parallel_state.get_expert_tensor_parallel_world_size()
    rank = parallel_state.get_expert_tensor_parallel_rank()
    stacked = match["stacked_part"] is not None
    for expert in range(here) if stacked else [int(match["own"] or match["te"])]:
        name = f"{match['layer']}local_experts.{first + expert}.{part}.weight"
        yield _shard(name, parameter, dim, size, rank, expert if stacked else None)


def _shard(name: str, parameter, dim: int, size: int, rank: int, entry: int | None = None) -> Shard:
    """The shard of rank `rank` of `size` that cut dimension `dim`, none where it is negative."""
    shape = list(parameter.shape if entry is None else parameter.shape[1:])
    if dim < 0 or size == 1:
        pieces: tuple[Piece, ...] = (Piece(0, 0, 0, shape[0]),)
    else:
        local, shape[dim] = shape[dim], shape[dim] * size
        gated = 2 if "linear_fc1" in name else 1  # gate and up lie one after the other
        part, whole = local // gated, shape[dim] // gated
        pieces = tuple(Piece(dim, i * part, i * whole + rank * part, part) for i in range(gated))
    return Shard(name, tuple(shape), pieces, parameter, entry)


def _without_padding(shard: Shard, words: int) -> Shard:
    """The shard of a tensor of `words` rows whose parameters have more, in the last ranks."""
    (piece,) = shard.pieces
    length = min(piece.length, words - piece.start)
    return replace(shard, shape=(words, *shard.shape[1:]), pieces=(replace(piece, length=length),))


@torch.no_grad()
def initialize(chunk: torch.nn.Module, seed: int, std: float, layers: int) -> None:
    """Weights normal(0, std), those that write to the residual stream std / sqrt(2 layers), norms one, biases zero.

    Every global tensor is drawn from (seed, its name) alone, hence equal in every layout.
    """
    for shard in shards_of(chunk):
        if shard.local.dim() == 1:
            shard.local.fill_(0.0 if shard.name.endswith("bias") or not shard.trained else 1.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{shard.name}".encode()))
        to_residual = shard.name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / (2 * layers) ** 0.5 if to_residual else std
        whole = torch.randn(shard.shape, generator=generator) * scale
        if shard.padded:
            shard.local.zero_()
        for piece in shard.pieces:
            piece.of_local(shard.local).copy_(piece.of_global(whole))


def _in_whole_pipeline(chunk: Any, name: str) -> str:
    if name == "output_layer.weight" and chunk.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # the last stage's copy
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(chunk.decoder.layers[int(words[2])].layer_number - 1)
    return ".".join(words)
