"""Attention as cp ranks call it, on one GPU in bf16, with the others' part of the exchange done by hand.

The kernels meet what only context parallelism gives them: fewer queries than keys, and heads that are a part of a
larger buffer.  bf16 keeps 8 bits: 2e-2 of the largest value bounds outputs and gradients.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tandem.parallel.comm.context import attend, pack_row
from tandem.parallel.kernels.attention import Segments, attention
from tandem.parallel.layout import Layout
from tandem.parallel.plan.routes import local_positions

CUDA = torch.device("cuda", 0)
LENGTHS = [1500, 1, 36, 700, 1, 1, 833, 1024]  # over borders, inside chunks, single tokens
ROW, HEADS, KV_HEADS, WIDTH = sum(LENGTHS), 8, 4, 64


@pytest.fixture(scope="module")
def whole():
    """Inputs and gradient of the output in bf16; output and gradients of one process in fp32."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(ROW, heads, WIDTH, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    *inputs, weight = (tensor.bfloat16().to(CUDA) for tensor in drawn)
    exact = [tensor.float().requires_grad_() for tensor in inputs]
    output = attention(*exact, Segments.of(LENGTHS, device=CUDA), causal=True)
    return inputs, weight, output.detach(), torch.autograd.grad(output, exact, weight.float())


def assert_near(ours, exact):
    assert (ours.float() - exact).abs().max() <= 2e-2 * exact.abs().max()


def packed(layout, cp):
    return pack_row(LENGTHS, np.concatenate([np.arange(length) for length in LENGTHS]), layout, cp, CUDA)


def test_queries_of_two_chunks_over_gathered_keys(whole):
    inputs, weight, exact, exact_grads = whole
    layout = Layout(world=4, cp=4, cp_comm_type="all_gather")
    mine_CS = [torch.from_numpy(local_positions(layout, cp, ROW)).to(CUDA) for cp in range(4)]
    gathered = torch.cat(mine_CS)
    sums = [torch.zeros_like(grad) for grad in exact_grads]
    for cp, mine_S in enumerate(mine_CS):
        row = packed(layout, cp)
        keys_X = gathered[row.keys_X]
        parts = [inputs[0][mine_S], inputs[1][keys_X], inputs[2][keys_X]]
        parts = [part.requires_grad_() for part in parts]
        output = attention(*parts, row.segments, causal=True)
        assert_near(output, exact[mine_S])
        grads = torch.autograd.grad(output, parts, weight[mine_S])
        for total, at, grad in zip(sums, (mine_S, keys_X, keys_X), grads, strict=True):
            total.index_add_(0, at, grad.float())
    for total, grad in zip(sums, exact_grads, strict=True):
        assert_near(total, grad)


def test_a_share_of_the_heads_in_one_buffer(whole):
    (q, k, v), weight, exact, exact_grads = whole
    row = packed(Layout(world=4, cp=4, cp_comm_type="a2a"), 0)
    for share in range(4):
        heads, kv = slice(2 * share, 2 * share + 2), slice(share, share + 1)
        buffer_RPK = torch.cat((q[:, heads], k[:, kv], v[:, kv]), 1).requires_grad_()
        output = attention(*buffer_RPK.split([2, 1, 1], 1), row.segments, causal=True)
        assert_near(output, exact[:, heads])
        (grad,) = torch.autograd.grad(output, buffer_RPK, weight[:, heads])
        expected = [g[:, part] for g, part in zip(exact_grads, (heads, kv, kv), strict=True)]
        for ours, one in zip(grad.split([2, 1, 1], 1), expected, strict=True):
            assert_near(ours, one)


def test_one_rank_takes_no_memory_beside_the_attention(whole):
    inputs = [tensor.clone().requires_grad_() for tensor in whole[0]]
    row = packed(Layout(world=1), 0)

    def peak(function):
        function()  # whatever is set up once
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(function(), inputs, whole[1])
        return torch.cuda.max_memory_allocated() - before

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ours = peak(lambda: attend(*inputs, row, dist.group.WORLD, None))
    finally:
        dist.destroy_process_group()
    assert ours == peak(lambda: attention(*inputs, row.segments, causal=True))
