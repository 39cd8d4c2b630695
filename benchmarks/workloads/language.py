"""A few of the LLM's layers over rows of whole sequences: forward and backward, no optimizer, in a world of one.

The stage is one from the middle of a pipeline: hidden states come in and go out.

Legend: T tokens, D width, S places of a row.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from benchmarks.workloads.tower import random_like
from tandem.parallel.comm.context import PackedRow, pack_row
from tandem.parallel.grid import build_grid, destroy_grid
from tandem.parallel.layout import Layout
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_spec import build_chunk, transformer_config

# Four layers of a model with 30 billion parameters of which 3 are active.
SLICE = LLMConfig(
    layers=4,
    width=2048,
    heads=32,
    kv_heads=4,
    head_width=128,
    vocab_size=155136,
    ffn_width=0,
    num_experts=128,
    top_k=8,
    expert_width=768,
    shared_expert_width=0,
    aux_loss=0.0,
    z_loss=0.0,
    rope_base=1e6,
    norm_eps=1e-6,
    init_std=0.02,
)
SEQUENCE = 8192


def slice_flops(config: LLMConfig, tokens: int, sequence: int) -> int:
    """Of forward and backward, as three forwards, of `tokens` tokens in causal sequences of `sequence`."""
    d, heads, groups = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    products = d * (heads + 2 * groups) + heads * d + config.top_k * 3 * d * config.expert_width
    products += d * config.num_experts
    scores = 4 * heads * sequence**2 // 2
    return 3 * config.layers * (2 * tokens * products + tokens // sequence * scores)


class World:
    """A world of one with its process groups, as Megatron-core's layers want them; a context."""

    def __init__(self, device: torch.device):
        self.device, self.layout = device, Layout(world=1)

    def __enter__(self) -> "World":
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        self.grid = build_grid(self.layout, self.device, seed=0)
        return self

    def __exit__(self, *_):
        destroy_grid()
        dist.destroy_process_group()


@dataclass(frozen=True)
class Row:
    """Hidden states of a row that enter the layers, the gradient of those that leave them, and the row's plan."""

    hidden_T1D: torch.Tensor
    gradient_T1D: torch.Tensor
    plan: PackedRow


def random_row(config: LLMConfig, world: World, dtype: torch.dtype, tokens: int, sequence: int) -> Row:
    """`tokens` tokens in sequences of `sequence`."""
    positions_T = np.tile(np.arange(sequence, dtype=np.int32), tokens // sequence)
    shape = (tokens, 1, config.width)
    return Row(
        hidden_T1D=random_like(shape, world.device, dtype).requires_grad_(),
        gradient_T1D=random_like(shape, world.device, dtype, seed=2),
        plan=pack_row([sequence] * (tokens // sequence), positions_T, world.layout, 0, world.device),
    )


@dataclass(frozen=True)
class LanguageSlice:
    """Layers and their input on one device; `step` is forward and backward."""

    chunk: nn.Module
    row: Row

    def forward(self) -> torch.Tensor:
        self.chunk.set_input_tensor(self.row.hidden_T1D)
        return self.chunk(tokens_1S=None, labels_1S=None, row=self.row.plan)

    def step(self) -> None:
        self.forward().backward(self.row.gradient_T1D)
        self.row.hidden_T1D.grad = None
        for parameter in self.chunk.parameters():
            parameter.grad = None


def build_language(
    config: LLMConfig,
    world: World,
    dtype: torch.dtype,
    tokens: int,
    sequence: int,
    recompute: str = "none",
    kernels: str = "torch",
) -> LanguageSlice:
    """The layers in `dtype`, and `tokens` tokens in sequences of `sequence`; needs a world that stands."""
    megatron = transformer_config(
        config, world.layout, dtype=dtype, recompute=recompute, deterministic=False, kernels=kernels
    )
    chunk = build_chunk(config, megatron, vp_stage=None, first=False, last=False).to(world.device, dtype)
    draw_weights(chunk, config.init_std)
    return LanguageSlice(chunk, random_row(config, world, dtype, tokens, sequence))


@torch.no_grad()
def draw_weights(module: nn.Module, std: float) -> None:
    """Matrices normal(0, std), vectors one; drawn where they lie, unlike a run's, which no layout may change."""
    for place, parameter in enumerate(module.parameters()):
        if parameter.dim() > 1:
            generator = torch.Generator(parameter.device).manual_seed(place)
            parameter.normal_(0.0, std, generator=generator)
        else:
            parameter.fill_(1.0)


def floors(
    config: LLMConfig, tokens: int, sequence: int, matmul_flops: float, copy_bytes: float, element: int
) -> dict[str, float]:
    """Seconds that each kind of work takes at least, at a matrix product's FLOP/s and a copy's bytes/s.

    Elementwise: every tensor moved once, neighbouring operations in one kernel: norms with the residual sum before
    them, rotation, SwiGLU with the router's weight.  Permutation: rows to their experts and back, once each way in
    forward and backward.
    """
    d, k, f = config.width, config.top_k, config.expert_width
    heads, groups = config.heads * config.head_width, config.kv_heads * config.head_width
    scores = config.layers * (tokens // sequence) * 4 * heads * sequence**2 // 2
    experts = config.layers * 2 * tokens * k * 3 * d * f
    dense = slice_flops(config, tokens, sequence) // 3 - scores - experts
    norms, rotation, swiglu = 2 * (4 + 4) * d, 2 * 2 * (heads + groups), (3 + 5) * k * f
    moved = element * tokens * config.layers / copy_bytes
    return {
        "GEMM": 3 * dense / matmul_flops,
        "grouped GEMM": 3 * experts / matmul_flops,
        "attention forward": scores / matmul_flops,
        "attention backward": 2.5 * scores / matmul_flops,
        "elementwise": moved * (norms + rotation + swiglu),
        "permutation": moved * 4 * (1 + k) * d,
    }
