"""What is compiled, and how many shapes and graphs a run can have.

Legend: N rows, D width.
"""

import numpy as np
import pytest
import torch
from torch import nn

from tandem.parallel.kernels import compilation
from tandem.parallel.kernels.compilation import BUCKET, bucket_of
from tests.graphs import CountedGraphs


@pytest.fixture
def graphs():
    """Counts what is compiled; the mode that was is set again."""
    counted = CountedGraphs()
    compilation.configure("always", counted.backend)
    yield counted
    compilation.configure("auto")


def test_a_bucket_is_the_least_multiple_that_holds_all_rows():
    for rows in (*range(2 * BUCKET + 2), 32768):
        bucket = bucket_of(rows)
        assert bucket % BUCKET == 0 and bucket >= rows
        assert bucket - rows < BUCKET or bucket == 2 * BUCKET
    assert bucket_of(0) == 2 * BUCKET


def test_shapes_and_waste_are_bounded_for_the_mix_of_the_report():
    """Chunks of at most 32,768 patches of images of 196 to 6,400: 256 sizes at most, and 0.2% more patches."""
    chunk_patches, generator = 32768, np.random.default_rng(0)
    patches_I = 4 * np.exp(generator.uniform(np.log(49), np.log(1600), 20000)).astype(int)
    chunks, last = [], 0
    for patches in patches_I:
        if last + patches > chunk_patches:
            chunks.append(last)
            last = 0
        last += patches
    buckets = [bucket_of(rows) for rows in chunks]
    assert len(set(buckets)) <= chunk_patches // BUCKET
    assert max(bucket - rows for bucket, rows in zip(buckets, chunks, strict=True)) < BUCKET
    assert sum(buckets) / sum(chunks) - 1 < 0.003


def halved(module: nn.Module, x_ND, factors_2N):
    x_ND = module(x_ND)
    return x_ND if factors_2N is None else x_ND * factors_2N[1][:, None]


def test_one_graph_for_all_modules_and_numbers_of_rows(graphs):
    modules = [nn.Linear(8, 8) for _ in range(12)]
    function = compilation.by_rows(halved)
    for rows in (256, 384, 512, 2048):
        for module in modules:
            x_ND = torch.randn(rows, 8)
            assert torch.equal(function(module, x_ND, None), module(x_ND))
    assert graphs.count == 1
    for rows in (256, 384, 512):
        function(modules[0], torch.randn(rows, 8), torch.ones(2, rows))
    assert graphs.count == 2


def test_graphs_of_one_function_are_bounded(graphs):
    """Every width is a graph of its own; the bound refuses what would otherwise quietly run without one."""
    assert torch._dynamo.config.recompile_limit <= compilation.GRAPHS
    function = compilation.by_rows(halved)
    for width in range(3, 13):
        function(nn.Linear(width, width), torch.randn(2 * BUCKET, width), None)
    assert graphs.count == 10


def test_modules_with_hooks_in_them_are_not_compiled(caplog):
    block = nn.Sequential(nn.Linear(4, 4))
    assert compilation.compilable([block, block]) and compilation.compilable([])
    block[0].register_forward_pre_hook(lambda module, inputs: None)
    with caplog.at_level("INFO", "tandem.parallel"):
        assert not compilation.compilable([block])
        assert not compilation.compilable([block])
    assert caplog.text.count("parallel.encoder.zero_stage=3") == 1


def test_modes(graphs):
    assert compilation.enabled("cpu")
    compilation.configure("never")
    assert not compilation.enabled("cpu") and not compilation.enabled("cuda")
    compilation.configure("auto")
    assert not compilation.enabled("cpu")
    with pytest.raises(ValueError, match="parallel.compile=sometimes: must be one of auto, always, never"):
        compilation.configure("sometimes")
