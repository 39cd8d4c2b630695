"""SuperClass's counts over ranks: the same on every rank, and the same bits as one process has."""

import itertools

import pytest
import torch
import torch.distributed as dist

from tandem.train.objectives.superclass import InverseFrequency
from tests.distributed.world import run_world
from tests.train.test_superclass import VOCAB, captions, counted, sets_of

STEPS = 4


def share(texts, step):
    """This rank's part of a step's captions, uneven, in two chunks; the first ranks of some steps have none."""
    rank, world = dist.get_rank(), dist.get_world_size()
    cuts = [0, *(len(texts) * (part + step % 2) // (world + step % 2) for part in range(1, world)), len(texts)]
    if step == 2:
        cuts = [0] * world + [len(texts)]
    mine = texts[cuts[rank] : cuts[rank + 1]]
    return mine[: len(mine) // 3], mine[len(mine) // 3 :]


def rank_counts():
    """Counts, then continues in a new object half way; the targets of the last step's captions, whole."""
    idf = InverseFrequency(VOCAB, "cpu")
    for step in range(STEPS):
        if step == STEPS // 2:
            state, idf = idf.state(), InverseFrequency(VOCAB, "cpu")
            idf.load_state(state)
        idf.update([sets_of(chunk) for chunk in share(captions(25, step), step)], dist.group.WORLD)
    return idf.state(), idf.k_hot(sets_of(captions(25, STEPS - 1)))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_counts_are_those_of_one_process(world):
    alone = counted(*(captions(25, step) for step in range(STEPS)))
    expected = alone.k_hot(sets_of(captions(25, STEPS - 1)))
    for state, khot in run_world(rank_counts, world):
        assert all(torch.equal(state[name], tensor) for name, tensor in alone.state().items())
        assert torch.equal(khot.weight_K, expected.weight_K) and torch.equal(khot.token_K, expected.token_K)
    assert alone.samples == STEPS * 25


def rank_continues(state):
    idf = InverseFrequency(VOCAB, "cpu")
    idf.load_state(state)
    idf.update([sets_of(chunk) for chunk in share(captions(25, 9), 0)], dist.group.WORLD)
    return idf.state()


def test_state_moves_between_world_sizes():
    state = counted(captions(10, 0)).state()
    expected = counted(captions(10, 0), captions(25, 9)).state()
    for world, name in itertools.product((2, 3), state):
        assert all(torch.equal(found[name], expected[name]) for found in run_world(rank_continues, world, state))
