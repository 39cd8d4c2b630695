"""The router's choices, losses and counts by hand, and against Megatron-core's where that has them.

Legend: T tokens, E experts, K experts per token, D width.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, topk_routing_with_score_function

from tandem.parallel.comm.context import pack_row
from tandem.parallel.engines.balance import ExpertBalance
from tandem.parallel.engines.llm_shards import initialize
from tandem.parallel.kernels.router import Router, RouterPass
from tandem.parallel.layout import Coordinates, Layout
from tandem.parallel.plan.tokens import PADDING, TEXT, VISUAL, RowTokens
from tandem.train.models.language.llm_config import BalanceConfig
from tandem.train.models.language.llm_spec import build_chunk
from tests.parallel.test_experts import D, E, config_of

CPU = torch.device("cpu")
KINDS = np.array([TEXT, TEXT, VISUAL, VISUAL, VISUAL, TEXT, TEXT, VISUAL, TEXT, PADDING, PADDING, PADDING])
SAMPLES = np.array([5, 5, 5, 5, 5, 5, 7, 7, 7, -1, -1, -1])
T, K = len(KINDS), 2
ONE = Coordinates(tp=0, cp=0, dp=0, pp=0)


def router_of(layout, kinds=KINDS, samples=SAMPLES, aux_loss=0.0, z_loss=0.0, **balance):
    """A router with random weights, tokens to see, and logits."""
    sizes = {"aux_loss": aux_loss, "z_loss": z_loss, "balance": BalanceConfig(**balance)}
    router = Router(config_of(layout, **sizes)[1], get_default_pg_collection())
    router.set_layer_number(1)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        router.weight.normal_(0, 0.3, generator=draw)
        for bias_E in router.buffers():
            bias_E.normal_(0, 0.5, generator=draw)
    router.pass_ = RouterPass(RowTokens.of(kinds, samples, layout, ONE, CPU))
    return router, torch.randn(len(kinds), 1, D, generator=draw)


def chosen(map_TE):
    return [set(row.nonzero()[:, 0].tolist()) for row in map_TE]


def best(score_TE):
    return [set(row.topk(K).indices.tolist()) for row in score_TE]


def test_the_bias_moves_choices_and_not_weights(alone):
    router, x_T1D = router_of(alone, bias_update=0.1)
    weight_TE, map_TE = router(x_T1D)
    logits_TE = x_T1D[:, 0] @ router.weight.T
    assert chosen(map_TE) == best(logits_TE.softmax(-1) + router.expert_bias) != best(logits_TE)
    torch.testing.assert_close(weight_TE, logits_TE.masked_fill(~map_TE, -math.inf).softmax(-1))


def test_sigmoid_scores_are_chosen_as_megatron_core_does(alone):
    router, x_T1D = router_of(alone, bias_update=0.1)
    router.score_function = "sigmoid"
    theirs = topk_routing_with_score_function(
        router.gating(x_T1D)[:, 0], K, score_function="sigmoid", expert_bias=router.expert_bias
    )
    for mine, other in zip(router(x_T1D), theirs, strict=True):
        assert torch.equal(mine, other)


def test_visual_tokens_may_have_their_own_bias(alone):
    router, x_T1D = router_of(alone, bias_update=0.1, by_modality=True)
    _, map_TE = router(x_T1D)
    score_TE = (x_T1D[:, 0] @ router.weight.T).softmax(-1)
    text, visual = (best(score_TE + bias_E) for bias_E in (router.expert_bias, router.expert_bias_visual))
    assert text != visual
    assert chosen(map_TE) == [visual[t] if kind == VISUAL else text[t] for t, kind in enumerate(KINDS)]


def test_choices_are_counted_by_kind(alone):
    router, x_T1D = router_of(alone, z_loss=0.1)
    for _ in range(2):
        _, map_TE = router(x_T1D)
        router.count(router.pass_)
    counts_ME = router.totals[:-2].view(3, E)
    for kind in (TEXT, VISUAL, PADDING):
        assert torch.equal(counts_ME[kind], 2 * map_TE[torch.from_numpy(kind == KINDS)].sum(0).double())
    z = (x_T1D[:, 0] @ router.weight.T).logsumexp(-1).square().mean()
    assert router.totals[-2:].tolist() == pytest.approx([0, 2 * z.item()])


def losses_of(router, x_T1D):
    """(the balancing loss without its coefficient, the gradient that it gives the weights)."""
    router.zero_grad()
    weight_TE, _ = router(x_T1D)
    (0 * weight_TE).sum().backward()
    return float(router.pass_.aux), router.weight.grad


def test_each_sample_is_balanced_by_itself(alone):
    """Padding left out, and a sample weighed by its tokens."""
    router, x_T1D = router_of(alone, aux_loss=0.5, aux_loss_type="seq_aux_loss")
    found, gradient = losses_of(router, x_T1D)
    score_TE = (x_T1D[:, 0] @ router.weight.T).softmax(-1)
    wanted = 0.0
    for sample in (5, 7):
        here = torch.from_numpy(sample == SAMPLES)
        length, n_E = int(here.sum()), torch.zeros(E)
        for row in best(score_TE[here]):
            n_E[list(row)] += 1
        wanted = wanted + length / 9 * E / (K * length**2) * (n_E * score_TE[here].sum(0)).sum()
    assert found == pytest.approx(wanted.item(), rel=1e-5)
    (by_hand,) = torch.autograd.grad(0.5 * wanted, router.weight)
    torch.testing.assert_close(gradient, by_hand)


def test_one_sample_without_padding_is_a_micro_batch(alone):
    whole = {"kinds": KINDS * 0, "samples": SAMPLES * 0, "aux_loss": 0.5}
    mine, other = (losses_of(*router_of(alone, **whole, aux_loss_type=kind)) for kind in ("seq_aux_loss", "aux_loss"))
    assert mine[0] == pytest.approx(other[0], rel=1e-6)
    torch.testing.assert_close(mine[1], other[1])


def test_the_bias_stays_in_fp32(alone):
    router, _ = router_of(alone, bias_update=0.1)
    before = router.expert_bias.clone()
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    router.expert_bias.copy_(before)
    assert torch.equal(router.expert_bias, before)


@pytest.mark.parametrize("comm", ["a2a", "all_gather"])
def test_ranks_see_every_token_once(comm):
    layout = dataclasses.replace(Layout(world=4, tp=2, cp=2), cp_comm_type=comm)
    kinds, samples = np.repeat(KINDS, 2), np.repeat(SAMPLES, 2)
    parts = [
        RowTokens.of(kinds, samples, layout, Coordinates(tp=tp, cp=cp, dp=0, pp=0), CPU)
        for cp in range(2)
        for tp in range(2)
    ]
    whole = RowTokens.of(kinds, samples, Layout(world=1), ONE, CPU)
    assert whole.samples == 2 and whole.sample_T.tolist() == [0] * 12 + [1] * 6 + [2] * 6
    assert whole.weight_T.tolist() == pytest.approx([1 / 12 / 18] * 12 + [1 / 6 / 18] * 6 + [0] * 6)
    for field in ("kind_T", "sample_T", "weight_T"):
        seen = torch.cat([getattr(part, field) for part in parts])
        assert torch.equal(seen.sort().values, getattr(whole, field).sort().values) and len(parts[0].kind_T) == 6


@pytest.mark.parametrize("recompute", ["none", "selective", "offload", "full"])
def test_a_layer_that_is_computed_again_counts_once(recompute, alone):
    """Forward and backward of two layers; tokens that nobody describes are not counted."""
    llm, config = config_of(alone, layers=2, z_loss=0.1)
    config.recompute = recompute
    chunk = build_chunk(llm, config, vp_stage=None, first=True, last=True)
    initialize(chunk, 0, 0.3, 2)
    row = pack_row([6, 3, 3], np.r_[:6, :3, :3], alone, 0, CPU)
    seen = dataclasses.replace(row, tokens=RowTokens.of(KINDS, SAMPLES, alone, ONE, CPU))
    tokens_1T, visual = torch.arange(T)[None], (torch.zeros(0, D), torch.zeros(0, dtype=torch.long))
    for each in (row, seen):
        chunk(tokens_1T, tokens_1T, each, *visual).sum().backward()
    for layer in chunk.decoder.layers:
        counts_ME = layer.mlp.router.totals[:-2].view(3, E)
        assert counts_ME.sum(1).tolist() == [K * 5, K * 4, K * 3]


# ---- over a step -----------------------------------------------------------------------------------------------------

COUNTS = {  # of four experts, by kind
    TEXT: [4, 0, 2, 2],
    VISUAL: [0, 0, 6, 0],
    PADDING: [0, 9, 0, 0],
}


def balance_of(layout, by_modality):
    config = config_of(layout, num_experts=4, layers=2, aux_loss=0.5, balance=BalanceConfig(0.25, by_modality))[1]
    router = Router(config, get_default_pg_collection())
    router.set_layer_number(2)  # the first layer is dense, or another rank's
    balance = ExpertBalance(config, [router], 0.25, CPU)
    router.totals = torch.tensor([*COUNTS[TEXT], *COUNTS[VISUAL], *COUNTS[PADDING], 6.0, 4.0], dtype=torch.float64)
    return balance, router


def test_load_by_hand(alone):
    """Of 8 text and 6 visual choices; two ranks with the same share have the same load."""
    balance, router = balance_of(alone, by_modality=False)
    load = balance.load(balance.digest(2 * balance.take()).tolist(), micro_batches=4)
    assert router.totals is None and not balance.take().any()
    assert load.max_over_mean == {"all": [None, 8 / 3.5], "text": [None, 2.0], "visual": [None, 4.0]}
    assert load.dead == {"all": [None, 0.25], "text": [None, 0.25], "visual": [None, 0.75]}
    assert (load.aux_loss, load.z_loss, load.highest) == (3.0, None, 8 / 3.5)


def test_a_step_without_visual_tokens_says_nothing_of_them(alone):
    balance, router = balance_of(alone, by_modality=False)
    router.totals[4:8] = 0
    load = balance.load(balance.digest(balance.take()).tolist(), micro_batches=1)
    assert set(load.max_over_mean) == set(load.dead) == {"all", "text"}


def test_biases_move_towards_the_mean(alone):
    """By the rate alone: choices of both kinds of tokens, or each kind's own, and never padding's."""
    for by_modality in (False, True):
        balance, router = balance_of(alone, by_modality)
        balance.digest(balance.take())
        balance.update()
        if by_modality:
            assert router.expert_bias.tolist() == [-0.25, 0.25, 0, 0]
            assert router.expert_bias_visual.tolist() == [0.25, 0.25, -0.25, 0.25]
        else:
            assert router.expert_bias.tolist() == [-0.25, 0.25, -0.25, 0.25]
