"""Llama 2 and 3 (Touvron et al. 2023; Grattafiori et al. 2024), with the scaled rotary positions of 3.1 and later."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    fields=(Same("intermediate_size", "ffn_width"), Same("attention_bias", "qkv_bias", "output_bias")),
    fixed={"mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "attention_bias": False},
)
