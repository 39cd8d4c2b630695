"""Which rows of their tensors are which rows of ours.

Every tensor of ours is rows of one or more of theirs, in runs: queries, keys and values by group, gates before ups.

    ours    linear_qkv          q0 q1 k0 v0 | q2 q3 k1 v1          a run is (their tensor, their row, our row, rows)
    theirs  q_proj k_proj v_proj

A run read backwards is the inverse, so reading and writing share one table, and each number is used exactly once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from tandem.train.models.language.llm_config import LLMConfig


@dataclass(frozen=True)
class Run:
    """`rows` rows of their tensor from `begin` on are rows `ours` and following of our tensor."""

    theirs: str
    begin: int
    ours: int
    rows: int


class Form(Protocol):
    """Another arrangement of the numbers of a row.  shape: of theirs; ours is one-dimensional."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def ours(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of theirs, as ours."""

    def theirs(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of ours, as theirs."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of ours, without the module's name in front, and the runs of rows that fill it.

    form: how the numbers of a row lie in theirs; None for as in ours.  fp32: whether a folder of another dtype has it
    in fp32 nevertheless.
    """

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    form: Form | None = None
    fp32: bool = False


@dataclass(frozen=True)
class Names:
    """Their names inside a layer; {expert} stands for the number of one.

    qkv: queries, keys and values.  mlp: gate, up and down of a dense layer; expert, shared: those of an expert, and of
    the shared one.  Parts of one name are one tensor, their rows after each other.
    """

    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    mlp: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expert: tuple[str, ...] = tuple(f"mlp.experts.{{expert}}.{part}_proj" for part in ("gate", "up", "down"))
    router: str = "mlp.gate"
    router_bias: str = "mlp.gate.e_score_correction_bias"
    shared: tuple[str, ...] = tuple(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down"))
    shared_gate: str = "mlp.shared_expert_gate"


def tensors(model: LLMConfig, names: Names) -> Iterator[Tensor]:
    """Every tensor of the whole model, by our names."""
    d = model.width
    yield _copy("embedding.word_embeddings.weight", (model.vocab_size, d), "model.embed_tokens.weight")
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield _copy(f"{ours}input_layernorm.weight", (d,), f"{theirs}input_layernorm.weight")
        yield from _attention(model, names, f"{ours}self_attention.", theirs)
        yield _copy(f"{ours}pre_mlp_layernorm.weight", (d,), f"{theirs}post_attention_layernorm.weight")
        if model.sparse[layer]:
            yield from _experts(model, names, f"{ours}mlp.", theirs)
        else:
            yield from _mlp(f"{ours}mlp.", d, model.ffn_width, *(theirs + name for name in names.mlp))
    yield _copy("decoder.final_layernorm.weight", (d,), "model.norm.weight")
    if not model.tied_embeddings:
        yield _copy("output_layer.weight", (model.vocab_size, d), "lm_head.weight")


def _attention(model: LLMConfig, names: Names, ours: str, theirs: str) -> Iterator[Tensor]:
    d, width = model.width, model.head_width
    parts = [theirs + part for part in names.qkv]
    theirs += "self_attn."
    yield _grouped(f"{ours}linear_qkv.weight", model, [f"{part}.weight" for part in parts], (d,))
    if model.qkv_bias:
        yield _grouped(f"{ours}linear_qkv.bias", model, [f"{part}.bias" for part in parts], ())
    if model.qk_norm_whole:
        yield _copy(f"{ours}q_norm.weight", (model.heads * width,), f"{theirs}q_norm.weight")
        yield _copy(f"{ours}k_norm.weight", (model.kv_heads * width,), f"{theirs}k_norm.weight")
    elif model.qk_norm:
        yield _copy(f"{ours}q_layernorm.weight", (width,), f"{theirs}q_norm.weight")
        yield _copy(f"{ours}k_layernorm.weight", (width,), f"{theirs}k_norm.weight")
    yield _copy(f"{ours}linear_proj.weight", (d, model.heads * width), f"{theirs}o_proj.weight")
    if model.output_bias:
        yield _copy(f"{ours}linear_proj.bias", (d,), f"{theirs}o_proj.bias")


def _experts(model: LLMConfig, names: Names, ours: str, theirs: str) -> Iterator[Tensor]:
    d = model.width
    yield _copy(f"{ours}router.weight", (model.num_experts, d), f"{theirs}{names.router}.weight")
    if model.expert_bias:
        bias = _copy(f"{ours}router.expert_bias", (model.num_experts,), theirs + names.router_bias)
        yield replace(bias, fp32=True)  # rounding would change the choice of experts
    if model.shared_expert_width:
        parts = (theirs + name for name in names.shared)
        yield from _mlp(f"{ours}shared_experts.", d, model.shared_expert_width, *parts)
    if model.shared_expert_gate:
        yield _copy(f"{ours}shared_experts.gate_weight", (1, d), f"{theirs}{names.shared_gate}.weight")
    for expert in range(model.num_experts):
        parts = (theirs + name.format(expert=expert) for name in names.expert)
        yield from _mlp(f"{ours}experts.local_experts.{expert}.", d, model.expert_width, *parts)


def _mlp(ours: str, d: int, width: int, gate: str, up: str, down: str) -> Iterator[Tensor]:
    runs = Run(f"{gate}.weight", 0, 0, width), Run(f"{up}.weight", width * (up == gate), width, width)
    yield Tensor(f"{ours}linear_fc1.weight", (2 * width, d), runs)
    yield _copy(f"{ours}linear_fc2.weight", (d, width), f"{down}.weight")


def _copy(name: str, shape: tuple[int, ...], theirs: str) -> Tensor:
    return Tensor(name, shape, (Run(theirs, 0, 0, shape[0]),))


def _grouped(name: str, model: LLMConfig, theirs: list[str], rest: tuple[int, ...]) -> Tensor:
    """Of each group its queries, its key, its value, one after the other.  theirs: q, k and v; rest: of the shape."""
    width, repeat = model.head_width, model.heads // model.kv_heads
    heads_of = (model.heads, model.kv_heads, model.kv_heads)
    begins = [sum(heads_of[j] for j in range(i) if theirs[j] == theirs[i]) for i in range(3)]
    runs, row = [], 0
    for group in range(model.kv_heads):
        for part, begin, heads in zip(theirs, begins, (repeat, 1, 1), strict=True):
            runs.append(Run(part, (begin + group * heads) * width, row, heads * width))
            row += heads * width
    return Tensor(name, (row, *rest), tuple(runs))
