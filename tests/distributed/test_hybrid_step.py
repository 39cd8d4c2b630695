"""The truths of the hybrid step that a run's losses alone would not show."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tandem.parallel.comm.exchange import DispatchPlan, Exchange
from tandem.parallel.layout import Layout
from tandem.parallel.plan.routes import VisualPlan, assign_encoding_ranks, build_routes, place_of
from tests.distributed.runs import build_run, step_by_hand, weights_of
from tests.distributed.world import run_world
from tests.support import corpus_overrides

MICRO_BATCHES = 3
SMALL = ["train.seq_length=256", "train.global_batch_size=4", "data.max_patches=64"]


def count_elements(overrides):
    config, engines, _, prefetcher = build_run("stage2", overrides, steps=3)
    seen = []
    for prepared in prefetcher:
        before = (engines.exchange.elements_dispatched, engines.exchange.elements_combined)
        step_by_hand(config, engines, prepared)
        moved = torch.tensor([engines.exchange.elements_dispatched, engines.exchange.elements_combined])
        moved -= torch.tensor(before)
        dist.all_reduce(moved)
        seen.append((int(prepared.plan.tokens_I.sum()) * engines.width, moved.tolist()))
    return seen


def test_dispatch_moves_each_row_once_each_way(corpus):
    """In the world of `make toy`: visual tokens x width elements out, and as many back."""
    toy = [*SMALL, *corpus_overrides(corpus), "parallel.pp=2", "parallel.ep=2"]
    for expected, moved in run_world(count_elements, 4, toy)[0]:
        assert expected > 0
        assert moved == [expected, expected]


def random_plan(layout, images):
    draw = np.random.default_rng(images)
    tokens_I = draw.integers(1, 9, images)
    return VisualPlan(
        unit_I=np.arange(images),
        cost_I=tokens_I**2,
        patches_I=tokens_I * 4,
        tokens_I=tokens_I,
        replica_I=draw.integers(0, layout.dp, images) * (draw.random(images) < 0.5),  # most of them one replica's
        micro_batch_I=draw.integers(0, MICRO_BATCHES, images),
        start_I=draw.integers(0, 55, images),
        row_tokens=64,
    )


def leaf_numbers(plan, encoding_rank_I, layout):
    """Numbers in the step of the rows that this rank's leaves hold, found row by row."""
    place, first_I, found = layout.coordinates(dist.get_rank()), np.cumsum(plan.tokens_I) - plan.tokens_I, []
    for image in np.lexsort((encoding_rank_I, plan.micro_batch_I)):
        for token in range(plan.tokens_I[image]):
            cp, tp, _ = place_of(plan.start_I[image] + token, layout, plan.row_tokens)
            if (place.pp, place.dp, place.cp, place.tp) == (0, plan.replica_I[image], cp, tp):
                found.append(first_I[image] + token)
    return np.array(found)


def rows_of(numbers):
    return torch.from_numpy(np.stack([numbers, np.sqrt(numbers)], axis=1).astype(np.float32))


def travel(layout, exchange, plan):
    """With rows that carry their own number: (the leaves hold what the plan says, the gradients of every chunk came
    home, images of each chunk)."""
    encoding_rank_I = assign_encoding_ranks(plan, layout, balance=True)
    routes = build_routes(plan, encoding_rank_I, layout, dist.get_rank(), MICRO_BATCHES, 32)
    first_I, dispatch_plan = np.cumsum(plan.tokens_I) - plan.tokens_I, DispatchPlan.of(routes)
    rows_C = [
        rows_of(np.concatenate([np.arange(first_I[i], first_I[i] + plan.tokens_I[i]) for i in ids] or [[]]))
        for ids in routes.chunks
    ]
    dispatch = exchange.dispatch(dispatch_plan)
    for rows_V2 in rows_C:
        dispatch.send(torch.cat([rows_V2, torch.full((1, 2), torch.nan)]))  # and a row of padding
    leaf_U2 = dispatch.leaves()
    returned = zip(rows_C, exchange.combine(leaf_U2 * 2, dispatch_plan), strict=True)
    home = [
        torch.equal(torch.empty_like(rows_V2).index_copy_(0, place_V, gradient_V2), rows_V2 * 2)
        for rows_V2, (place_V, gradient_V2) in returned
    ]
    arrived = torch.equal(leaf_U2, rows_of(leaf_numbers(plan, encoding_rank_I, layout)))
    return arrived, all(home), [ids.size for ids in routes.chunks]


def travel_all(layout, plans):
    groups = [dist.new_group(layout.group_ranks(group)) for group in range(layout.groups)]
    exchange = Exchange(groups[layout.group_of_replica(layout.coordinates(dist.get_rank()).dp)])
    return [travel(layout, exchange, plan) for plan in plans]


@pytest.mark.parametrize("layout", [Layout(world=4, balance_group_size=2), Layout(world=4, tp=2, pp=2)], ids=str)
def test_travel_by_chunk_is_to_the_bit_a_direct_look_up(layout):
    """Groups smaller than the world; ranks that encode nothing, or hold no leaf; chunks that are empty here."""
    results = run_world(travel_all, 4, layout, [random_plan(layout, images) for images in (0, 1, 30)])
    assert all(arrived and home for rank in results for arrived, home, _ in rank)
    chunks_R = [rank[-1][2] for rank in results]
    assert len(chunks_R[0]) > 2 and min(map(min, chunks_R)) == 0


