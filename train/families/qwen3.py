"""Qwen3, dense: norms of queries and keys of every head (Yang et al. 2025)."""

from tandem.train.families.base import Family

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    qk_norm=True,
    fixed={"attention_bias": False, "use_sliding_window": False, "sliding_window": None},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": 32},
)
