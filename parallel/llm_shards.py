"""Where each parameter of a Megatron-core model chunk lies in the whole model: one name and one box, in any layout.

A local parameter is one or more pieces of a global tensor: layers are counted over the pipeline, experts over ep, and a
tensor-parallel dimension is cut (SwiGLU's fc1 twice, gate and up apart).  Initial weights and checkpoints both go
through this map, so they are the same whatever the layout.
"""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import parallel_state

from parallel.state import Piece


@dataclass(frozen=True)
class Shard:
    """One local parameter: its name and shape in the whole model, and the pieces of it that are here."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    parameter: torch.nn.Parameter


def shards_of(chunk: torch.nn.Module) -> Iterator[Shard]:
    """Shards of every parameter of one unwrapped model chunk."""
    for name, parameter in chunk.named_parameters():
        size, rank = _tensor_parallel(name)
        dim = getattr(parameter, "partition_dim", -1) if getattr(parameter, "tensor_model_parallel", False) else -1
        shape = list(parameter.shape)
        if dim < 0 or size == 1:
            pieces = (Piece(0, 0, 0, shape[0]),)
        else:
            local, shape[dim] = shape[dim], shape[dim] * size
            gated = 2 if "linear_fc1" in name else 1  # gate and up lie one after the other
            part, whole = local // gated, shape[dim] // gated
            pieces = tuple(Piece(dim, i * part, i * whole + rank * part, part) for i in range(gated))
        yield Shard(_global_name(chunk, name), tuple(shape), pieces, parameter)


@torch.no_grad()
def initialize(chunk: torch.nn.Module, seed: int, std: float, layers: int) -> None:
    """Weights normal(0, std), those that write to the residual stream std / sqrt(2 layers), norms one.

    Every global tensor is drawn from (seed, its name) alone, hence equal in every layout.
    """
    for shard in shards_of(chunk):
        if shard.parameter.dim() == 1:
            shard.parameter.fill_(1.0)
            continue
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{shard.name}".encode()))
        to_residual = shard.name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        scale = std / (2 * layers) ** 0.5 if to_residual else std
        whole = torch.randn(shard.shape, generator=generator) * scale
        for piece in shard.pieces:
            piece.of_local(shard.parameter).copy_(piece.of_global(whole))


def _is_expert(name: str) -> bool:
    return "local_experts" in name


def _tensor_parallel(name: str) -> tuple[int, int]:
    if _is_expert(name):
        return (
            parallel_state.get_expert_tensor_parallel_world_size(),
            parallel_state.get_expert_tensor_parallel_rank(),
        )
    return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()


def _global_name(chunk: torch.nn.Module, name: str) -> str:
    words = name.split(".")
    if words[:2] == ["decoder", "layers"]:
        words[2] = str(chunk.decoder.layers[int(words[2])].layer_number - 1)
    if _is_expert(name):
        place = words.index("local_experts") + 1
        here = chunk.config.num_moe_experts // chunk.config.expert_model_parallel_size
        words[place] = str(int(words[place]) + here * parallel_state.get_expert_model_parallel_rank())
    return ".".join(words)
