"""The LLM: Megatron-core's GPTModel with RMSNorm, GQA, SwiGLU and a Mixture of Experts, fed with visual rows.

Three things are ours and sit in the layer spec: an RMSNorm that carries the sequence-parallel mark, attention over
packed rows with rotary positions from the row's own position table (any cp), and an embedding output whose places of
visual tokens are overwritten by rows that come from the encoder.

Legend: S tokens of a micro-batch on this cp rank, U visual rows on this rank, H heads, G kv heads, K head width.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import silu

from parallel.attention import Segments, attention
from parallel.layout import Layout
from parallel.routes import local_positions
from parallel.transfer import host_to_device
from train.models.rotary import axis_angles, rotate, tables

vars(moe_utils).setdefault("te_general_gemm", None)  # the router of 0.16.1 reads it, defined or not


@dataclass
class LLMConfig:
    """Sizes of the language model; `num_experts=0` makes it dense with `ffn_width`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    vocab_size: int
    ffn_width: int
    num_experts: int
    top_k: int
    expert_width: int
    shared_expert_width: int
    aux_loss: float
    z_loss: float
    rope_base: float
    norm_eps: float
    init_std: float

    def check(self, layout: Layout) -> None:
        """Raises ValueError, naming keys and values, where this model does not fit the layout."""
        sizes = ["layers", "width", "heads", "kv_heads", "head_width", "vocab_size"]
        sizes += ["top_k", "expert_width"] if self.num_experts else ["ffn_width"]
        for key, least in {**dict.fromkeys(sizes, 1), "num_experts": 0, "shared_expert_width": 0}.items():
            if getattr(self, key) < least:
                raise ValueError(f"model.llm.{key}={getattr(self, key)}: must be at least {least}")
        if self.head_width % 2:
            raise ValueError(f"model.llm.head_width={self.head_width}: must be even, rotary positions turn pairs")
        rules = (
            ("model.llm.heads", self.heads, "parallel.tp", layout.tp),
            ("model.llm.kv_heads", self.kv_heads, "parallel.tp", layout.tp),
            ("model.llm.vocab_size", self.vocab_size, "parallel.tp", layout.tp),
            ("model.llm.heads", self.heads, "model.llm.kv_heads", self.kv_heads),
            ("model.llm.layers", self.layers, "parallel.pp*vpp", layout.pp * layout.vpp),
        )
        if self.num_experts:
            rules += (
                ("model.llm.num_experts", self.num_experts, "parallel.ep", layout.ep),
                ("model.llm.expert_width", self.expert_width, "parallel.etp", layout.etp),
                ("model.llm.shared_expert_width", self.shared_expert_width, "parallel.tp", layout.tp),
            )
        else:
            rules += (("model.llm.ffn_width", self.ffn_width, "parallel.tp", layout.tp),)
        for key, value, by, divisor in rules:
            if value % divisor:
                raise ValueError(f"{key}={value} is not divisible by {by}={divisor}")
        if self.num_experts and self.top_k == 1:
            raise ValueError("model.llm.top_k=1: the weight of a single expert is 1, so its router would not learn")
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(f"model.llm.top_k={self.top_k} is more than model.llm.num_experts={self.num_experts}")
        if not self.num_experts and layout.ep > 1:
            raise ValueError(f"parallel.ep={layout.ep} with model.llm.num_experts=0: there are no experts to divide")


@dataclass(frozen=True)
class PackedRow:
    """What attention needs of one micro-batch on one cp rank: positions, and which keys each query piece sees.

    positions_S: of this rank's tokens inside their samples.  pieces: (first query, one past the last, first key, one
    past the last, segments); keys are counted in the whole row, queries on this rank.  whole_row_S: place of every row
    position in the cp-gathered order, None for cp = 1.  tables_2SK: rotary cosines and sines, made in the forward, for
    one micro-batch at a time.  `qkv_format` is Megatron-core's word for an extra batch dimension of one.
    """

    positions_S: torch.Tensor
    pieces: list[tuple[int, int, int, int, Segments]]
    whole_row_S: torch.Tensor | None
    tables_2SK: tuple[torch.Tensor, torch.Tensor] | None = None
    qkv_format: str = "thd"


def pack_row(lengths_N, positions_S: np.ndarray, layout: Layout, cp: int, device: torch.device) -> PackedRow:
    """Attention plan of a row of segments `lengths_N` for context-parallel rank `cp`.

    positions_S: position of every token of the whole row inside its own sample.
    """
    row = int(np.sum(lengths_N))
    mine_S = host_to_device(positions_S[local_positions(layout, cp, row)], device)
    if layout.cp == 1:
        return PackedRow(mine_S, [(0, row, 0, row, Segments.of(lengths_N, device=device))], None)
    half = row // (2 * layout.cp)
    borders = np.concatenate([[0], np.cumsum(lengths_N)])
    pieces = []
    for place, chunk in enumerate((cp, 2 * layout.cp - 1 - cp)):
        begin, end = chunk * half, (chunk + 1) * half
        first = int(np.searchsorted(borders, begin, "right")) - 1
        last = int(np.searchsorted(borders, end, "left"))
        lows, highs = borders[first:last], np.minimum(borders[first + 1 : last + 1], end)
        segments = Segments.of(highs - np.maximum(lows, begin), highs - lows, device=device)
        pieces.append((place * half, (place + 1) * half, int(borders[first]), end, segments))
    gathered = np.concatenate([local_positions(layout, other, row) for other in range(layout.cp)])
    return PackedRow(mine_S, pieces, host_to_device(np.argsort(gathered), device))


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
        if row.whole_row_S is not None:
            k_SGK, v_SGK = (
                gather_from_sequence_parallel_region(x, group=self.cp_group).index_select(0, row.whole_row_S)
                for x in (k_SGK, v_SGK)
            )
        outputs = [
            attention(q_SHK[a:b], k_SGK[c:d], v_SGK[c:d], segments, causal=True, scale=self.scale)
            for a, b, c, d, segments in row.pieces
        ]
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0]).flatten(1)


class VisualGPT(GPTModel):
    """GPTModel whose embedding output takes visual rows at given places."""

    def forward(self, tokens_1S, labels_1S, row: PackedRow, visual_UD=None, at_U=None):
        """Per-token loss [1, S] on the last stage (without labels, logits of all words); hidden states on the others.

        visual_UD: rows for this rank's slice of the sequence, at_U their local places; both None past the first stage.
        """
        angles = axis_angles(row.positions_S, self.config.kv_channels, self.rotary_base)
        row = replace(row, tables_2SK=tables(angles))
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=tokens_1S, position_ids=None)  # [S / tp, 1, D]
            embedded = embedded.index_copy(0, at_U, visual_UD.to(embedded.dtype)[:, None])
        return super().forward(
            input_ids=tokens_1S,
            position_ids=None,
            attention_mask=None,
            decoder_input=embedded,
            labels=labels_1S,
            packed_seq_params=row,
            runtime_gather_output=labels_1S is None,
        )


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
