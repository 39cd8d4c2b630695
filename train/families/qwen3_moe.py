"""Qwen3 with experts in every layer, weights of the chosen ones normalised (Yang et al. 2025)."""

from tandem.train.families.base import Family

FAMILY = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    qk_norm=True,
    experts=True,
    gate="mlp.experts.{expert}.gate_proj",
    up="mlp.experts.{expert}.up_proj",
    down="mlp.experts.{expert}.down_proj",
    sizes={"moe_intermediate_size": "expert_width", "num_experts": "num_experts", "num_experts_per_tok": "top_k"},
    fixed={
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    aliases={"num_local_experts": "num_experts"},
    defaults={"rms_norm_eps": 1e-6, "head_dim": None, "num_key_value_heads": 4, "intermediate_size": 6144},
)
