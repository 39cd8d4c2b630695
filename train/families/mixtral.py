"""Mixtral: experts in every layer, a softmax over the chosen ones (Jiang et al. 2024)."""

from tandem.train.families.base import Family

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    experts=True,
    gate="block_sparse_moe.experts.{expert}.w1",
    up="block_sparse_moe.experts.{expert}.w3",
    down="block_sparse_moe.experts.{expert}.w2",
    router="block_sparse_moe.gate",
    sizes={"intermediate_size": "expert_width", "num_local_experts": "num_experts", "num_experts_per_tok": "top_k"},
    fixed={"sliding_window": None},
    defaults={"rms_norm_eps": 1e-5, "head_dim": None, "num_key_value_heads": 8, "rope_theta": 1e6},
)
