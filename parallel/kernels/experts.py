"""The experts of a Mixture-of-Experts layer as grouped products, for Megatron-core's layer.

    h = x W1[e]^T        a = silu(gate) * up * p   with   gate | up = h        y = a W2[e]^T

for the rows of every expert e, which come sorted by expert; p is a row's routing weight.  SequentialMLP makes as many
small products as there are experts; here there is one a formula.  x and h are kept for the backward, a is made again.

How rows lie for the products is an arrangement:

    Grouped   as they came, `torch.nn.functional.grouped_mm`, counts on the device     CUDA, bf16
    Padded    each expert's in C = the longest's places, one batched product           CPU, unless zeros cost more
    Looped    as they came, one product an expert                                      everything else

Legend: T rows, E experts of this rank, D width, F expert width on this etp rank, G = 2 F, C places of an expert.
"""

import functools
import logging

import torch
import torch.nn.functional as F
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from tandem.parallel.kernels.dispatch import SortedMoELayer
from tandem.parallel.kernels.fusion import fused
from tandem.parallel.kernels.router import Router

PADDING = 100_000  # multiply-adds with zeros that are worth one call less of a product, on a CPU
ALIGNMENT = 8  # entries of 2 bytes, of grouped_mm's strides

log = logging.getLogger(__name__)


def moe_spec(config: TransformerConfig) -> ModuleSpec:
    """The layer of these experts, `parallel.kernels.dispatch` and `Router`; Megatron-core's shared experts."""
    spec = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=config.num_moe_experts)
    spec.module = SortedMoELayer
    spec.submodules.experts = GroupedExperts
    spec.submodules.router = Router
    return spec


class GroupedExperts(MegatronModule):
    """Experts of one rank, uninitialised: `parallel.engines.llm_shards.initialize` fills them.

    Under expert tensor parallelism F is cut: gate and up each by their rows, W2 by its columns, so that the output is
    this rank's part of a sum, which the dispatcher completes, as it gathers the rows that come in.
    """

    def __init__(self, num_local_experts: int, config: TransformerConfig, pg_collection):
        super().__init__(config)
        assert config.gated_linear_unit and config.activation_func is F.silu and not config.add_bias_linear
        self.groups = pg_collection
        experts, width = num_local_experts, config.hidden_size
        inner = config.moe_ffn_hidden_size // pg_collection.expt_tp.size()
        self.linear_fc1 = self._weight(experts, 2 * inner, width, cut=1)
        self.linear_fc2 = self._weight(experts, width, inner, cut=2)
        if self.linear_fc2.is_cuda and not takes_grouped(self.linear_fc2):
            _say_looped(width, inner, config.params_dtype)

    def _weight(self, *shape: int, cut: int) -> torch.nn.Parameter:
        device = None if self.config.use_cpu_initialization else torch.cuda.current_device()
        weight = torch.nn.Parameter(torch.empty(shape, dtype=self.config.params_dtype, device=device))
        weight.allreduce = self.config.expert_model_parallel_size == 1  # type: ignore[attr-defined]  # Megatron-core's
        set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=cut, stride=1)
        return weight

    def forward(self, permuted_local_hidden_states, tokens_per_expert, permuted_probs):
        """(output [T, D], None) of rows [T, D] sorted by expert, `tokens_per_expert` [E] of each, weights [T]."""
        output_TD = ExpertsFunction.apply(
            permuted_local_hidden_states, permuted_probs, self.linear_fc1, self.linear_fc2, tokens_per_expert
        )
        return output_TD, None

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """For Megatron-core's own checkpoints, in which SequentialMLP's experts are slices of the same tensors."""
        ranks = (0, 0, self.groups.expt_dp.rank())
        return {
            f"{prefix}{name}": ShardedTensorFactory(
                f"{prefix}experts.{name}.weight",
                weight.detach(),
                functools.partial(build, sharded_offsets),
                merge,
                ranks,
            )
            for name, weight, build, merge in (
                ("linear_fc1", self.linear_fc1, self._sharded_fc1, _merge_halves),
                ("linear_fc2", self.linear_fc2, self._sharded_fc2, torch.stack),
            )
        }

    def _sharded_fc1(self, offsets, key, weight_EGD, ranks, _):
        size, rank = self.groups.expt_tp.size(), self.groups.expt_tp.rank()
        halves = [(0, half * size + rank, 2 * size) for half in range(2)]
        return [
            self._sharded(offsets, key, part, place, cut, ranks)
            for place, w_GD in enumerate(weight_EGD)
            for part, cut in zip(w_GD.chunk(2), halves, strict=True)
        ]

    def _sharded_fc2(self, offsets, key, weight_EDF, ranks, _):
        cut = (1, self.groups.expt_tp.rank(), self.groups.expt_tp.size())
        return [self._sharded(offsets, key, w_DF, place, cut, ranks) for place, w_DF in enumerate(weight_EDF)]

    def _sharded(self, offsets, key, part, place, cut, ranks):
        """One expert's part of a tensor of all experts of the layer, cut as (dimension, index, parts)."""
        axis, here, ep = len(offsets), len(self.linear_fc1), self.groups.ep
        expert = (axis, ep.rank() * here + place, ep.size() * here)
        where = (*offsets, expert, (axis + 1 + cut[0], *cut[1:]))
        return ShardedTensor.from_rank_offsets(key, part, *where, replica_id=ranks, prepend_axis_num=axis + 1)


