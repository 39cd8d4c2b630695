"""Qwen3, dense: norms of queries and keys of every head (Yang et al. 2025)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same, SwitchedWindow

FAMILY = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    fields=(
        Same("intermediate_size", "ffn_width"),
        Same("attention_bias", "qkv_bias", "output_bias"),
        SwitchedWindow(),
    ),
    always={"qk_norm": True},
    defaults={"rms_norm_eps": 1e-6, "head_dim": 128, "num_key_value_heads": 32, "attention_bias": False},
)
