"""Qwen1.5 and Qwen2 with experts: weights of all experts, and a shared one behind a gate (Yang et al. 2024)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same, SparseLayers, SwitchedWindow

FAMILY = Family(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    fields=(
        Same("intermediate_size", "ffn_width"),
        Same("moe_intermediate_size", "expert_width"),
        Same("shared_expert_intermediate_size", "shared_expert_width"),
        Same("num_experts", "num_experts"),
        Same("num_experts_per_tok", "top_k"),
        Same("norm_topk_prob", "norm_topk_prob"),
        SparseLayers(),
        Same("qkv_bias", "qkv_bias"),
        SwitchedWindow(supported=False),
    ),
    always={"shared_expert_gate": True},
    defaults={
        "rms_norm_eps": 1e-6, "num_key_value_heads": 16, "qkv_bias": True, "intermediate_size": 5632,
        "norm_topk_prob": False,
    },
)  # fmt: skip
