"""OLMoE: norms of queries and keys over all heads together (Muennighoff et al. 2024)."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Heads, Same

FAMILY = Family(
    "olmoe",
    "OlmoeForCausalLM",
    fields=(
        Same("intermediate_size", "expert_width"),
        Same("num_experts", "num_experts"),
        Same("num_experts_per_tok", "top_k"),
        Same("norm_topk_prob", "norm_topk_prob"),
        Same("attention_bias", "qkv_bias", "output_bias"),
    ),
    always={"qk_norm": True, "qk_norm_whole": True},
    fixed={"clip_qkv": None},
    defaults={"rms_norm_eps": 1e-5, "attention_bias": False, "norm_topk_prob": False},
    aliases={"num_local_experts": "num_experts"},
    heads=Heads(any_width=False),
)
