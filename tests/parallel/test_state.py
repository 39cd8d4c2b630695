"""Runs of a row-major tensor as boxes, and boxes of a rank's part as boxes of the whole."""

import itertools
import math

import numpy as np
import pytest
import torch

from tandem.parallel.engines.state import Piece, StateChunk, boxes_of_run


@pytest.mark.parametrize("seed", range(40))
def test_a_run_is_cut_into_few_boxes_in_order(seed):
    draw = np.random.default_rng(seed)
    shape = tuple(draw.integers(1, 6, int(draw.integers(0, 5))).tolist())
    whole = torch.arange(math.prod(shape)).view(shape)
    begin = int(draw.integers(0, whole.numel() + 1))
    end = int(draw.integers(begin, whole.numel() + 1))
    boxes = boxes_of_run(shape, begin, end)
    cut = [whole[tuple(slice(at, at + n) for at, n in zip(*box, strict=True))].flatten() for box in boxes]
    assert torch.cat([torch.empty(0, dtype=torch.long), *cut]).tolist() == list(range(begin, end))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


def chunk(whole, local, pieces, begin, end):
    run = local.flatten()[begin:end]
    return StateChunk("w", "param", tuple(whole.shape), tuple(local.shape), pieces, begin, run)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("dim", [0, 1])
def test_runs_of_gate_and_up_come_back_together(seed, dim):
    """Two tensor-parallel ranks hold halves of gate and of up; each part is owned in three runs."""
    draw = np.random.default_rng(seed)
    whole = torch.arange(48.0).view(8, 6) if dim == 0 else torch.arange(48.0).view(6, 8)
    found, times = torch.empty_like(whole), torch.zeros_like(whole)
    for rank in range(2):
        pieces = tuple(Piece(dim, 2 * half, 4 * half + 2 * rank, 2) for half in range(2))
        local = torch.cat([piece.of_global(whole) for piece in pieces], dim)
        borders = [0, *sorted(draw.integers(0, local.numel() + 1, 2).tolist()), local.numel()]
        for begin, end in itertools.pairwise(borders):
            for corner, values in chunk(whole, local, pieces, begin, end).boxes():
                where = tuple(slice(at, at + n) for at, n in zip(corner, values.shape, strict=True))
                found[where] = values
                times[where] += 1
    assert torch.equal(found, whole) and (times == 1).all()