def autograd_reference(overrides):
    """Gradient norms and loss of one step: the hybrid step against one plain autograd graph over everything."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    config, engines, _, prefetcher = build_run("stage1", [*overrides, "optim.clip_norm=0"], steps=1)
    prepared = next(prefetcher)
    batch, routes = prepared.batch, prepared.rank_shard.routes
    tower, chunk = engines.encoder._run.module, engines.llm.chunks[0]
    sent = zip(batch.chunks, batch.dispatch_plan.send_CV, strict=True)
    rows_VD = torch.cat([tower(images)[place_V] for images, place_V in sent])
    rows_UD = rows_VD[torch.from_numpy(np.argsort(routes.leaf_U))]
    places = torch.from_numpy(routes.at_U).split(routes.leaf_rows_M)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1) / len(batch.micro_batches))
    total = 0.0
    for micro, rows, at_U in zip(batch.micro_batches, rows_UD.split(routes.leaf_rows_M), places, strict=True):
        losses = chunk(tokens_1S=micro.tokens_1T, labels_1S=micro.labels_1T, row=micro.row, visual_UD=rows, at_U=at_U)
        total = total + (losses * micro.loss_mask_1T).sum() / batch.trained_tokens
    wanted = [*tower.encoder.parameters(), *tower.adapter.parameters(), *chunk.parameters()]
    gradients = torch.autograd.grad(total, wanted)
    counts = [len(list(part.parameters())) for part in (tower.encoder, tower.adapter, chunk)]
    norms, place = [], 0
    for count in counts:
        norms.append(float(torch.cat([g.double().flatten() for g in gradients[place : place + count]]).norm()))
        place += count
    output = step_by_hand(config, engines, prepared)
    return [float(total), *norms], [output.loss, *output.part_norms.values()]


def test_one_autograd_graph_gives_the_same_gradients(corpus):
    """No detached leaves, no exchange, no engine: the same loss and gradients, so the hybrid step's cuts are right."""
    plain, hybrid = run_world(autograd_reference, 1, [*SMALL, *corpus_overrides(corpus)])[0]
    assert hybrid == pytest.approx(plain, rel=2e-5)


def spoil_one_rank(overrides, where):
    config, engines, _, prefetcher = build_run("stage1", overrides, steps=2)
    before = weights_of(engines)
    first, second = list(prefetcher)
    if dist.get_rank() == 1:
        if where == "encoder":
            backward = engines.encoder.backward
            engines.encoder.backward = lambda rows, gradient: backward(rows, gradient * float("nan"))
        else:
            forward_backward = engines.llm.forward_backward
            engines.llm.forward_backward = lambda m, leaves, scale: forward_backward(m, leaves, float("inf"))
    spoiled = step_by_hand(config, engines, first)
    after = weights_of(engines)
    engines.encoder.__dict__.pop("backward", None)
    engines.llm.__dict__.pop("forward_backward", None)
    good = step_by_hand(config, engines, second)
    unchanged = all(torch.equal(before[name], after[name]) for name in before)
    moved = any(not torch.equal(after[name], weight) for name, weight in weights_of(engines).items())
    return spoiled.applied, unchanged, good.applied, moved


@pytest.mark.parametrize("where", ["encoder", "llm"])
def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_all(corpus, where):
    results = run_world(spoil_one_rank, 2, [*SMALL, *corpus_overrides(corpus)], where)
    assert results == [(False, True, True, True)] * 2


def freeze(overrides):
    config, engines, _, prefetcher = build_run("stage0", overrides, steps=2)
    before = weights_of(engines)
    for prepared in prefetcher:
        assert step_by_hand(config, engines, prepared).applied
    after = weights_of(engines)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {(c.name.split(".")[0], c.kind) for c in [*engines.encoder.state(), *engines.llm.state()]}
    gradients = [p for chunk in engines.llm.chunks for p in chunk.parameters() if p.grad is not None]
    return changed, set(before), kinds, len(gradients)


@pytest.mark.parametrize("layout", [[], ["parallel.pp=2", "parallel.encoder.zero_stage=3"], ["parallel.tp=2"]], ids=str)
def test_stage0_changes_the_adapter_alone(corpus, layout):
    """To the byte; no gradient and no optimizer state exists for encoder and LLM."""
    overrides = [*SMALL, *corpus_overrides(corpus), *layout]
    for changed, names, kinds, gradients in run_world(freeze, 2, overrides):
        assert changed == {name for name in names if name.startswith("adapter.")}
        assert gradients == 0
        assert {part for part, kind in kinds if kind != "param"} == {"adapter"}


def step_without_targets(overrides):
    """(applied, weights before, weights after) of a step of which no token is trained."""
    config, engines, _, prefetcher = build_run("stage1", overrides, steps=2)
    step_by_hand(config, engines, next(prefetcher))
    prepared, before = next(prefetcher), weights_of(engines)
    for micro_batch in prepared.batch.micro_batches:
        if micro_batch.loss_mask_1T is not None:
            micro_batch.loss_mask_1T.zero_()
    prepared.batch = dataclasses.replace(prepared.batch, trained_tokens=0)
    return step_by_hand(config, engines, prepared).applied, before, weights_of(engines)


def test_a_step_without_a_trained_token_changes_nothing(corpus):
    """Momentum and weight decay included."""
    for applied, before, after in run_world(step_without_targets, 2, [*SMALL, *corpus_overrides(corpus)]):
        assert not applied
        assert all(torch.equal(before[name], after[name]) for name in before)
