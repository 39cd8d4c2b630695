"""Qwen2 and Qwen2.5, dense: biases of queries, keys and values (Yang et al. 2024)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same, SwitchedWindow

FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    fields=(Same("intermediate_size", "ffn_width"), SwitchedWindow()),
    always={"qkv_bias": True},
    defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 32},
)
