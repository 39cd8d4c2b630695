"""Sizes and switches of the language model, and what a layout must divide.  Needs no Megatron-core."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from tandem.parallel.layout import Layout
from tandem.train.models.language.rope import Rope, check_scaling, check_sections

# Settings of training and places of weights: two models that differ in these alone are one architecture.
NOT_OF_THE_MODEL = {"aux_loss", "z_loss", "init_std", "folder", "balance"}
ROUTING = {
    "norm_topk_prob": True, "router_score": "softmax", "expert_bias": False, "routed_scaling": 1.0, "router_groups": 1,
    "router_top_groups": 1, "shared_expert_gate": False, "first_dense_layers": 0, "moe_every": 1,
}  # fmt: skip
DENSE = {"num_experts": 0, "top_k": 1, "expert_width": 1, "shared_expert_width": 0, **ROUTING}
SCORES = ("softmax", "sigmoid")

AUX_LOSSES = ("aux_loss", "seq_aux_loss")


@dataclass
class BalanceConfig:
    """What evens out the load of experts, beside `aux_loss`.

    bias_update: step of a bias that is added to an expert's score where experts are chosen, 0 for no bias; by_modality:
    a bias for text and one for visual tokens, each moved by its own tokens.  aux_loss_type: what the balancing loss is
    of, by Megatron-core's names: aux_loss (a micro-batch) or seq_aux_loss (each sample).
    """

    bias_update: float = 0.0
    by_modality: bool = False
    aux_loss_type: str = "aux_loss"


@dataclass
class LLMConfig:
    """Sizes of the language model; `num_experts=0` makes it dense with `ffn_width`.  Switches are off by default.

    qk_norm: RMSNorm of every head's queries and keys before rotation (Qwen3); qk_norm_whole: one over all heads
    (OLMoE).  folder: of Hugging Face's format, from which sizes and initial weights come.  tied_embeddings: the output
    layer is the embedding.  rope_scaling, rotary_fraction, mrope_sections, mrope_interleaved: see
    `train.models.language.rope`.  qkv_bias, output_bias: of the linear layers before and after attention.  window: keys
    that a query sees, its own with them, in the layers from `window_from` on; 0 for all.

    Of layers with experts: norm_topk_prob: the weights of the chosen experts sum to one; without, they are those of
    `router_score` over all experts.  expert_bias: a stored number per expert, added to the scores in the choice alone;
    `balance` may move it, and then there is one without this switch too.
    routed_scaling: factor of the weights.  router_groups, router_top_groups: a token's experts come from its best so
    many groups; a group's score is the sum of its top_k / router_top_groups best.  shared_expert_gate: the shared
    expert's output times a sigmoid.  first_dense_layers, moe_every: layers with an MLP of `ffn_width` instead, the
    first ones, and all but each n-th.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    vocab_size: int
    ffn_width: int
    num_experts: int
    top_k: int
    expert_width: int
    shared_expert_width: int
    aux_loss: float
    z_loss: float
    rope_base: float
    norm_eps: float
    init_std: float
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    qk_norm: bool = False
    qk_norm_whole: bool = False
    folder: str | None = None
    tied_embeddings: bool = False
    rope_scaling: dict[str, Any] | None = None
    rotary_fraction: float = 1.0
    mrope_sections: list[int] | None = None
    mrope_interleaved: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    window: int = 0
    window_from: int = 0
    norm_topk_prob: bool = True
    router_score: str = "softmax"
    expert_bias: bool = False
    routed_scaling: float = 1.0
    router_groups: int = 1
    router_top_groups: int = 1
    shared_expert_gate: bool = False
    first_dense_layers: int = 0
    moe_every: int = 1

    def padded_vocab(self, tp: int) -> int:
        """Rows of the embedding over all tp ranks, each with as many."""
        return -(-self.vocab_size // tp) * tp

    @property
    def rope(self) -> Rope:
        sections: Any = None if self.mrope_sections is None else tuple(self.mrope_sections)
        width = int(self.head_width * self.rotary_fraction)
        return Rope(width, self.rope_base, self.rope_scaling or {}, sections, self.mrope_interleaved)

    @property
    def sparse(self) -> tuple[bool, ...]:
        """Of each layer whether it has experts."""
        first, every = self.first_dense_layers, self.moe_every
        return tuple(
            bool(self.num_experts) and layer >= first and (layer + 1) % every == 0 for layer in range(self.layers)
        )

    @property
    def windowed_layers(self) -> int:
        """How many layers have the window."""
        return self.layers - self.window_from if self.window else 0

    @property
    def has_expert_bias(self) -> bool:
        """Whether routers have a bias: a stored one, or one that balancing moves."""
        return self.expert_bias or self.balance.bias_update > 0

    @property
    def architecture(self) -> dict[str, Any]:
        """Every key that says what the weights are and what they compute; those without a use in this model as they are
        in a model without that part."""
        said = {key: value for key, value in asdict(self).items() if key not in NOT_OF_THE_MODEL}
        if not self.num_experts:
            return said | DENSE
        return said | ({"ffn_width": 0} if all(self.sparse) else {})

    def _check_balance(self) -> None:
        """Raises ValueError, naming keys and values, for a way of balancing that cannot be."""
        balance = self.balance
        if not 0 <= balance.bias_update < math.inf:
            raise ValueError(f"model.llm.balance.bias_update={balance.bias_update}: must be a finite number from 0 on")
        if balance.aux_loss_type not in AUX_LOSSES:
            raise ValueError(
                f"model.llm.balance.aux_loss_type={balance.aux_loss_type}: must be one of {', '.join(AUX_LOSSES)}"
            )
        if balance.bias_update and not self.num_experts:
            raise ValueError(
                f"model.llm.balance.bias_update={balance.bias_update} with model.llm.num_experts=0: there are no "
                "experts to balance"
            )
        if balance.by_modality and not self.has_expert_bias:
            raise ValueError(
                "model.llm.balance.by_modality=true: needs model.llm.balance.bias_update above 0, or "
                "model.llm.expert_bias=true for biases that stay as they are"
            )

    def check(self, layout: Layout) -> None:
        """Raises ValueError, naming keys and values, where this model does not fit the layout."""
        self._check_sizes()
        self._check_switches()
        self._check_routing()
        self._check_balance()
        self._check_layout(layout)

    def _check_sizes(self) -> None:
        sizes = ["layers", "width", "heads", "kv_heads", "head_width", "vocab_size"]
        sizes += ["top_k", "expert_width", "moe_every"] if self.num_experts else []
        self._at_least(1, *sizes)
        self._at_least(0, "num_experts", "shared_expert_width", "first_dense_layers", "window", "window_from")
        if self.num_experts and not any(self.sparse):
            raise ValueError(
                f"model.llm.first_dense_layers={self.first_dense_layers} with model.llm.moe_every={self.moe_every}: no "
                f"layer of model.llm.layers={self.layers} would have experts"
            )
        if not all(self.sparse):
            self._at_least(1, "ffn_width")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.llm.heads={self.heads} is not divisible by model.llm.kv_heads={self.kv_heads}")

    def _at_least(self, least: int, *keys: str) -> None:
        for key in keys:
            if getattr(self, key) < least:
                raise ValueError(f"model.llm.{key}={getattr(self, key)}: must be at least {least}")

    def _check_switches(self) -> None:
        check_scaling(self.rope_scaling)
        turned = self.head_width * self.rotary_fraction
        if not 0 < self.rotary_fraction <= 1 or int(turned) % 2 or int(turned) < 2:
            raise ValueError(
                f"model.llm.head_width={self.head_width} with model.llm.rotary_fraction={self.rotary_fraction}: rotary "
                "positions turn pairs, so the fraction must be an even number of channels, at most all"
            )
        check_sections(self.mrope_sections, self.mrope_interleaved, int(turned))
        if self.window_from and (not self.window or self.window_from >= self.layers):
            raise ValueError(
                f"model.llm.window_from={self.window_from} with model.llm.window={self.window} and model.llm.layers="
                f"{self.layers}: no layer would have a window"
            )
        if self.output_bias and not self.qkv_bias:
            raise ValueError("model.llm.output_bias=true needs model.llm.qkv_bias=true")
        if self.qk_norm_whole and not self.qk_norm:
            raise ValueError("model.llm.qk_norm_whole=true needs model.llm.qk_norm=true")

    def _check_routing(self) -> None:
        if not self.num_experts:
            if used := [key for key, off in ROUTING.items() if getattr(self, key) != off]:
                raise ValueError(f"model.llm.{used[0]}={getattr(self, used[0])} with model.llm.num_experts=0: no use")
            return
        if self.router_score not in SCORES:
            raise ValueError(f"model.llm.router_score={self.router_score}: must be one of {', '.join(SCORES)}")
        if self.router_score == "sigmoid" and not self.norm_topk_prob:
            raise ValueError("model.llm.norm_topk_prob=false: weights of model.llm.router_score=sigmoid sum to one")
        if self.shared_expert_gate and not self.shared_expert_width:
            raise ValueError("model.llm.shared_expert_gate=true needs model.llm.shared_expert_width above 0")
        if not self.routed_scaling > 0:
            raise ValueError(f"model.llm.routed_scaling={self.routed_scaling}: must be above 0")
        if self.top_k == 1 and self.norm_topk_prob:
            raise ValueError(
                "model.llm.top_k=1: the weight of a single expert is 1, so its router would not learn; "
                "set model.llm.norm_topk_prob=false"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"model.llm.top_k={self.top_k} is more than model.llm.num_experts={self.num_experts}")
        self._check_groups()

    def _check_groups(self) -> None:
        """A group's score is the sum of its top_k / router_top_groups best experts."""
        groups, top = self.router_groups, self.router_top_groups
        if not 1 <= top <= groups or self.num_experts % groups:
            raise ValueError(
                f"model.llm.router_groups={groups} with model.llm.router_top_groups={top}: the groups must divide "
                f"model.llm.num_experts={self.num_experts}, and the chosen ones be from 1 to all"
            )
        if groups > 1 and (self.top_k % top or self.top_k // top > self.num_experts // groups):
            raise ValueError(
                f"model.llm.router_top_groups={top}: must divide model.llm.top_k={self.top_k}, and a group of "
                f"{self.num_experts // groups} have as many experts as that gives"
            )

    def _check_layout(self, layout: Layout) -> None:
        rules = (
            ("model.llm.heads", self.heads, "parallel.tp", layout.tp),
            ("model.llm.kv_heads", self.kv_heads, "parallel.tp", layout.tp),
            ("model.llm.layers", self.layers, "parallel.pp*vpp", layout.pp * layout.vpp),
        )
        if self.num_experts:
            rules += (
                ("model.llm.num_experts", self.num_experts, "parallel.ep", layout.ep),
                ("model.llm.expert_width", self.expert_width, "parallel.etp", layout.etp),
                ("model.llm.shared_expert_width", self.shared_expert_width, "parallel.tp", layout.tp),
            )
        if not all(self.sparse):
            rules += (("model.llm.ffn_width", self.ffn_width, "parallel.tp", layout.tp),)
        for key, value, by, divisor in rules:
            if value % divisor:
                raise ValueError(f"{key}={value} is not divisible by {by}={divisor}")
        if self.vocab_size <= layout.tp * (layout.tp - 1):
            raise ValueError(
                f"model.llm.vocab_size={self.vocab_size} is too small for parallel.tp={layout.tp}: the last rank would "
                "have no token"
            )
        if not self.num_experts and layout.ep > 1:
            raise ValueError(f"parallel.ep={layout.ep} with model.llm.num_experts=0: there are no experts to divide")
