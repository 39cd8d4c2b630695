"""Phi-3 and Phi-4 without LongRoPE: queries, keys and values are one tensor, gates and ups another (Abdin et al.
2024)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Rotary, Same, Window
from tandem.train.families.tensors import Names

FAMILY = Family(
    "phi3",
    "Phi3ForCausalLM",
    fields=(Same("intermediate_size", "ffn_width"), Window()),
    fixed={"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attention_bias": False},
    defaults={"rms_norm_eps": 1e-5},
    names=Names(qkv=("self_attn.qkv_proj",) * 3, mlp=("mlp.gate_up_proj", "mlp.gate_up_proj", "mlp.down_proj")),
    rotary=Rotary(kinds=(), share=1.0),
)
