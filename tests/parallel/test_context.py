"""What each cp rank attends to, from the row's lengths alone; what travels is in tests/distributed/test_context.py."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.parallel.comm.context import attend, elements_sent, pack_row
from tandem.parallel.kernels.attention import attention
from tandem.parallel.layout import Layout, choose_cp_comm_type

CPU = torch.device("cpu")


def pack(lengths, layout, cp):
    positions = np.concatenate([np.arange(length) for length in lengths])
    return pack_row(lengths, positions, layout, cp, CPU)


def work(lengths, layout):
    """Pairs of a query and a key that it sees, by cp rank, over all heads."""
    whole_heads = layout.cp if layout.cp_comm_type == "a2a" else 1
    rows = [pack(lengths, layout, cp).segments for cp in range(layout.cp)]
    pairs = [
        sum(q * (k - q) + q * (q + 1) / 2 for q, k in zip(row.q_lengths_N, row.k_lengths_N, strict=True))
        for row in rows
    ]
    return np.array(pairs) / whole_heads


@pytest.mark.parametrize("kind", ["a2a", "all_gather"])
@pytest.mark.parametrize("lengths", [[512], [256, *[32] * 8], [1] * 512, [7, 100, 405]], ids=str)
def test_ranks_share_the_work_of_one_process(kind, lengths):
    total = work(lengths, Layout(world=1)).sum()
    assert work(lengths, Layout(world=4, cp=4, cp_comm_type=kind)).sum() == total


def test_work_is_even():
    """a2a: always.  all_gather: for one long sample; where long and short ones lie apart it is not."""
    gather, trade = (Layout(world=4, cp=4, cp_comm_type=kind) for kind in ("all_gather", "a2a"))
    long_and_short = [65536, *[4096] * 16]
    assert np.ptp(work([131072], gather)) == np.ptp(work(long_and_short, trade)) == 0
    shares = work(long_and_short, gather)
    assert shares.max() / shares.mean() == pytest.approx(1.71, abs=0.01)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_only_keys_that_are_seen_are_kept(cp):
    layout = Layout(world=cp, cp=cp, cp_comm_type="all_gather")
    for rank in range(cp):
        assert len(pack([256], layout, rank).keys_X) == 256 + 256 // (2 * cp)
        inside = pack([256 // (4 * cp)] * (4 * cp), layout, rank)  # no sample reaches over a border: no other's keys
        assert sorted(inside.keys_X.tolist()) == list(range(rank * 256 // cp, (rank + 1) * 256 // cp))
        assert np.bincount(pack([100, 156], layout, rank).keys_X).max() <= 2


class Operators(TorchDispatchMode):
    """Names of what torch runs."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_one_rank_runs_the_attention_and_nothing_else():
    row = pack([5, 11], Layout(world=1), 0)
    inputs = [torch.randn(16, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with Operators() as ours:
            torch.autograd.grad(attend(*inputs, row, dist.group.WORLD, None).sum(), inputs)
    finally:
        dist.destroy_process_group()
    with Operators() as plain:
        torch.autograd.grad(attention(*inputs, row.segments, causal=True).sum(), inputs)
    assert ours.names == plain.names


@pytest.mark.parametrize(
    ("asked", "tp", "cp", "kv_heads", "chosen"),
    [
        ("auto", 1, 4, 8, "a2a"),
        ("auto", 2, 4, 8, "a2a"),
        ("auto", 2, 8, 8, "all_gather"),
        ("auto", 1, 3, 8, "all_gather"),
        ("all_gather", 1, 4, 8, "all_gather"),
        ("a2a", 2, 2, 4, "a2a"),
    ],
)
def test_choice(asked, tp, cp, kv_heads, chosen):
    assert choose_cp_comm_type(asked, Layout(world=tp * cp, tp=tp, cp=cp), kv_heads) == chosen


def test_all_gather_sends_less_while_cp_is_below_one_plus_heads_by_kv_heads():
    for cp, less in ((2, "all_gather"), (4, "all_gather"), (8, "a2a")):  # 1 + 32 / 8 = 5
        sent = {
            kind: elements_sent(Layout(world=cp, cp=cp, cp_comm_type=kind), 131072, 32, 8, 128)
            for kind in ("a2a", "all_gather")
        }
        assert min(sent, key=sent.get) == less
    assert sent == {"a2a": 131072 // 64 * 7 * 80 * 128, "all_gather": 131072 // 8 * 7 * 16 * 128}
