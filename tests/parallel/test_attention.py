"""The attention entry point against dense softmax in fp64, in value and gradient, and the choice of its backend."""

import importlib.util
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tandem.parallel.kernels import attention as entry
from tandem.parallel.kernels.attention import Segments, attention, choose
from tandem.parallel.kernels.flash4 import packed_attention
from tandem.train.config.checks import check_config
from tests.attention_reference import dense, drawn, packing, with_gradients
from tests.support import settings


@pytest.fixture(autouse=True)
def nothing_chosen():
    yield
    choose("auto", "cpu", torch.float32)


def operator(q, k, v, segments, causal, scale=None, window=None):
    return packed_attention(q, k, v, segments.cu_q_N1, segments.cu_k_N1, causal, scale, window)[0]


@pytest.mark.parametrize("seed", range(40))
def test_random_packings_match_dense_softmax(seed):
    rng = np.random.default_rng(seed)
    unequal, causal, windowed = (bool(x) for x in rng.integers(0, 2, 3))
    window = int(rng.integers(1, 12)) if windowed else None
    kv_heads = int(rng.integers(1, 4))
    scale = 0.3 if rng.integers(0, 2) else None
    segments = Segments.of(*packing(rng, 20, unequal))
    q, k, v, weight = drawn(segments, kv_heads * int(rng.integers(1, 4)), kv_heads, 8, torch.float64, seed=seed)
    plain = with_gradients(dense(q, k, v, segments, causal, window, scale), (q, k, v), weight)
    ours = attention(q, k, v, segments, causal=causal, scale=scale, window=window)
    ours = with_gradients(ours, (q, k, v), weight)
    for mine, other in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, other)
    by_operator = with_gradients(operator(q, k, v, segments, causal, scale, window), (q, k, v), weight)
    for mine, other in zip(by_operator, ours, strict=True):  # the same kernel on the same segment
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batching_equal_segments_changes_no_bit(dtype):
    lengths = [7, 4, 4, 4, 9, 7, 1, 1, 4]
    q, k, v, weight = drawn(Segments.of(lengths), 4, 2, 16, dtype)
    one_by_one = torch.cat(
        [
            F.scaled_dot_product_attention(*(x[None].transpose(1, 2) for x in parts), is_causal=True, enable_gqa=True)[
                0
            ].transpose(0, 1)
            for parts in zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
        ]
    )
    plain = with_gradients(one_by_one, (q, k, v), weight)
    for run in (lambda *a: attention(*a, causal=True), lambda *a: operator(*a, True)):
        ours = with_gradients(run(q, k, v, Segments.of(lengths)), (q, k, v), weight)
        assert all(torch.equal(mine, other) for mine, other in zip(ours, plain, strict=True))


@pytest.mark.parametrize(
    ("q_lengths", "k_lengths"), [([], []), ([0], [0]), ([0, 0], [3, 0]), ([5], [0]), ([2, 3, 0], [4, 0, 2])]
)
@pytest.mark.parametrize("run", [attention, operator])
def test_queries_without_keys_get_zeros_and_empty_inputs_pass(run, q_lengths, k_lengths):
    segments = Segments.of(q_lengths, k_lengths)
    q, k, v, weight = drawn(segments, 4, 2, 8, torch.float64)
    output, *gradients = with_gradients(run(q, k, v, segments, causal=False), (q, k, v), weight)
    plain = dense(q, k, v, segments, False) if q_lengths else q
    torch.testing.assert_close(output, plain.nan_to_num().detach())
    empty = np.repeat(np.array(k_lengths, dtype=int) == 0, q_lengths)
    assert not output[torch.from_numpy(empty)].any()
    assert all(
        gradient.isfinite().all() and gradient.shape == x.shape
        for gradient, x in zip(gradients, (q, k, v), strict=True)
    )


def test_what_cannot_be_computed_is_refused():
    q, k, v, _ = drawn(Segments.of([5], [3]), 4, 2, 8, torch.float32)
    for kwargs in ({"causal": True}, {"causal": False, "window": 2}):
        with pytest.raises(ValueError, match="more queries than keys"):
            attention(q, k, v, Segments.of([5], [3]), **kwargs)
    segments = Segments.of([3])
    q = q[:3]
    with pytest.raises(ValueError, match="window=0: must be at least 1"):
        attention(q, k, v, segments, causal=True, window=0)
    with pytest.raises(ValueError, match="must have one dtype"):
        attention(q.double(), k, v, segments, causal=True)
    with pytest.raises(ValueError, match="G must divide H"):
        attention(q[:, :3], k, v, segments, causal=True)
    with pytest.raises(ValueError, match="segments of 2 queries and 2 keys"):
        operator(q, k, v, Segments.of([2]), True)


def test_choosing_logs_one_line(caplog):
    with caplog.at_level(logging.INFO, "tandem.parallel.kernels.attention"):
        assert choose("auto", "cpu", torch.float32) == "sdpa"
        assert choose("auto", "cpu", torch.bfloat16) == "sdpa"
        assert choose("sdpa", "cuda", torch.float32) == "sdpa"
        assert choose("auto", "cuda", torch.float32) == "sdpa"
    assert [record.getMessage().split(" (")[0] for record in caplog.records] == [
        "attention: sdpa on cpu in torch.float32",
        "attention: sdpa on cpu in torch.bfloat16",
        "attention: sdpa on cuda in torch.float32",
        "attention: sdpa on cuda in torch.float32",
    ]


def test_a_choice_that_cannot_be_served_is_refused():
    with pytest.raises(ValueError, match=r"parallel.attention=flash: must be one of auto, flash4"):
        check_config(settings("stage1", "parallel.attention=flash"), 1)
    with pytest.raises(ValueError, match=r"parallel.attention=flash: must be one of auto, flash4"):
        choose("flash", "cpu", torch.float32)
    with pytest.raises(ValueError, match=r"parallel.attention=flash4: it runs on CUDA, not on cpu"):
        choose("flash4", "cpu", torch.bfloat16)
    with pytest.raises(ValueError, match=r"parallel.attention=varlen: it takes bfloat16 or float16, not torch.float32"):
        choose("varlen", "cuda", torch.float32)


@pytest.mark.parametrize(
    ("name", "package", "command"),
    [
        ("flash4", "flash_attn", "pip install --pre flash-attn-4"),
        ("te", "transformer_engine", "pip install 'transformer-engine[pytorch]'"),
    ],
)
def test_a_missing_package_is_named_with_its_command(name, package, command):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ValueError, match=f"parallel.attention={name}: .*{package}") as caught:
        choose(name, "cuda", torch.bfloat16)
    assert command in str(caught.value)


def test_a_fallback_is_logged_once_a_cause(caplog, monkeypatch):
    monkeypatch.setattr(entry, "_chosen", "varlen")  # as in a process that chose it for its CUDA device
    monkeypatch.setattr(entry, "_said", set())
    monkeypatch.setattr(entry.logger, "disabled", False)  # as a library that configures logging leaves it at times
    caplog.set_level(logging.WARNING, entry.logger.name)
    entry._route.cache_clear()
    segments = Segments.of([3, 4])
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        q, k, v, _ = drawn(segments, 4, 2, 8, dtype)
        attention(q, k, v, segments, causal=True)
    assert caplog.messages == ["attention: varlen does not serve: it runs on CUDA, not on cpu; sdpa runs instead"]
