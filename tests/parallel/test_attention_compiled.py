"""The packed operator under torch.compile and under recompute: no graph break, few graphs, nothing computed twice."""

from functools import partial

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tandem.parallel.kernels.attention import Segments, attention, saved_ops
from tandem.parallel.kernels.flash4 import packed_attention
from tests.attention_reference import drawn, packing, with_gradients

HEADS, WIDTH = 4, 8


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(x_ND, weight_DE, segments):
    q, k, v = (x_ND @ weight_DE).unflatten(-1, (3, HEADS, WIDTH)).unbind(1)
    return attention(q, k, v, segments, causal=True).flatten(1).relu() + x_ND


def inputs(tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    width = HEADS * WIDTH
    x_ND, weight_DE = (torch.randn(shape, generator=generator) for shape in ((tokens, width), (width, 3 * width)))
    return x_ND.requires_grad_(), weight_DE.requires_grad_()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_operator_passes_torchs_own_checks(causal, dtype):
    for window in (None, 3):
        segments = Segments.of([2, 0, 5, 3], [4, 1, 5, 3])
        q, k, v, _ = drawn(segments, 4, 2, 8, dtype)
        arguments = (q, k, v, segments.cu_q_N1, segments.cu_k_N1, causal, 0.3, window)
        torch.library.opcheck(packed_attention, arguments)


@pytest.mark.parametrize("dynamic", [None, True])
def test_random_packings_share_a_few_graphs(dynamic):
    # the number of segments is a dynamic size: one graph for the first packing and one for all others
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=dynamic)
    rng = np.random.default_rng(0)
    for step in range(30):
        cuts = np.sort(rng.choice(np.arange(1, 96), rng.integers(0, 12), replace=False))
        segments = Segments.of(np.diff([0, *cuts, 96]))
        x_ND, weight_DE = inputs(96, step)
        ours = with_gradients(compiled(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones(96, 32))
        plain = with_gradients(block(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones(96, 32))
        for mine, other in zip(ours, plain, strict=True):
            torch.testing.assert_close(mine, other)
    assert counter.frame_count <= (1 if dynamic else 2)


def test_longest_segments_take_few_values():
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        segments = Segments.of(*packing(rng, 5000, unequal=True))
        assert segments.longest_q >= max(segments.q_lengths_N) and segments.longest_k >= max(segments.k_lengths_N)
        seen |= {segments.longest_q, segments.longest_k}
    assert len(seen) <= 14


class Counted(TorchDispatchMode):
    """Counts calls of operators by name."""

    def __init__(self, ops):
        super().__init__()
        self.ops, self.calls = ops, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += func in self.ops
        return func(*args, **(kwargs or {}))


def keep_attention(_ctx, op, *_args, **_kwargs):
    return CheckpointPolicy.MUST_SAVE if op in saved_ops() else CheckpointPolicy.PREFER_RECOMPUTE


def recomputed(context_fn, *arguments):
    context = {} if context_fn is None else {"context_fn": context_fn}
    return checkpoint(block, *arguments, use_reentrant=False, **context)


POLICIES = [(None, 2), (partial(create_selective_checkpoint_contexts, keep_attention), 1)]


@pytest.mark.parametrize(("context_fn", "times"), POLICIES)
def test_recompute_keeps_attention_by_the_name_of_its_operator(context_fn, times):
    segments = Segments.of([5, 3, 5, 8])
    x_ND, weight_DE = inputs(21)
    plain = with_gradients(block(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones(21, 32))
    with Counted(saved_ops()) as mode:
        output = recomputed(context_fn, x_ND, weight_DE, segments)
        ours = with_gradients(output, (x_ND, weight_DE), torch.ones(21, 32))
    assert mode.calls == times * 3  # SDPA once for each length
    assert all(torch.equal(mine, other) for mine, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize(("context_fn", "times"), POLICIES)
def test_recompute_in_compiled_code_keeps_attention_by_the_name_of_its_operator(context_fn, times):
    calls = []

    def counted(graph, _inputs):
        calls.append(sum(node.target in saved_ops() for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=counted, bw_compiler=counted)
    compiled = torch.compile(partial(recomputed, context_fn), backend=backend, fullgraph=True)
    segments = Segments.of([5, 3, 5, 8])
    x_ND, weight_DE = inputs(21)
    ours = with_gradients(compiled(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones(21, 32))
    plain = with_gradients(block(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones(21, 32))
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other)
    assert calls == [1, times - 1]
