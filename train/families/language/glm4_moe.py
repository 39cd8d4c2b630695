"""GLM-4.5: a sigmoid router with a stored bias, dense layers first (GLM-4.5 team 2025).  MTP layers are left out."""

from tandem.train.families.base import Family
from tandem.train.families.fields import Dropped, Groups, Rotary, Same, SharedExperts
from tandem.train.families.tensors import Names

FAMILY = Family(
    "glm4_moe",
    "Glm4MoeForCausalLM",
    fields=(
        Same("intermediate_size", "ffn_width"),
        Same("moe_intermediate_size", "expert_width"),
        Same("n_routed_experts", "num_experts"),
        SharedExperts(),
        Same("num_experts_per_tok", "top_k"),
        Same("norm_topk_prob", "norm_topk_prob"),
        Same("routed_scaling_factor", "routed_scaling"),
        Groups(),
        Same("first_k_dense_replace", "first_dense_layers"),
        Same("attention_bias", "qkv_bias"),
        Same("use_qk_norm", "qk_norm"),
        Dropped("num_nextn_predict_layers"),
    ),
    always={"router_score": "sigmoid", "expert_bias": True},
    defaults={
        "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "attention_bias": False, "use_qk_norm": False,
        "norm_topk_prob": True, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1,
    },
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    names=Names(shared=tuple(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down"))),
    rotary=Rotary(share=0.5),
    mtp=True,
)  # fmt: skip
