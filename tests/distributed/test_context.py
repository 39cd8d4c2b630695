"""Attention under context parallelism against one process: values, gradients, and what travels.

fp64 throughout but for one case in bf16: another order of sums is all that may differ, 1e-12 is far above it.
"""

from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tandem.parallel.comm.context import attend, elements_sent, pack_row
from tandem.parallel.kernels.attention import Segments, attention
from tandem.parallel.layout import Layout
from tandem.parallel.plan.routes import local_positions
from tests.distributed.world import run_world

ROW = 96
PACKINGS = {
    "one sample over all borders": [96],
    "shorter than any chunk": [5, 4, 3, 7, 1, 5, 6, 2, 8, 7, 5, 9, 4, 3, 7, 8, 6, 6],
    "borders on chunks": [12, 12, 24, 48],
    "one token each": [1] * 96,
    "long and short": [1, 70, 1, 1, 3, 20],
    "ends with one token": [95, 1],
}
HEADS = {"one kv head": (2, 1), "grouped": (8, 4), "one to one": (4, 4)}
CASES = [
    (cp, kind, packing, heads)
    for cp in (2, 4)
    for kind in ("a2a", "all_gather")
    for packing in PACKINGS
    for heads in HEADS
    if kind == "all_gather" or HEADS[heads][1] % cp == 0
]


def random_packing(seed):
    """Lengths that add up to ROW."""
    cuts = np.random.default_rng(seed).choice(np.arange(1, ROW), np.random.default_rng(seed).integers(0, 20), False)
    return np.diff([0, *np.sort(cuts), ROW]).tolist()


def gradients(output, inputs, weight):
    return torch.autograd.grad((output * weight).sum(), inputs)


class Counted:
    """Counts the elements that leave this rank, as the collectives of `parallel.comm.context` are called."""

    def __init__(self, monkeypatch):
        self.elements = 0
        for name, sent in (
            ("all_to_all_single", lambda out, x, ranks: x.numel() * (ranks - 1) // ranks),
            ("all_gather_into_tensor", lambda out, x, ranks: x.numel() * (ranks - 1)),
            ("reduce_scatter_tensor", lambda out, x, ranks: out.numel() * (ranks - 1)),
        ):
            monkeypatch.setattr(dist, name, self._counting(getattr(dist, name), sent))

    def _counting(self, collective, sent):
        def call(out, x, group):
            self.elements += sent(out, x, group.size())
            return collective(out, x, group=group)

        return call

    def take(self):
        elements, self.elements = self.elements, 0
        return elements


def compare(layout, group, cp, lengths, heads, dtype, tolerance, counted):
    """One case on this rank: the whole row in one process against this rank's part of it."""
    q_heads, kv_heads = heads
    generator = torch.Generator().manual_seed(sum(lengths[:3]))
    whole = [torch.randn(ROW, h, 6, dtype=dtype, generator=generator) for h in (q_heads, kv_heads, kv_heads, q_heads)]
    mine = torch.from_numpy(local_positions(layout, cp, ROW))
    *inputs, weight = whole
    expected = [tensor.requires_grad_() for tensor in inputs]
    reference = attention(*expected, Segments.of(lengths), causal=True, scale=0.3)
    ours = [tensor.detach()[mine].requires_grad_() for tensor in inputs]
    positions = np.concatenate([np.arange(length) for length in lengths])
    row = pack_row(lengths, positions, layout, cp, torch.device("cpu"))
    assert row.positions_S.tolist() == positions[mine].tolist()
    output = attend(*ours, row, group, 0.3)
    sent = [counted.take()]
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(output, reference[mine], **close)
    mine_of = [gradient[mine] for gradient in gradients(reference, expected, weight)]
    torch.testing.assert_close(list(gradients(output, ours, weight[mine])), mine_of, **close)
    sent.append(counted.take())
    formula = elements_sent(layout, ROW, q_heads, kv_heads, 6)
    assert sent == [formula, formula], (layout.cp_comm_type, sent, formula)


def run_cases():
    """All cases on four ranks: cp 4 in one group, cp 2 in two."""
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    places = {2: (pairs[rank // 2], rank % 2), 4: (dist.group.WORLD, rank)}
    with pytest.MonkeyPatch.context() as monkeypatch:
        counted = Counted(monkeypatch)
        for cp, kind, packing, heads in CASES:
            layout = Layout(world=4, cp=cp, cp_comm_type=kind)
            compare(layout, *places[cp], PACKINGS[packing], HEADS[heads], torch.float64, 1e-12, counted)
        for seed, (cp, kind) in product(range(4), product((2, 4), ("a2a", "all_gather"))):
            layout = Layout(world=4, cp=cp, cp_comm_type=kind)
            compare(layout, *places[cp], random_packing(seed), (8, 4), torch.float64, 1e-12, counted)
        for cp, kind in product((2, 4), ("a2a", "all_gather")):
            layout = Layout(world=4, cp=cp, cp_comm_type=kind)
            # a sum over ranks in bf16 rounds a gradient of size 10 by 2e-2 a rank
            compare(layout, *places[cp], random_packing(4), (8, 4), torch.bfloat16, 8e-2, counted)


def test_attention_of_a_shared_row_is_that_of_one_process():
    run_world(run_cases, 4)
