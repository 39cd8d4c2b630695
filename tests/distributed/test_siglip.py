"""SigLIP round a ring of gloo ranks against the dense formula in one process, however the pairs are split.

Legend: N pairs of all ranks, B of one, D width.
"""

import pytest
import torch
import torch.distributed as dist

from tandem.train.objectives.siglip import siglip_loss
from tests.distributed.world import run_world
from tests.train.test_siglip import WIDTH, Largest, assert_close, dense, embeddings, scalars, value_and_gradients

TILE = 4
FACTOR = -3.0  # of the loss in what is differentiated
SPLITS = {
    1: [(9,), (0,), (1,)],
    2: [(5, 8), (0, 6), (9, 0), (0, 0), (4, 4), (1, 0)],
    3: [(3, 0, 9), (0, 0, 5), (4, 4, 4), (1, 10, 2), (0, 0, 0)],
    4: [(9, 0, 2, 5), (0, 0, 0, 1), (6, 6, 6, 6), (1, 2, 13, 0), (8, 0, 8, 0), (0, 0, 0, 0)],
}
SAME = [(12, 0, 0, 0), (3, 3, 3, 3), (0, 5, 0, 7), (1, 2, 4, 5), (0, 0, 12, 0)]


def mine(tensor, counts, rank):
    return tensor.detach()[sum(counts[:rank]) : sum(counts[: rank + 1])].clone().requires_grad_()


def rank_losses(splits, dtypes):
    """For every split and dtype: this rank's share and gradients."""
    rank, results = dist.get_rank(), {}
    for counts in splits:
        for dtype in dtypes:
            inputs = [mine(tensor, counts, rank) for tensor in embeddings(sum(counts), dtype)] + scalars(dtype)
            results[counts, dtype] = value_and_gradients(
                lambda *inputs, counts=counts: siglip_loss(*inputs, counts=counts, group=dist.group.WORLD, tile=TILE),
                inputs,
                FACTOR,
            )
    return results


def whole(ranks):
    """One process's value and gradients out of the ranks' shares."""
    shares, images, texts, scales, biases = zip(*ranks, strict=True)
    return [sum(shares), torch.cat(images), torch.cat(texts), sum(scales), sum(biases)]


@pytest.mark.parametrize("world", SPLITS)
def test_ring_equals_the_dense_formula(world):
    dtypes = (torch.float64, torch.float32)
    ranks = run_world(rank_losses, world, SPLITS[world], dtypes)
    for counts in SPLITS[world]:
        expected = value_and_gradients(dense, [*embeddings(sum(counts)), *scalars()], FACTOR)
        for dtype, tolerance in zip(dtypes, (1e-12, 1e-5), strict=True):
            got = whole([results[counts, dtype] for results in ranks])
            assert all(tensor.dtype == dtype for tensor in got)
            assert_close(got, expected, tolerance)


def test_the_split_over_ranks_changes_nothing():
    ranks = run_world(rank_losses, 4, SAME, (torch.float64,))
    first, *others = [whole([results[counts, torch.float64] for results in ranks]) for counts in SAME]
    for other in others:
        assert_close(other, first, 1e-12)


def rank_in_a_group(members):
    """The loss of some of the ranks, whose numbers in the world are not those in their group."""
    group = dist.new_group(members)
    if dist.get_rank() not in members:
        return None
    counts, rank = (3, 5, 2), members.index(dist.get_rank())
    inputs = [mine(tensor, counts, rank) for tensor in embeddings(10)] + scalars()
    return value_and_gradients(lambda *inputs: siglip_loss(*inputs, counts=counts, group=group, tile=TILE), inputs)


def test_the_group_need_not_be_the_world():
    members = [0, 2, 3]
    ranks = run_world(rank_in_a_group, 4, members)
    expected = value_and_gradients(dense, [*embeddings(10), *scalars()])
    assert_close(whole([ranks[member] for member in members]), expected, 1e-12)


def rank_sizes(pairs):
    """What a rank keeps for the backward, and its largest tensor, at a fixed local batch."""
    world, kept = dist.get_world_size(), []
    inputs = [*embeddings(pairs, torch.float32, seed=dist.get_rank()), *scalars(torch.float32)]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x)
    with Largest() as largest:
        with hooks:
            share = siglip_loss(*inputs, counts=[pairs] * world, group=dist.group.WORLD, tile=TILE)
        share.backward()
    return sum(kept), largest.elements


def test_memory_does_not_know_the_number_of_ranks():
    pairs = 32
    for world in (1, 2, 4):
        assert run_world(rank_sizes, world, pairs) == [(2 * pairs * WIDTH + 2, pairs * WIDTH)] * world


def rank_without_gradients():
    inputs = [*embeddings(6, seed=dist.get_rank()), *scalars()]
    counts = [6] * dist.get_world_size()
    with torch.no_grad():
        value = siglip_loss(*inputs, counts=counts, group=dist.group.WORLD, tile=TILE)
    return torch.equal(value, siglip_loss(*inputs, counts=counts, group=dist.group.WORLD, tile=TILE).detach())


def test_evaluation_needs_no_gradients():
    assert all(run_world(rank_without_gradients, 3))
