"""Qwen3 with experts (Yang et al. 2025)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same, SparseLayers, SwitchedWindow

FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    fields=(
        Same("intermediate_size", "ffn_width"),
        Same("moe_intermediate_size", "expert_width"),
        Same("num_experts", "num_experts"),
        Same("num_experts_per_tok", "top_k"),
        Same("norm_topk_prob", "norm_topk_prob"),
        SparseLayers(),
        Same("attention_bias", "qkv_bias", "output_bias"),
        SwitchedWindow(by_layer=False),
    ),
    always={"qk_norm": True},
    defaults={
        "rms_norm_eps": 1e-6, "num_key_value_heads": 4, "attention_bias": False, "intermediate_size": 6144,
        "norm_topk_prob": False,
    },
    aliases={"num_local_experts": "num_experts"},
)  # fmt: skip
