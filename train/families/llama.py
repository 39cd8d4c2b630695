"""Llama 2 and 3 without scaled rotary positions (Touvron et al. 2023; Grattafiori et al. 2024)."""

from tandem.train.families.base import Family

FAMILY = Family(
    "llama",
    "LlamaForCausalLM",
    fixed={"attention_bias": False, "mlp_bias": False},
    defaults={"rms_norm_eps": 1e-6, "head_dim": None, "num_key_value_heads": None},
)
