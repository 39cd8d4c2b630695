"""Every CUDA backend that can be imported against dense softmax in fp64, in bf16, on the same random packings.

python -m pytest tests/gpu/test_attention.py
"""

import logging
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tandem.parallel.kernels.attention import NAMES, Segments, attention, choose, saved_ops
from tandem.parallel.kernels.flash4 import packed_attention
from tests.attention_reference import dense, drawn, packing, with_gradients

DTYPE = torch.bfloat16
CLOSE = 2e-2  # of a tensor's norm: bf16 has 8 bits, probabilities and their gradients are rounded to it too
ROUNDED = 5e-3  # of an entry of a gradient that is zero but for rounding: a query that sees one key


@cache
def refusal(name: str) -> str | None:
    """Why this machine cannot run a backend; None where it can."""
    try:
        choose(name, "cuda", DTYPE)
    except ValueError as error:
        return str(error)
    return None


@pytest.fixture(autouse=True)
def nothing_chosen():
    yield
    torch._dynamo.reset()
    choose("auto", "cuda", DTYPE)


def take(name: str) -> None:
    if refusal(name):
        pytest.skip(refusal(name))
    choose(name, "cuda", DTYPE)


def assert_close(ours, plain):
    for mine, other in zip(ours, plain, strict=True):
        assert mine.isfinite().all()
        error, norm = (mine.double() - other.double()).norm(), other.double().norm()
        assert error <= CLOSE * norm + ROUNDED * mine.numel() ** 0.5


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", NAMES)
def test_random_packings_match_dense_softmax(name, seed):
    take(name)
    rng = np.random.default_rng(seed)
    causal, windowed, grouped = (bool(x) for x in rng.integers(0, 2, 3))
    window = int(rng.integers(1, 300)) if windowed else None
    q_lengths, k_lengths = packing(rng, 700, unequal=bool(rng.integers(0, 2)))
    keyed = [place for place, keys in enumerate(k_lengths) if keys]  # softmax over no key is a test of its own
    segments = Segments.of([q_lengths[i] for i in keyed], [k_lengths[i] for i in keyed], "cuda")
    heads, width = (8, 128) if rng.integers(0, 2) else (4, 64)
    q, k, v, weight = drawn(segments, heads, 2 if grouped else heads, width, DTYPE, "cuda", seed)
    ours = with_gradients(attention(q, k, v, segments, causal=causal, window=window), (q, k, v), weight)
    assert_close(ours, with_gradients(dense(q, k, v, segments, causal, window), (q, k, v), weight))


@pytest.mark.parametrize("lengths", [[512] * 4, [300]])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_segments_of_one_length_match_dense_softmax(name, causal, lengths):
    take(name)
    segments = Segments.of(lengths, device="cuda")
    q, k, v, weight = drawn(segments, 8, 2, 64, DTYPE, "cuda")
    ours = with_gradients(attention(q, k, v, segments, causal=causal), (q, k, v), weight)
    assert_close(ours, with_gradients(dense(q, k, v, segments, causal), (q, k, v), weight))


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [([], []), ([0, 0], [3, 0]), ([5, 200], [0, 300]), ([9, 0], [9, 7])]
)
@pytest.mark.parametrize("name", ["flash4", "varlen", "sdpa"])
def test_queries_without_keys_get_zeros_and_empty_inputs_pass(name, q_lengths, k_lengths):
    take(name)
    segments = Segments.of(q_lengths, k_lengths, "cuda")
    q, k, v, weight = drawn(segments, 4, 2, 64, DTYPE, "cuda")
    output, *gradients = with_gradients(attention(q, k, v, segments, causal=False), (q, k, v), weight)
    plain = dense(q, k, v, segments, False).nan_to_num() if q_lengths else q
    assert_close([output], [plain])
    empty = np.repeat(np.array(k_lengths, dtype=int) == 0, q_lengths)
    assert not output[torch.from_numpy(empty).cuda()].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("causal", [True, False])
def test_flash4_agrees_with_varlen(causal):
    segments = Segments.of([1000, 37, 512, 2048], device="cuda")
    q, k, v, weight = drawn(segments, 8, 2, 128, DTYPE, "cuda")
    results = []
    for name in ("flash4", "varlen"):
        take(name)
        results.append(with_gradients(attention(q, k, v, segments, causal=causal), (q, k, v), weight))
    for mine, other in zip(*results, strict=True):
        assert (mine - other).norm() <= 5e-3 * other.norm()


@pytest.mark.parametrize("causal", [True, False])
def test_flash4s_operator_passes_torchs_own_checks(causal):
    take("flash4")
    segments = Segments.of([130, 64, 300], device="cuda")
    q, k, v, _ = drawn(segments, 4, 2, 64, DTYPE, "cuda")
    arguments = (q, k, v, segments.cu_q_N1, segments.cu_k_N1, causal, None, None)
    torch.library.opcheck(packed_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def block(x_ND, weight_DE, segments):
    q, k, v = (x_ND @ weight_DE).unflatten(-1, (3, 4, 64)).unbind(1)
    return attention(q, k, v, segments, causal=False).flatten(1) + x_ND


def keep_attention(_ctx, op, *_args, **_kwargs):
    return CheckpointPolicy.MUST_SAVE if op in saved_ops() else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("name", ["flash4", "varlen"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_compiled_and_recomputed_blocks_give_the_same_from_few_graphs(name, recompute):
    take(name)
    kept = {"context_fn": partial(create_selective_checkpoint_contexts, keep_attention)}
    context = kept if recompute == "selective" else {}

    def run(*arguments):
        return (
            block(*arguments) if recompute == "none" else checkpoint(block, *arguments, use_reentrant=False, **context)
        )

    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    weight_DE = (torch.randn(256, 768, generator=generator) / 16).to("cuda", DTYPE).requires_grad_()
    for _ in range(8):
        cuts = np.sort(rng.choice(np.arange(1, 2048), rng.integers(0, 12), replace=False))
        segments = Segments.of(np.diff([0, *cuts, 2048]), device="cuda")
        x_ND = torch.randn(2048, 256, generator=generator).to("cuda", DTYPE).requires_grad_()
        ours = with_gradients(compiled(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones_like(x_ND))
        plain = with_gradients(block(x_ND, weight_DE, segments), (x_ND, weight_DE), torch.ones_like(x_ND))
        assert_close(ours, plain)
    if recompute == "none" or torch.__version__ >= (2, 13):
        assert counter.frame_count <= 3
    else:  # before, a checkpoint inside a graph makes one for every number of segments; nothing of ours has that
        assert counter.frame_count <= 8


def test_what_a_backend_cannot_take_goes_to_the_next_with_one_line(caplog):
    take("varlen")
    segments = Segments.of([40, 30], device="cuda")
    for width, dtype in ((20, DTYPE), (20, DTYPE), (64, torch.float32), (64, torch.float32)):
        q, k, v, weight = drawn(segments, 4, 2, width, dtype, "cuda")
        caplog.set_level(logging.WARNING, "tandem.parallel.kernels.attention")
        ours = with_gradients(attention(q, k, v, segments, causal=True), (q, k, v), weight)
        assert_close(ours, with_gradients(dense(q, k, v, segments, True), (q, k, v), weight))
    assert sum("varlen does not serve: head width 20" in line for line in caplog.messages) == 1
    assert sum("varlen does not serve: it takes bfloat16" in line for line in caplog.messages) == 1
