"""What a family is: a table of settings, and a table of tensors whose rows are the same numbers under two names.

Every tensor of ours is rows of one or more of theirs, in runs: queries, keys and values by group, gates before ups.

    ours    linear_qkv          q0 q1 k0 v0 | q2 q3 k1 v1          a run is (their tensor, their row, our row, rows)
    theirs  q_proj k_proj v_proj

A run read backwards is the inverse, so reading and writing share one table, and each number is used exactly once.

Legend: H query heads, G key/value heads, K head width, F width of the MLP.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from tandem.train.models.language.llm_config import LLMConfig

ATTENTION = "decoder.layers.{layer}.self_attention."
MLP = "decoder.layers.{layer}.mlp."
# Of config.json: says nothing about the weights or about what they compute.
WITHOUT_MEANING = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings", "attention_dropout",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "pretraining_tp", "max_window_layers",
    "layer_types", "_name_or_path", "return_dict", "output_hidden_states", "chunk_size_feed_forward", "id2label",
    "label2id", "is_encoder_decoder", "output_attentions", "problem_type", "_attn_implementation",
}  # fmt: skip


SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
}
FIXED = {"hidden_act": "silu", "tie_word_embeddings": False}


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

    form: how the numbers of a row lie in theirs; None for as in ours.
    """

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    form: Form | None = None


