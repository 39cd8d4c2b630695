"""The router of a Mixture-of-Experts layer: fp32 logits, the choice of experts, router losses and token counts.

    s = softmax(x W^T), or sigmoid        a token goes to the K experts with the largest s + b; its weights come from s

The bias b balances experts without a gradient (Wang et al. 2024, arXiv:2408.15664, section 3);
`parallel.engines.balance` updates it after a step.  Megatron-core has it for sigmoid scores only, counts recomputed
layers twice, counts padding, and updates b in skipped steps too.

A balancing loss is computed over a micro-batch (`aux_loss`: Fedus et al. 2021, section 2.2), or over each sample in it
(`seq_aux_loss`: DeepSeek-V3, arXiv:2412.19437, equations 17 to 20), each sample weighted by its share of the tokens:

    aux_loss        E / (K T^2) * sum_e n_e sum_t s_te                   over all T tokens, with padding
    seq_aux_loss    sum over samples i of T_i / T * E / (K T_i^2) * sum_e n_ie sum_(t in i) s_te        without padding

n_e is the number of tokens whose K largest scores s, without the bias, include expert e; it has no gradient.  The two
losses are equal for a micro-batch that is one row of one sample without padding.

Legend: T tokens of this rank (in the formulas above, of the micro-batch), E experts, K experts per token, D width,
N samples of the micro-batch, padding the last, M kinds of tokens.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter

from tandem.parallel.plan.tokens import KINDS, VISUAL, RowTokens


@dataclass
class RouterPass:
    """One forward of a router.  tokens: None to disable counting.  map_TE, aux, z: outputs of the pass."""

    tokens: RowTokens | None
    map_TE: torch.Tensor | None = None
    aux: torch.Tensor | float = 0.0
    z: torch.Tensor | float = 0.0


class Router(TopKRouter):
    """Megatron-core's router with `RouterLogits`, the bias for any score, and counts of the chosen experts.

    `pass_` is set while the layer runs.  totals: accumulated since the last reset, fp64: choices [M * E] by kind of
    token, then this rank's share of both losses without their coefficients.
    """

    def __init__(self, config, pg_collection=None):
        super().__init__(config, pg_collection)
        self.pass_ = RouterPass(None)
        self.totals: torch.Tensor | None = None
        del self.expert_bias
        for name in ("expert_bias", "expert_bias_visual"):
            self.register_buffer(name, torch.zeros(self.num_experts) if getattr(config, name) else None)

    def _apply(self, fn, recurse=True):
        """Move the bias with the module, but keep it in fp32."""
        super()._apply(fn, recurse)
        for name, bias_E in self.named_buffers(recurse=False):
            setattr(self, name, bias_E.float())
        return self

    def gating(self, input):
        return RouterLogits.apply(input.flatten(0, -2), self.weight).unflatten(0, input.shape[:-1])

    def routing(self, logits, padding_mask=None):
        """Return (weights, map), both [T, E], for logits [..., E]."""
        config = self.config
        logits_TE = self.apply_z_loss(logits.view(-1, self.num_experts))
        weight_TE, map_TE = topk_routing_with_score_function(
            logits_TE,
            self.topk,
            use_pre_softmax=config.moe_router_pre_softmax,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            scaling_factor=config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            router_replay=None if self.expert_bias is None else self,
        )
        if torch.is_grad_enabled() and self.is_aux_loss_enabled():
            chosen_TE, score_TE = compute_routing_scores_for_aux_loss(logits_TE, self.topk, self.score_function)
            weight_TE = self._apply_aux_loss(weight_TE, score_TE, chosen_TE)
            weight_TE = self._apply_sequence_loss(weight_TE, score_TE, chosen_TE)
        self.pass_.map_TE = map_TE
        return weight_TE, map_TE

    def get_replay_topk(self, score_TE, topk, num_groups, group_topk, choose):
        """Return (scores, experts) [T, K] of the K largest scores plus bias.

        Megatron-core's routing-replay hook, used here to add the bias.  With softmax after top-k, Megatron-core passes
        logits; they are converted to scores for the selection only.
        """
        logits = self.score_function == "softmax" and not self.config.moe_router_pre_softmax
        biased_TE = (score_TE.softmax(-1) if logits else score_TE) + self._bias()
        _, top_TK = choose(biased_TE, topk, num_groups=num_groups, group_topk=group_topk)
        return score_TE.gather(1, top_TK), top_TK

    def _bias(self) -> torch.Tensor:
        """The bias: [E], or [T, E] if visual tokens have their own."""
        tokens = self.pass_.tokens
        if self.expert_bias_visual is None or tokens is None:
            return self.expert_bias
        return torch.where((tokens.kind_T == VISUAL)[:, None], self.expert_bias_visual, self.expert_bias)

    def apply_z_loss(self, logits, padding_mask=None):
        """Return the logits with the z-loss attached (its gradient is added in backward)."""
        coefficient = self.config.moe_z_loss_coeff
        if not coefficient or not torch.is_grad_enabled():
            return logits
        loss = z_loss_func(logits, coefficient / self.tp_cp_group.size())
        self.pass_.z = loss.detach() / coefficient
        return MoEAuxLossAutoScaler.apply(logits, loss)

    def attach_and_log_load_balancing_loss(self, activation, aux_loss_coeff, aux_loss, *_, **__):
        """Return the weights with the balancing loss attached (its gradient is added in backward)."""
        self.pass_.aux = aux_loss.detach() / aux_loss_coeff
        return MoEAuxLossAutoScaler.apply(activation, aux_loss)

    def _apply_sequence_loss(self, weight_TE, score_TE, map_TE):
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if not coefficient:
            return weight_TE
        tokens = self.pass_.tokens
        assert tokens is not None, "samples are told apart by PackedRow.tokens"
        count_NE = score_TE.new_zeros(tokens.samples + 1, self.num_experts)
        count_NE.index_add_(0, tokens.sample_T, map_TE.to(score_TE.dtype))
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(count_NE, group=self.tp_cp_group)
        of_token_T = (score_TE * count_NE[tokens.sample_T]).sum(1)
        loss = coefficient * self.num_experts / self.topk * (of_token_T * tokens.weight_T).sum()
        return self.attach_and_log_load_balancing_loss(weight_TE, coefficient, loss)

    @torch.no_grad()
    def count(self, done: RouterPass) -> None:
        """Add one pass to `totals`.  Call it once per micro-batch, even if the layer is recomputed."""
        if done.tokens is None or done.map_TE is None:
            return
        map_TE = done.map_TE.float()
        of_kind_MT = done.tokens.kind_T == torch.arange(KINDS, device=map_TE.device)[:, None]
        counts = (of_kind_MT.float() @ map_TE).flatten()  # exact in fp32, and in TF32, up to 2^24 tokens
        losses = torch.stack([torch.as_tensor(loss, device=counts.device).float() for loss in (done.aux, done.z)])
        totals = torch.cat([counts, losses]).double()
        self.totals = totals if self.totals is None else self.totals + totals
        done.map_TE = None


class RouterLogits(torch.autograd.Function):
    """x [T, D] times w [E, D] transposed, in fp32.

    On CUDA the forward multiplies bf16 inputs and accumulates in fp32: as products of bf16 numbers are exact in fp32,
    it is as exact as a GEMM of fp32 copies and several times as fast.  The fp32 gradient is split into three bf16
    tensors with the same exact sum and concatenated along the expert dimension, so one bf16 GEMM handles all three.
    """

    @staticmethod
    def forward(ctx, x_TD, w_ED):
        ctx.save_for_backward(x_TD, w_ED)
        if _takes_bf16(x_TD, w_ED):
            return torch.mm(x_TD, w_ED.t(), out_dtype=torch.float32)
        return torch.mm(x_TD.float(), w_ED.float().t())

    @staticmethod
    def backward(ctx, gradient_TE):
        x_TD, w_ED = ctx.saved_tensors
        to_x, to_w = ctx.needs_input_grad
        if not _takes_bf16(x_TD, w_ED):
            return (
                torch.mm(gradient_TE, w_ED.float()).to(x_TD.dtype) if to_x else None,
                torch.mm(gradient_TE.t(), x_TD.float()).to(w_ED.dtype) if to_w else None,
            )
        parts_TE3 = torch.cat(bf16_parts(gradient_TE), 1)
        x_gradient_TD = torch.mm(parts_TE3, w_ED.repeat(3, 1)) if to_x else None
        if not to_w:
            return x_gradient_TD, None
        parts_3ED = torch.mm(parts_TE3.t(), x_TD, out_dtype=torch.float32).unflatten(0, (3, -1))
        return x_gradient_TD, parts_3ED.sum(0).to(w_ED.dtype)


def bf16_parts(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split the fp32 tensor `x` into three bf16 tensors with the same exact sum: its 24-bit mantissa is 3 x 8 bits."""
    first = x.bfloat16()
    rest = x - first
    second = rest.bfloat16()
    return first, second, (rest - second).bfloat16()


def _takes_bf16(x_TD, w_ED) -> bool:
    return x_TD.is_cuda and x_TD.dtype == w_ED.dtype == torch.bfloat16
