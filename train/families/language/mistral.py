"""Mistral, with or without a sliding window (Jiang et al. 2023)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same, Window

FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    fields=(Same("intermediate_size", "ffn_width"), Window()),
    defaults={"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
)
