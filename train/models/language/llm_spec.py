"""What the LLM's layers are made of: Megatron-core's configuration, and its layer spec on one of two sets of kernels.

    torch   our RMSNorm, rotary positions and grouped experts, Megatron-core's linear layers
    te      Transformer Engine's norms, linear layers and grouped experts

Attention (`llm_attention.py`) is ours in both, and so are the names of all parameters in the whole model
(`parallel/engines/llm_shards.py`).  Norms stay modules of their own in both, not halves of a linear layer, for that
reason.
"""

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch.nn.functional import silu

from tandem.parallel.kernels import compilation
from tandem.parallel.kernels.attention_kernels import INSTALL_TE
from tandem.parallel.kernels.experts import moe_spec
from tandem.parallel.kernels.router import Router
from tandem.parallel.layout import Layout
from tandem.train.models.language.llm import VisualGPT
from tandem.train.models.language.llm_attention import MarkedRMSNorm, PackedAttention, RotarySelfAttention
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_recompute import LLMTransformerConfig, RecomputedLayer, offload

KERNELS = ("auto", "torch", "te")
GROUPED_SINCE = (9, 0)  # compute capability from which torch has a kernel, not a loop, for products of groups

vars(moe_utils).setdefault("te_general_gemm", None)  # the router of 0.16.1 reads it, defined or not


def choose_kernels(name: str, device: torch.device) -> str:
    """`torch` or `te`, from `parallel.kernels`; auto is torch unless the device is too old for its grouped products.

    Raises ValueError for te where it cannot be had.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if name == "te" and device.type != "cuda":
        raise ValueError("parallel.kernels=te: Transformer Engine needs a CUDA device, set it to torch or auto")
    if name == "te" and not installed:
        raise ValueError(
            f"parallel.kernels=te: Transformer Engine is not installed: {INSTALL_TE}, or set torch or auto"
        )
    if name == "auto":
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < GROUPED_SINCE
        return "te" if old and installed else "torch"
    return name


def transformer_config(
    config: LLMConfig,
    layout: Layout,
    *,
    dtype: torch.dtype,
    recompute: str,
    deterministic: bool,
    kernels: str = "torch",
):
    """Megatron-core's configuration of this model under this layout; kernels: of `choose_kernels`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return LLMTransformerConfig(
        recompute=recompute,
        transformer_impl="transformer_engine" if kernels == "te" else "local",
        num_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_width,
        ffn_hidden_size=config.ffn_width or config.expert_width,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        qk_layernorm=config.qk_norm and not config.qk_norm_whole,
        qk_norm_whole=config.qk_norm_whole,
        add_qkv_bias=config.qkv_bias,
        output_bias=config.output_bias,
        window=config.window,
        window_from=config.window_from,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method=_leave,
        output_layer_init_method=_leave,
        use_cpu_initialization=device == "cpu",
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
        batch_p2p_sync=False,  # it stops the host after every exchange, which torch has not needed for years
        deallocate_pipeline_outputs=True,
        bias_activation_fusion=compilation.enabled(device),
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        **(_experts(config, kernels) if config.num_experts else {}),
    )


def _experts(config: LLMConfig, kernels: str) -> dict:
    """Megatron-core's settings of layers with experts."""
    groups = {}
    if config.router_groups > 1:
        groups = {"moe_router_num_groups": config.router_groups, "moe_router_group_topk": config.router_top_groups}
    return dict(
        num_moe_experts=config.num_experts,
        moe_layer_freq=[int(sparse) for sparse in config.sparse],
        moe_ffn_hidden_size=config.expert_width,
        moe_shared_expert_intermediate_size=config.shared_expert_width or None,
        moe_shared_expert_gate=config.shared_expert_gate,
        moe_shared_expert_overlap=False,  # `parallel.kernels.dispatch` does not run it
        moe_router_topk=config.top_k,
        moe_router_pre_softmax=config.router_score == "softmax" and not config.norm_topk_prob,
        moe_router_score_function=config.router_score,
        expert_bias=config.has_expert_bias,
        expert_bias_visual=config.balance.by_modality,
        moe_router_topk_scaling_factor=config.routed_scaling if config.routed_scaling != 1 else None,
        moe_aux_loss_coeff=config.aux_loss,
        moe_z_loss_coeff=config.z_loss or None,
        moe_router_load_balancing_type=config.balance.aux_loss_type,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=kernels == "te",
        moe_permute_fusion=kernels == "te",
        **groups,
    )


def build_chunk(config: LLMConfig, megatron: LLMTransformerConfig, *, vp_stage: int | None, first: bool, last: bool):
    """One model chunk (the layers of one virtual stage), uninitialised; `first` embeds, `last` has the loss."""
    first_layer = get_transformer_layer_offset(megatron, vp_stage)
    sparse = config.sparse[first_layer : first_layer + get_num_layers_to_build(megatron, vp_stage=vp_stage)]
    kinds = {kind: layer_spec(megatron, kind) for kind in set(sparse)}
    layers = [kinds[kind] for kind in sparse]
    chunk = VisualGPT(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=layers, layer_norm=layers[0].submodules.input_layernorm
        ),
        vocab_size=config.padded_vocab(megatron.tensor_model_parallel_size),
        words=config.vocab_size,
        max_sequence_length=0,
        pre_process=first,
        post_process=last,
        rope=config.rope,
        share_embeddings_and_output_weights=config.tied_embeddings,
        vp_stage=vp_stage,
    )
    if megatron.recompute == "offload":
        offload(chunk.decoder)
    return chunk


def layer_spec(megatron: TransformerConfig, sparse: bool):
    """Megatron-core's layer, with experts or without, of the kernels for which `megatron` was made."""
    experts = megatron.num_moe_experts if sparse else None
    layer = get_gpt_layer_local_spec(num_experts=experts, normalization="RMSNorm")
    layer.module = RecomputedLayer
    parts, attention = layer.submodules, layer.submodules.self_attention.submodules
    parts.self_attention.module, attention.core_attention = RotarySelfAttention, PackedAttention
    parts.input_layernorm = parts.pre_mlp_layernorm = MarkedRMSNorm
    if megatron.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = MarkedRMSNorm
    if megatron.transformer_impl == "local":
        if experts:
            parts.mlp = moe_spec(megatron)
        return layer
    from megatron.core.extensions import transformer_engine as te

    attention.linear_qkv, attention.linear_proj = te.TEColumnParallelLinear, te.TERowParallelLinear
    parts.input_layernorm = parts.pre_mlp_layernorm = te.TENorm
    if experts:
        parts.mlp = get_moe_module_spec(use_te=True, num_experts=experts, moe_grouped_gemm=True)
        parts.mlp.submodules.router = Router
    else:
        parts.mlp.submodules.linear_fc1 = te.TEColumnParallelLinear
        parts.mlp.submodules.linear_fc2 = te.TERowParallelLinear
    return layer


def _leave(weight: torch.Tensor) -> None:
    """Keeps Megatron-core from drawing weights: `parallel.engines.llm_shards` fills them the same way in every
    layout."""