@dataclass(frozen=True)
class Family:
    """One family.

    model_type, architecture: as `config.json` has them.  qk_norm, experts: whether its models have them.
    gate, up, down, router: names of the MLP's parts within a layer; {expert} stands for the number of one.
    sizes: field of config.json to key of ours, beside SIZES.  fixed: fields that must have this value, beside FIXED.
    defaults: of fields that a folder may leave out.  aliases: other names of fields, to those used here.
    """

    model_type: str
    architecture: str
    qk_norm: bool = False
    experts: bool = False
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    sizes: dict[str, str] = field(default_factory=lambda: {"intermediate_size": "ffn_width"})
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)

    # ---- settings

    def settings(self, said: dict) -> dict[str, Any]:
        """Keys of `model.llm` from a config.json.  Raises ValueError for a field that is not supported, by name."""
        said = {self.aliases.get(name, name): value for name, value in said.items()}
        said = {**FIXED, **self.fixed, **self.defaults, **said}
        if partial := {kind for kind in said.get("layer_types") or () if kind != "full_attention"}:
            raise ValueError(f"config.json: layer_types has {', '.join(sorted(partial))}, which is not supported")
        base = self._rope_base(said)
        known = {**SIZES, **self.sizes}
        if missing := sorted(known.keys() - said.keys() - {"head_dim", "num_key_value_heads"}):
            raise ValueError(f"config.json: {', '.join(missing)} is missing")
        if said.get("head_dim") is None:
            said["head_dim"] = said["hidden_size"] // said["num_attention_heads"]
        if said.get("num_key_value_heads") is None:
            said["num_key_value_heads"] = said["num_attention_heads"]
        for name, value in {**FIXED, **self.fixed}.items():
            if said[name] != value:
                raise ValueError(f"config.json: {name}={said[name]!r} is not supported, only {value!r}")
        meant = {*known, *FIXED, *self.fixed, *self.defaults, "rope_theta", "rope_scaling", "rope_parameters"}
        if unknown := sorted(set(said) - meant - WITHOUT_MEANING):
            raise ValueError(f"config.json: {', '.join(unknown)} of {self.model_type} is not supported")
        out = {key: said[name] for name, key in known.items()}
        none = {"ffn_width": 0} if self.experts else {"num_experts": 0, "top_k": 1, "expert_width": 1}
        return none | out | {"rope_base": float(base), "qk_norm": self.qk_norm, "shared_expert_width": 0}

    def _rope_base(self, said: dict) -> float:
        rope = {**(said.get("rope_parameters") or {}), **(said.get("rope_scaling") or {})}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ValueError(f"config.json: rope_type={kind} is not supported, only default")
        if unknown := sorted(rope.keys() - {"rope_type", "type", "rope_theta"}):
            raise ValueError(f"config.json: {', '.join(unknown)} of the rotary positions is not supported")
        return rope.get("rope_theta", said.get("rope_theta", 10000.0))

    def config(self, model: LLMConfig, dtype: str) -> dict[str, Any]:
        """A config.json of this model."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type, "dtype": dtype}
        out |= {**self.defaults, **FIXED, **self.fixed}
        out |= {name: getattr(model, key) for name, key in {**SIZES, **self.sizes}.items()}
        return out | {"rope_theta": model.rope_base, "use_cache": True}

    def refusal(self, model: LLMConfig) -> str | None:
        """Why this family cannot hold a model; None where it can."""
        if bool(model.num_experts) is not self.experts:
            return "its models have experts" if self.experts else "its models have no experts"
        if model.qk_norm is not self.qk_norm:
            return "its models norm queries and keys" if self.qk_norm else "its models do not norm queries and keys"
        return "its models have no shared expert" if model.shared_expert_width and model.num_experts else None

    # ---- tensors

    def left_out(self, names: Iterable[str], model: LLMConfig) -> dict[str, str]:
        """Of surplus tensors of a folder those that are not used, and why."""
        return {}

    def tensors(self, model: LLMConfig) -> Iterator[Tensor]:
        """Every tensor of the whole model, by our names."""
        d, width = model.width, model.head_width
        yield _copy("embedding.word_embeddings.weight", (model.vocab_size, d), "model.embed_tokens.weight")
        for layer in range(model.layers):
            attention, theirs = ATTENTION.format(layer=layer), f"model.layers.{layer}."
            before, after = (
                f"decoder.layers.{layer}.{name}.weight" for name in ("input_layernorm", "pre_mlp_layernorm")
            )
            yield _copy(before, (d,), f"{theirs}input_layernorm.weight")
            yield _grouped(f"{attention}linear_qkv.weight", model, f"{theirs}self_attn.")
            if self.qk_norm:
                yield _copy(f"{attention}q_layernorm.weight", (width,), f"{theirs}self_attn.q_norm.weight")
                yield _copy(f"{attention}k_layernorm.weight", (width,), f"{theirs}self_attn.k_norm.weight")
            yield _copy(f"{attention}linear_proj.weight", (d, model.heads * width), f"{theirs}self_attn.o_proj.weight")
            yield _copy(after, (d,), f"{theirs}post_attention_layernorm.weight")
            yield from self._mlp(model, MLP.format(layer=layer), theirs)
        yield _copy("decoder.final_layernorm.weight", (d,), "model.norm.weight")
        yield _copy("output_layer.weight", (model.vocab_size, d), "lm_head.weight")

    def _mlp(self, model: LLMConfig, ours: str, theirs: str) -> Iterator[Tensor]:
        d = model.width
        if not self.experts:
            yield _gated(f"{ours}linear_fc1.weight", (2 * model.ffn_width, d), theirs + self.gate, theirs + self.up)
            yield _copy(f"{ours}linear_fc2.weight", (d, model.ffn_width), f"{theirs}{self.down}.weight")
            return
        yield _copy(f"{ours}router.weight", (model.num_experts, d), f"{theirs}{self.router}.weight")
        for expert in range(model.num_experts):
            here = f"{ours}experts.local_experts.{expert}."
            gate, up, down = (theirs + part.format(expert=expert) for part in (self.gate, self.up, self.down))
            yield _gated(f"{here}linear_fc1.weight", (2 * model.expert_width, d), gate, up)
            yield _copy(f"{here}linear_fc2.weight", (d, model.expert_width), f"{down}.weight")


def _copy(name: str, shape: tuple[int, ...], theirs: str) -> Tensor:
    return Tensor(name, shape, (Run(theirs, 0, 0, shape[0]),))


def _gated(name: str, shape: tuple[int, ...], gate: str, up: str) -> Tensor:
    half = shape[0] // 2
    return Tensor(name, shape, (Run(f"{gate}.weight", 0, 0, half), Run(f"{up}.weight", 0, half, half)))


def _grouped(name: str, model: LLMConfig, theirs: str) -> Tensor:
    """Of each group its queries, its key, its value, one after the other."""
    width, repeat = model.head_width, model.heads // model.kv_heads
    runs, row = [], 0
    for group in range(model.kv_heads):
        for part, heads in (("q", repeat), ("k", 1), ("v", 1)):
            runs.append(Run(f"{theirs}{part}_proj.weight", group * heads * width, row, heads * width))
            row += heads * width
    return Tensor(name, (row, model.width), tuple(runs))