def _merge_halves(halves: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([torch.cat(pair) for pair in zip(halves[::2], halves[1::2], strict=True)])


class ExpertsFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, p_T, w_EGD, w_EDF, counts_E):
        rows = arrange(x_TD, w_EDF, counts_E)
        x, p = rows.spread(x_TD), rows.spread(p_T[:, None])
        h = rows.times(x, w_EGD.transpose(1, 2))
        ctx.save_for_backward(x, p, h, w_EGD, w_EDF)
        ctx.rows = rows
        return rows.gather(rows.times(swiglu(h, p), w_EDF.transpose(1, 2)))

    @staticmethod
    def backward(ctx, gradient_TD):
        x, p, h, w_EGD, w_EDF = ctx.saved_tensors
        rows, needed = ctx.rows, ctx.needs_input_grad
        gradient = rows.spread(gradient_TD)
        h_gradient, p_gradient, a = swiglu_backward(h, p, rows.times(gradient, w_EDF))
        return (
            rows.gather(rows.times(h_gradient, w_EGD)) if needed[0] else None,
            rows.gather(p_gradient)[:, 0] if needed[1] else None,
            rows.outer(h_gradient, x) if needed[2] else None,
            rows.outer(gradient, a) if needed[3] else None,
            None,
        )


@fused
def swiglu(h_TG: torch.Tensor, p_T1: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up * p, [T, F] in h's dtype, computed in fp32 (fp64 for fp64)."""
    gate, up = h_TG.to(torch.promote_types(h_TG.dtype, torch.float32)).chunk(2, -1)
    return (F.silu(gate) * up * p_T1).to(h_TG.dtype)


@fused
def swiglu_backward(h_TG: torch.Tensor, p_T1: torch.Tensor, gradient_TF: torch.Tensor):
    """Gradients of h and p, and `swiglu` again."""
    gate, up = h_TG.to(torch.promote_types(h_TG.dtype, torch.float32)).chunk(2, -1)
    act = F.silu(gate)
    out = act * up
    p_gradient = (gradient_TF * out).sum(-1, keepdim=True)
    gradient = gradient_TF * p_T1
    up_gradient = gradient * act
    if torch.compiler.is_compiling():  # the compiler computes all of this in one kernel if a half reads the sum
        up_gradient = torch.where(p_gradient == p_gradient, up_gradient, p_gradient)
    halves = torch.ops.aten.silu_backward(gradient * up, gate), up_gradient
    h_gradient = torch.cat([half.to(h_TG.dtype) for half in halves], -1)
    return h_gradient, p_gradient.to(p_T1.dtype), (out * p_T1).to(h_TG.dtype)


class Grouped:
    """Rows as they came; products by `grouped_mm`, which reads from the device where each expert's rows end."""

    def __init__(self, counts_E: torch.Tensor):
        self.end_E = counts_E.cumsum(0, dtype=torch.int32)

    def spread(self, rows_TX):
        return rows_TX.contiguous()

    def gather(self, rows_TX):
        return rows_TX

    def times(self, rows_TX, w_EXY):
        return F.grouped_mm(rows_TX, w_EXY, offs=self.end_E)

    def outer(self, left_TX, right_TY):
        """left^T right of every expert, [E, X, Y]."""
        product_EXY = F.grouped_mm(left_TX.t(), right_TY, offs=self.end_E)
        if product_EXY.is_cuda and torch.cuda.get_device_capability(product_EXY.device)[0] > 9:
            # The kernel for Blackwell leaves anything in the product of an expert without rows.
            empty_E = self.end_E.diff(prepend=self.end_E.new_zeros(1)) == 0
            product_EXY.masked_fill_(empty_E[:, None, None], 0)
        return product_EXY


class Padded:
    """Each expert's rows in as many places as the longest needs, zeros behind them, [E * C, ...]."""

    def __init__(self, counts_E: torch.Tensor, longest: int):
        self.places = (counts_E.numel(), longest)
        first_E = counts_E.cumsum(0) - counts_E
        shift_E = torch.arange(counts_E.numel()) * longest - first_E
        self.place_T = torch.repeat_interleave(shift_E, counts_E)
        self.place_T += torch.arange(self.place_T.numel())

    def spread(self, rows_TX):
        return rows_TX.new_zeros(self.places[0] * self.places[1], rows_TX.shape[1]).index_copy_(
            0, self.place_T, rows_TX
        )

    def gather(self, rows):
        return rows.index_select(0, self.place_T)

    def times(self, rows, w_EXY):
        return torch.bmm(rows.unflatten(0, self.places), w_EXY).flatten(0, 1)

    def outer(self, left, right):
        return torch.bmm(left.unflatten(0, self.places).transpose(1, 2), right.unflatten(0, self.places))


class Looped:
    """Rows as they came; one product an expert."""

    def __init__(self, counts: list[int]):
        self.counts = counts

    def spread(self, rows_TX):
        return rows_TX

    def gather(self, rows_TX):
        return rows_TX

    def times(self, rows_TX, w_EXY):
        product_TY = rows_TX.new_empty(rows_TX.shape[0], w_EXY.shape[2])
        for out, rows, w_XY in zip(product_TY.split(self.counts), rows_TX.split(self.counts), w_EXY, strict=True):
            torch.mm(rows, w_XY, out=out)
        return product_TY

    def outer(self, left_TX, right_TY):
        product_EXY = left_TX.new_empty(len(self.counts), left_TX.shape[1], right_TY.shape[1])
        for out, left, right in zip(product_EXY, left_TX.split(self.counts), right_TY.split(self.counts), strict=True):
            torch.mm(left.t(), right, out=out)
        return product_EXY


def arrange(x_TD: torch.Tensor, w_EDF: torch.Tensor, counts_E: torch.Tensor) -> Grouped | Padded | Looped:
    """The fastest arrangement of these rows on their device; only Grouped does without counts on the host."""
    rows, (experts, width, inner) = x_TD.shape[0], w_EDF.shape
    if rows == 0:
        return Looped([0] * experts)
    if takes_grouped(w_EDF):
        return Grouped(counts_E)
    counts = counts_E.tolist()
    padding = experts * max(counts) - rows
    if x_TD.is_cuda or padding * width * inner > experts * PADDING:
        return Looped(counts)
    return Padded(counts_E, max(counts))


def takes_grouped(w_EDF: torch.Tensor) -> bool:
    """Whether `grouped_mm` has a kernel for products with these weights."""
    aligned = all(width % ALIGNMENT == 0 for width in w_EDF.shape[1:])
    return w_EDF.is_cuda and w_EDF.dtype == torch.bfloat16 and aligned


@functools.cache
def _say_looped(width: int, inner: int, dtype: torch.dtype) -> None:
    log.warning(
        "experts of %d x %d in %s: grouped_mm takes bfloat16 and multiples of %d, so there is one product an expert",
        *(width, inner, dtype, ALIGNMENT),
    )
