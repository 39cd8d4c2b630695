"""Mistral without a sliding window (Jiang et al. 2023)."""

from tandem.train.families.base import Family

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    fixed={"sliding_window": None},
    defaults={"rms_norm_eps": 1e-6, "head_dim": None, "num_key_value_heads": 8},
)
