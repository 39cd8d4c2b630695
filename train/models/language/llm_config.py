"""Sizes of the language model, and what a layout must divide.  Needs no Megatron-core."""

from dataclasses import dataclass

from tandem.parallel.layout import Layout


@dataclass
class LLMConfig:
    """Sizes of the language model; `num_experts=0` makes it dense with `ffn_width`.

    qk_norm: RMSNorm of every head's queries and keys before rotation (Qwen3).  folder: of Hugging Face's format, from
    which sizes and first weights come.
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
    qk_norm: bool = False
    folder: str | None = None

    def check(self, layout: Layout) -> None:
        """Raises ValueError, naming keys and values, where this model does not fit the layout."""
        sizes = ["layers", "width", "heads", "kv_heads", "head_width", "vocab_size"]
        sizes += ["top_k", "expert_width"] if self.num_experts else ["ffn_width"]
        for key, least in {**dict.fromkeys(sizes, 1), "num_experts": 0, "shared_expert_width": 0}.items():
            if getattr(self, key) < least:
                raise ValueError(f"model.llm.{key}={getattr(self, key)}: must be at least {least}")
        if self.head_width % 2:
            raise ValueError(f"model.llm.head_width={self.head_width}: must be even, rotary positions turn pairs")
        rules = (
            ("model.llm.heads", self.heads, "parallel.tp", layout.tp),
            ("model.llm.kv_heads", self.kv_heads, "parallel.tp", layout.tp),
            ("model.llm.vocab_size", self.vocab_size, "parallel.tp", layout.tp),
            ("model.llm.heads", self.heads, "model.llm.kv_heads", self.kv_heads),
            ("model.llm.layers", self.layers, "parallel.pp*vpp", layout.pp * layout.vpp),
        )
        if self.num_experts:
            rules += (
                ("model.llm.num_experts", self.num_experts, "parallel.ep", layout.ep),
                ("model.llm.expert_width", self.expert_width, "parallel.etp", layout.etp),
                ("model.llm.shared_expert_width", self.shared_expert_width, "parallel.tp", layout.tp),
            )
        else:
            rules += (("model.llm.ffn_width", self.ffn_width, "parallel.tp", layout.tp),)
        for key, value, by, divisor in rules:
            if value % divisor:
                raise ValueError(f"{key}={value} is not divisible by {by}={divisor}")
        if self.num_experts and self.top_k == 1:
            raise ValueError("model.llm.top_k=1: the weight of a single expert is 1, so its router would not learn")
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(f"model.llm.top_k={self.top_k} is more than model.llm.num_experts={self.num_experts}")
        if not self.num_experts and layout.ep > 1:
            raise ValueError(f"parallel.ep={layout.ep} with model.llm.num_experts=0: there are no experts to divide")
