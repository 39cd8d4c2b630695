"""Mixtral: experts in every layer, a softmax over the chosen ones (Jiang et al. 2024)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Same, Window
from tandem.train.families.tensors import Names

FAMILY = Family(
    "mixtral",
    "MixtralForCausalLM",
    fields=(
        Same("intermediate_size", "expert_width"),
        Same("num_local_experts", "num_experts"),
        Same("num_experts_per_tok", "top_k"),
        Window(),
    ),
    defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6},
    names=Names(
        expert=tuple(f"block_sparse_moe.experts.{{expert}}.{part}" for part in ("w1", "w3", "w2")),
        router="block_sparse_moe.gate",
    ),
)
