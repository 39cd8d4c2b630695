"""What the LLM's layers are made of: Megatron-core's configuration, and its layer spec on one of two sets of kernels.

    torch   our RMSNorm, rotary positions and grouped experts, Megatron-core's linear layers
    te      Transformer Engine's norms, linear layers and grouped experts

Attention over packed rows is ours in both, and so are the names of all parameters in the whole model
(`parallel/engines/llm_shards.py`).  Norms stay modules of their own in both, not halves of a linear layer, for that
reason.

Legend: S tokens of a micro-batch on this cp rank, D width, H heads, G kv heads, X = H / G + 2, K head width,
Y = G * X * K.
"""

import importlib.util

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from tandem.parallel.comm.context import PackedRow, attend
from tandem.parallel.kernels import compilation
from tandem.parallel.kernels.attention_kernels import INSTALL_TE
from tandem.parallel.kernels.experts import moe_spec
from tandem.parallel.kernels.fusion import rms_norm
from tandem.parallel.layout import Layout
from tandem.train.models.language.llm import VisualGPT
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_recompute import LLMTransformerConfig, RecomputedLayer, offload
from tandem.train.models.layers.rotary import rotate_qkv

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


class MarkedRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that tells Megatron-core to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-core's

    def forward(self, x_S1D):
        assert self.eps is not None
        return rms_norm(x_S1D, self.weight, self.eps)


class RotarySelfAttention(SelfAttention):
    """Megatron-core's self-attention whose projection is taken apart and rotated in one pass."""

    def forward(self, hidden_states, attention_mask, packed_seq_params: PackedRow, **_):
        """([S, 1, D], no bias) of hidden states [S, 1, D]; both are cut over tp ranks under sequence parallelism."""
        mixed_S1Y, _ = self.linear_qkv(hidden_states)
        groups = self.num_query_groups_per_partition
        mixed_SGXK = mixed_S1Y.view(len(mixed_S1Y), groups, -1, self.hidden_size_per_attention_head)
        if self.config.qk_layernorm:
            q_SGxK, k_SG1K, v_SG1K = mixed_SGXK.split((mixed_SGXK.shape[2] - 2, 1, 1), dim=2)
            mixed_SGXK = torch.cat((self.q_layernorm(q_SGxK), self.k_layernorm(k_SG1K), v_SG1K), dim=2)
        assert packed_seq_params.tables_2SK is not None, "made for every row"
        q_SHK, k_SGK, v_SGK = rotate_qkv(mixed_SGXK, *packed_seq_params.tables_2SK)
        return self.linear_proj(self.core_attention(q_SHK, k_SGK, v_SGK, packed_seq_params)[:, None])


class PackedAttention(MegatronModule):
    """Core attention over packed rows: causal, inside each sample."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale=None, pg_collection=None, **_):
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale

    def forward(self, q_SHK, k_SGK, v_SGK, row: PackedRow):
        return attend(q_SHK, k_SGK, v_SGK, row, self.cp_group, self.scale).flatten(1)


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
    moe = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
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
            moe_grouped_gemm=kernels == "te",
            moe_permute_fusion=kernels == "te",
        )
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
        qk_layernorm=config.qk_norm,
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
        **moe,
    )


def build_chunk(config: LLMConfig, megatron: LLMTransformerConfig, *, vp_stage: int | None, first: bool, last: bool):
    """One model chunk (the layers of one virtual stage), uninitialised; `first` embeds, `last` has the loss."""
    layer = layer_spec(megatron)
    count = get_num_layers_to_build(megatron, vp_stage=vp_stage)
    chunk = VisualGPT(
        config=megatron,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[layer] * count, layer_norm=layer.submodules.input_layernorm
        ),
        vocab_size=config.vocab_size,
        max_sequence_length=0,
        pre_process=first,
        post_process=last,
        position_embedding_type="none",
        rotary_base=config.rope_base,
        share_embeddings_and_output_weights=False,
        vp_stage=vp_stage,
    )
    if megatron.recompute == "offload":
        offload(chunk.decoder)
    return chunk


def layer_spec(megatron: TransformerConfig):
    """Megatron-core's layer, of the kernels for which `megatron` was made."""
    experts = megatron.num_moe_experts
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
    else:
        parts.mlp.submodules.linear_fc1 = te.TEColumnParallelLinear
        parts.mlp.submodules.linear_fc2 = te.TERowParallelLinear
    return layer


def _leave(weight: torch.Tensor) -> None:
    """Keeps Megatron-core from drawing weights: `parallel.engines.llm_shards` fills them the same way in every
    layout."""
