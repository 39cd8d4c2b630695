"""The language model's kernels on a CUDA device in bf16: torch against Transformer Engine, and cross-entropy's memory.

python -m pytest tests/gpu/test_spec.py
"""

import dataclasses
import importlib.util

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from benchmarks.workloads.language import World
from tandem.parallel.comm.context import pack_row
from tandem.parallel.engines import llm_shards
from tandem.parallel.engines.llm_shards import shards_of
from tandem.parallel.kernels import compilation
from tandem.parallel.kernels.cross_entropy import linear_cross_entropy, peak_bytes
from tandem.parallel.kernels.fusion import rms_norm
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tandem.train.models.layers.rotary import axis_angles, tables, turn
from tests.support import settings
from tests.train.toys import LLM_KINDS

CUDA = torch.device("cuda", 0)
LENGTHS = [300, 20, 192]
GIB = 2**30


@pytest.fixture(scope="module")
def world():
    with World(CUDA) as world:
        yield world


@pytest.fixture(autouse=True)
def compiled_as_ever():
    yield
    compilation.configure("auto")


def trained_once(world, kind: str, kernels: str):
    """(losses [T], gradients by global name) of a small model of `kind` in bf16."""
    config = dataclasses.replace(
        settings("stage1").model.llm, **LLM_KINDS[kind], width=256, heads=8, kv_heads=2, head_width=64, expert_width=128
    )
    megatron = transformer_config(
        config, world.layout, dtype=torch.bfloat16, recompute="none", deterministic=False, kernels=kernels
    )
    chunk = build_chunk(config, megatron, vp_stage=None, first=True, last=True).to(CUDA, torch.bfloat16)
    llm_shards.initialize(chunk, 0, config.init_std, config.layers)
    row = pack_row(LENGTHS, np.concatenate([np.arange(length) for length in LENGTHS]), world.layout, 0, CUDA)
    tokens_1T = torch.arange(sum(LENGTHS), device=CUDA)[None] * 7 % config.vocab_size
    visual = torch.zeros(0, config.width, device=CUDA), torch.zeros(0, dtype=torch.long, device=CUDA)
    losses_T = chunk(tokens_1T, (tokens_1T + 3) % config.vocab_size, row, *visual)[0]
    losses_T.sum().backward()
    gradients = {
        shard.name: shard.parameter.grad if shard.entry is None else shard.parameter.grad[shard.entry]
        for shard in shards_of(chunk)
    }
    return losses_T.detach(), gradients


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="no Transformer Engine")
@pytest.mark.parametrize("kind", LLM_KINDS)
def test_torch_and_transformer_engine_agree(kind, world):
    """bf16 keeps 8 bits, and four layers round differently: 1% of the loss, 5% of a gradient's norm.

    A token at the border between two experts may go to either: single experts are compared together.
    """
    (losses_T, ours), (other_T, theirs) = (trained_once(world, kind, kernels) for kernels in ("torch", "te"))
    assert abs(losses_T.mean() - other_T.mean()) <= 1e-2 * other_T.mean()
    assert ours.keys() == theirs.keys()
    parts = {name.partition(".local_experts.")[0] for name in ours}
    for part in parts:
        norms = [
            torch.stack([g.float().norm() for name, g in found.items() if name.startswith(part)]).norm()
            for found in (ours, theirs)
        ]
        assert norms[0].item() == pytest.approx(norms[1].item(), rel=5e-2), part


def test_cross_entropy_of_a_full_size_row_takes_less_than_one_and_a_half_gib():
    """32,768 tokens, 155,136 words: all gradients included, and no more than the formula."""
    tokens, width, words = 32768, 2048, 155136
    hidden_SD = torch.randn(tokens, width, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(words, width, device=CUDA, dtype=torch.bfloat16).mul_(0.02).requires_grad_()
    labels_S = torch.randint(words, (tokens,), device=CUDA)
    for mode in ("never", "auto"):
        compilation.configure(mode)
        for _ in range(2):  # once to compile and to let libraries take their workspaces
            hidden_SD.grad = weight_VD.grad = None
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            linear_cross_entropy(hidden_SD, weight_VD, labels_S, None).mean().backward()
            extra = torch.cuda.max_memory_allocated() - before
        assert extra <= min(1.5 * GIB, 1.02 * peak_bytes(tokens, width, words, 2)), mode


@pytest.mark.parametrize("tile", [2**26, 2**16])
@pytest.mark.parametrize("mode", ["never", "auto"])
def test_cross_entropy_is_the_plain_one(mode, tile):
    """Against fp64: loss within the rounding of bf16 logits of size 3, gradients within 2^-7 of their norm."""
    compilation.configure(mode)
    hidden_SD = torch.randn(500, 256, device=CUDA, dtype=torch.bfloat16).requires_grad_()
    weight_VD = torch.randn(4000, 256, device=CUDA, dtype=torch.bfloat16).mul_(0.1).requires_grad_()
    labels_S = torch.randint(4000, (500,), device=CUDA)
    exact = [x.detach().double().requires_grad_() for x in (hidden_SD, weight_VD)]
    exact_S = F.cross_entropy(exact[0] @ exact[1].T, labels_S, reduction="none")
    losses_S = linear_cross_entropy(hidden_SD, weight_VD, labels_S, None, tile=tile)
    grad_S = torch.rand(500, device=CUDA)
    torch.testing.assert_close(losses_S.double(), exact_S, rtol=0, atol=3e-2)
    ours = torch.autograd.grad(losses_S, (hidden_SD, weight_VD), grad_S)
    for mine, true in zip(ours, torch.autograd.grad(exact_S, exact, grad_S.double()), strict=True):
        assert (mine.double() - true).norm() <= 2**-7 * true.norm()


def test_fused_regions_are_what_they_are_on_the_cpu():
    x_THK = torch.randn(64, 4, 32, dtype=torch.bfloat16)
    cos_sin = tables(axis_angles(torch.arange(64), 32, 1e4))
    on_device = turn(x_THK.to(CUDA), *(x.to(CUDA) for x in cos_sin))
    torch.testing.assert_close(on_device.cpu(), turn(x_THK, *cos_sin), rtol=2**-7, atol=2**-7)
    weight_K = torch.randn(32, dtype=torch.bfloat16)
    normed = rms_norm(x_THK.to(CUDA), weight_K.to(CUDA), 1e-6)
    torch.testing.assert_close(normed.cpu(), rms_norm(x_THK, weight_K, 1e-6), rtol=2**-6, atol=2**-6)
