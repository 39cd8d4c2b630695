"""What the LLM's layers are made of: Megatron-core's configuration, and the parts of ours in its layer spec.

Ours are an RMSNorm that carries the sequence-parallel mark and attention over packed rows under any context-parallel
split.

Legend: S tokens of a micro-batch on this cp rank, H heads, G kv heads, K head width.
"""

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from parallel.context import PackedRow, attend
from parallel.layout import Layout
from train.models.llm import LLMConfig, VisualGPT
from train.models.rotary import rotate

vars(moe_utils).setdefault("te_general_gemm", None)  # the router of 0.16.1 reads it, defined or not


class MarkedRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that tells Megatron-core to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


class PackedAttention(MegatronModule):
    """Core attention over packed rows: rotary positions, then causal attention inside each sample."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale=None, pg_collection=None, **_):
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale

    def forward(self, q_SHK, k_SGK, v_SGK, attention_mask, packed_seq_params: PackedRow, **_):
        row = packed_seq_params
        q_SHK, k_SGK = rotate(q_SHK, *row.tables_2SK), rotate(k_SGK, *row.tables_2SK)
        return attend(q_SHK, k_SGK, v_SGK, row, self.cp_group, self.scale).flatten(1)


def transformer_config(config: LLMConfig, layout: Layout, *, dtype: torch.dtype, recompute: bool, deterministic: bool):
    """Megatron-core's configuration of this model under this layout."""
    moe = {}
    if config.num_experts:
        moe = dict(
            num_moe_experts=config.num_experts,
            moe_router_topk=config.top_k,
            moe_ffn_hidden_size=config.expert_width,
            moe_shared_expert_intermediate_size=config.shared_expert_width or None,
            moe_aux_loss_coeff=config.aux_loss,
            moe_z_loss_coeff=config.z_loss or None,
            moe_router_load_balancing_type="aux_loss",
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall",
            moe_grouped_gemm=False,
        )
    if recompute:
        moe |= dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_width,
        ffn_hidden_size=config.ffn_width or config.expert_width,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=not torch.cuda.is_available(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        deterministic_mode=deterministic,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.tp > 1,
        context_parallel_size=layout.cp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        # Batched P2P pairs wrongly when the previous and the next rank are the same, as in interleaved pp = 2.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        deallocate_pipeline_outputs=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **moe,
    )


def build_chunk(config: LLMConfig, megatron: TransformerConfig, *, vp_stage: int | None, first: bool, last: bool):
    """One model chunk (the layers of one virtual stage), uninitialised; `first` embeds, `last` has the loss."""
    layer = get_gpt_layer_local_spec(num_experts=config.num_experts or None, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = MarkedRMSNorm
    parts.self_attention.submodules.core_attention = PackedAttention
    count = get_num_layers_to_build(megatron, vp_stage=vp_stage)
    return VisualGPT(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=MarkedRMSNorm),
        vocab_size=config.vocab_size,
        max_sequence_length=0,
        pre_process=first,
        post_process=last,
        position_embedding_type="none",
        rotary_base=config.rope_base,
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )


def _leave(weight: torch.Tensor) -> None:
    """Keeps Megatron-core from drawing weights: `parallel.llm_shards` fills them the same way in every layout."""
