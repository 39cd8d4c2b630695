"""Attention of the LLM's layers: Megatron-core's projections, our norms, rotation and packed attention.

Legend: S tokens of a micro-batch on this cp rank, D width, H heads and G kv heads of this tp rank, X = H / G + 2 and
x = H / G, K head width, Y = G * X * K.
"""

from copy import copy

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from tandem.parallel.comm.context import PackedRow, attend
from tandem.parallel.kernels.fusion import rms_norm
from tandem.train.models.layers.rotary import rotate_qkv


class MarkedRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that tells Megatron-core to sum its gradient over the sequence-parallel ranks."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_):
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron-core's

    def forward(self, x_S1D):
        assert self.eps is not None
        return rms_norm(x_S1D, self.weight, self.eps)


class SplitRMSNorm(torch.nn.Module):
    """RMSNorm over the heads of all tp ranks, each of which has its own heads' weights."""

    def __init__(self, config: TransformerConfig, heads: int, group: dist.ProcessGroup):
        super().__init__()
        self.eps, self.group = config.layernorm_epsilon, group
        width = heads * config.kv_channels
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=config.params_dtype, device=device))
        self.width = width * group.size()
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x_SGxK):
        """The same shape, computed in fp32."""
        x_SY = x_SGxK.flatten(1).float()
        squares_S1 = _SumOverRanks.apply(x_SY.square().sum(-1, keepdim=True), self.group)
        normed_SY = x_SY * (squares_S1 / self.width + self.eps).rsqrt()
        return (self.weight * normed_SY.to(x_SGxK.dtype)).view_as(x_SGxK)


class _SumOverRanks(torch.autograd.Function):
    """The sum of all ranks' values, which each uses: their gradients are summed as well (collective)."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        if group.size() > 1:
            dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient, ctx.group), None


class RotarySelfAttention(SelfAttention):
    """Megatron-core's self-attention whose projection is taken apart and rotated in one pass."""

    def __init__(self, config: TransformerConfig, *args, **kwargs):
        config = copy(config)
        config.add_bias_linear = config.output_bias  # Megatron-core's word for the biases of all linear layers
        super().__init__(config, *args, **kwargs)
        if config.qk_norm_whole:
            # not q_layernorm: the gradient of a norm of that name is summed over tp ranks
            self.q_norm = SplitRMSNorm(config, self.num_attention_heads_per_partition, self.pg_collection.tp)
            self.k_norm = SplitRMSNorm(config, self.num_query_groups_per_partition, self.pg_collection.tp)

    def forward(self, hidden_states, attention_mask, packed_seq_params: PackedRow, **_):
        """([S, 1, D], bias) of hidden states [S, 1, D]; both are cut over tp ranks under sequence parallelism."""
        mixed_S1Y, _ = self.linear_qkv(hidden_states)
        groups = self.num_query_groups_per_partition
        mixed_SGXK = mixed_S1Y.view(len(mixed_S1Y), groups, -1, self.hidden_size_per_attention_head)
        if self.config.qk_layernorm:
            mixed_SGXK = _normed(mixed_SGXK, self.q_layernorm, self.k_layernorm)
        elif self.config.qk_norm_whole:
            mixed_SGXK = _normed(mixed_SGXK, self.q_norm, self.k_norm)
        assert packed_seq_params.tables_2SK is not None, "made for every row"
        q_SHK, k_SGK, v_SGK = rotate_qkv(mixed_SGXK, *packed_seq_params.tables_2SK)
        return self.linear_proj(self.core_attention(q_SHK, k_SGK, v_SGK, packed_seq_params)[:, None])


def _normed(mixed_SGXK, q_norm, k_norm):
    q_SGxK, k_SG1K, v_SG1K = mixed_SGXK.split((mixed_SGXK.shape[2] - 2, 1, 1), dim=2)
    return torch.cat((q_norm(q_SGxK), k_norm(k_SG1K), v_SG1K), dim=2)


class PackedAttention(MegatronModule):
    """Core attention over packed rows: causal, inside each sample, in some layers inside a window."""

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale=None, pg_collection=None, **_):
        super().__init__(config)
        self.cp_group = pg_collection.cp
        self.scale = softmax_scale
        windowed = config.window and layer_number > config.window_from  # numbers begin at 1
        self.window = config.window if windowed else None

    def forward(self, q_SHK, k_SGK, v_SGK, row: PackedRow):
        return attend(q_SHK, k_SGK, v_SGK, row, self.cp_group, self.scale, self.window).flatten(1)
