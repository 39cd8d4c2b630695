"""The Mixture-of-Experts layer around the experts: tokens to their experts and back.

Megatron-core's layer and all-to-all dispatcher, with two parts of its own:

- The host never has to know what was routed where, except for the sizes of an all-to-all.  Every token goes to K
  experts, so all sizes are known but each expert's share of them.  Megatron-core's unfused permutation asks the device
  how many entries of the routing map are set, and waits for the answer.
- Nothing is added by atomics.  Tokens reach their places by a gather; what comes back is gathered again and summed over
  a token's K places in the order of its experts; the backward of each is the other.

Legend: T tokens of this rank, E experts, K experts a token, P = T * K places (by expert, then by token), D width.
"""

import logging
from dataclasses import dataclass

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from tandem.parallel.kernels.fusion import fused

# Megatron-core's layer knows its own MoELayer by name, and warns of any other in every layer.
logging.getLogger("megatron.core.transformer.transformer_layer").addFilter(
    lambda record: not record.getMessage().startswith("Unknown MLP type")
)


@dataclass(frozen=True)
class Order:
    """Tokens sorted by expert: token and expert of every place, experts and places of every token."""

    token_P: torch.Tensor
    expert_P: torch.Tensor
    expert_TK: torch.Tensor  # ascending
    place_TK: torch.Tensor

    @classmethod
    def of(cls, map_TE: torch.Tensor, top_k: int) -> "Order":
        """From a routing map, bool, with `top_k` entries set in every row; its sums say where each entry goes."""
        tokens, experts = map_TE.shape
        whole_ET = map_TE.t().reshape(-1).cumsum(0, dtype=torch.int32)
        count_P = torch.arange(1, tokens * top_k + 1, dtype=torch.int32, device=map_TE.device)
        entry_P = torch.searchsorted(whole_ET, count_P)  # the first entry at which as many have been set
        of_token_TE = map_TE.cumsum(1, dtype=torch.int32)
        expert_TK = torch.searchsorted(of_token_TE, count_P[:top_k].expand(tokens, top_k).contiguous())
        place_TK = whole_ET.view(experts, tokens).t().gather(1, expert_TK).long() - 1
        return cls(entry_P % tokens, entry_P // tokens, expert_TK, place_TK)


@fused
def sum_over_places(y_PD: torch.Tensor, place_TK: torch.Tensor) -> torch.Tensor:
    """The sum of every token's rows, [T, D], in fp32 (fp64 for fp64) and in the order of its experts."""
    high = torch.promote_types(y_PD.dtype, torch.float32)
    total_TD = y_PD.index_select(0, place_TK[:, 0]).to(high)
    for place_T in place_TK.unbind(1)[1:]:
        total_TD = total_TD + y_PD.index_select(0, place_T)
    return total_TD.to(y_PD.dtype)


class ToPlaces(torch.autograd.Function):
    """Rows of tokens [T, D] copied to their places [P, D]."""

    @staticmethod
    def forward(ctx, x_TD, token_P, place_TK):
        ctx.save_for_backward(place_TK)
        return x_TD.index_select(0, token_P)

    @staticmethod
    def backward(ctx, gradient_PD):
        (place_TK,) = ctx.saved_tensors
        return sum_over_places(gradient_PD, place_TK), None, None


class FromPlaces(torch.autograd.Function):
    """Rows at places [P, D] summed over each token's, [T, D]."""

    @staticmethod
    def forward(ctx, y_PD, token_P, place_TK):
        ctx.save_for_backward(token_P)
        return sum_over_places(y_PD, place_TK)

    @staticmethod
    def backward(ctx, gradient_TD):
        (token_P,) = ctx.saved_tensors
        return gradient_TD.index_select(0, token_P), None, None


class WeightsToPlaces(torch.autograd.Function):
    """Routing weights [T, E] at their places [P]."""

    @staticmethod
    def forward(ctx, weight_TE, order: Order):
        ctx.save_for_backward(order.expert_TK, order.place_TK)
        ctx.experts = weight_TE.shape[1]
        return weight_TE.reshape(-1).index_select(0, order.token_P * ctx.experts + order.expert_P)

    @staticmethod
    def backward(ctx, gradient_P):
        expert_TK, place_TK = ctx.saved_tensors
        zeros_TE = gradient_P.new_zeros(expert_TK.shape[0], ctx.experts)
        return zeros_TE.scatter(1, expert_TK, gradient_P[place_TK]), None


class SortedDispatcher(MoEAlltoAllTokenDispatcher):
    """Megatron-core's all-to-all dispatcher for dropless routing, with the permutation of this module.

    Alone (ep = etp = 1) the host waits for nothing.  Otherwise it waits once a layer, before the all-to-all, for the
    numbers of rows that go to and come from each rank.  The counts that the experts get stay on the device.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.alone = self.ep_size == self.tp_size == 1

    def dispatch_preprocess(self, hidden_states, routing_map, probs):
        self.hidden_shape = hidden_states.shape
        self.probs = probs.new_empty(0)  # for its dtype; the weights would hold the graph of a layer made again
        self.tokens_per_expert = self.preprocess(routing_map)
        self._maybe_dtoh_and_synchronize("before_permutation_1")
        self.order = order = Order.of(routing_map, self.config.moe_router_topk)
        x_TD = hidden_states.view(-1, self.hidden_shape[-1])
        return ToPlaces.apply(x_TD, order.token_P, order.place_TK), WeightsToPlaces.apply(probs, order)

    def dispatch_postprocess(self, global_input_tokens, global_probs):
        if self.alone:
            return global_input_tokens, self.tokens_per_expert, global_probs
        return super().dispatch_postprocess(global_input_tokens, global_probs)

    def combine_preprocess(self, hidden_states):
        return hidden_states if self.alone else super().combine_preprocess(hidden_states)

    def combine_postprocess(self, permutated_local_input_tokens):
        order, self.order = self.order, None  # type: ignore[assignment]  # freed until the next preprocess
        return FromPlaces.apply(permutated_local_input_tokens, order.token_P, order.place_TK).view(self.hidden_shape)

    def _maybe_dtoh_and_synchronize(self, point, tokens_per_expert=None):
        if not self.alone:
            super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert


class SortedMoELayer(MoELayer):
    """Megatron-core's layer with the dispatcher of this module."""

    def __init__(self, config, submodules=None, layer_number=None, pg_collection=None):
        pg_collection = pg_collection or get_default_pg_collection()
        super().__init__(config, submodules, layer_number, pg_collection)
        self.token_dispatcher = SortedDispatcher(
            self.num_local_experts, self.local_expert_indices, config=config, pg_collection=pg_collection
        )
