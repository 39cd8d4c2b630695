"""Experts spread over ranks: the same layer as in one process, and the same weights in every kernel's checkpoint.

Legend: T tokens of the whole batch, D width.
"""

import functools

import pytest
import torch
import torch.distributed as dist
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.spec_utils import build_module

from tandem.parallel.engines.llm_shards import initialize, shards_of
from tandem.parallel.grid import build_grid
from tandem.parallel.kernels.experts import moe_spec
from tandem.parallel.layout import Layout
from tandem.train.checkpoints import checkpoint
from tandem.train.models.language import llm_spec
from tests.distributed.test_checkpoints import SMALL, differences_after_loading
from tests.distributed.test_checkpoints import run as train
from tests.distributed.world import run_world
from tests.parallel.test_experts import D, config_of
from tests.support import corpus_overrides

TOKENS = 64
LAYOUTS = {
    "ep2": dict(world=2, ep=2),
    "tp2.etp2": dict(world=2, tp=2, etp=2),
    "tp2.ep2": dict(world=2, tp=2, ep=2),
    "tp2.ep2.etp2": dict(world=4, tp=2, ep=2, etp=2),
}


class Chunk(torch.nn.Module):
    """A layer at its place in a model, so that its weights have their names."""

    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.decoder.layers[0].mlp = layer
        self.decoder.layers[0].layer_number = 1


def layer_step(sizes, dtype):
    """This rank's part of output and input gradient, [T of this rank, D], and of each weight's (pieces, gradient).

    Ranks hold equal parts of the batch, in their order: tokens are cut over tp, and over the replicas.
    """
    layout = Layout(**sizes)
    build_grid(layout, torch.device("cpu"), seed=0)
    config = config_of(layout, dtype, top_k=3)[1]
    layer = build_module(moe_spec(config), config=config)
    layer.set_layer_number(1)
    chunk = Chunk(config, layer)
    initialize(chunk, 0, 0.3, 1)
    draw = torch.Generator().manual_seed(0)
    mine = slice(*(TOKENS * (dist.get_rank() + end) // layout.world for end in (0, 1)))
    x_T1D, gradient_T1D = (torch.randn(TOKENS, 1, D, generator=draw).to(dtype)[mine] for _ in range(2))
    x_T1D.requires_grad_()
    output_T1D, _ = layer(x_T1D)
    output_T1D.backward(gradient_T1D)
    gradients = {}
    for shard in shards_of(chunk):
        gradient = shard.parameter.grad
        gradients[shard.name] = (shard.pieces, gradient if shard.entry is None else gradient[shard.entry])
    return output_T1D.detach()[:, 0], x_T1D.grad[:, 0], gradients


@functools.cache
def reference(dtype):
    return run_world(layer_step, 1, dict(world=1), dtype)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layer_is_that_of_one_process(layout):
    """Ranks that share an expert's weights (none here but for the router's) hold parts of their gradient."""
    dtype = torch.float64
    ranks = run_world(layer_step, LAYOUTS[layout]["world"], LAYOUTS[layout], dtype)
    output_TD, gradient_TD, gradients = reference(dtype)
    # routing weights are fp32 whatever the dtype, and so are sums over etp
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks]), output_TD, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks]), gradient_TD, rtol=1e-5, atol=1e-5)
    for name, (_, whole) in gradients.items():
        total = torch.zeros_like(whole)
        for _, _, theirs in ranks:
            for piece in theirs[name][0] if name in theirs else ():
                piece.of_global(total).add_(piece.of_local(theirs[name][1]))
        torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def sequential_spec(config):
    return get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=config.num_moe_experts)


def load_into_sequential(overrides, path):
    llm_spec.moe_spec = sequential_spec
    return differences_after_loading(overrides, path)


def test_checkpoints_do_not_know_the_kernels(corpus, tmp_path):
    """Ours under tp2.ep2.etp2, whose optimizer cuts through experts, becomes SequentialMLP to the bit, moments too."""
    train(corpus, tmp_path, "tp2.ep2.etp2", "train.steps=1", "optim.schedule=constant", "optim.warmup_steps=0")
    overrides = [*SMALL, *corpus_overrides(corpus)]
    ((wrong, all_there, steps),) = run_world(load_into_sequential, 1, overrides, checkpoint.resolve(tmp_path))
    assert wrong == [] and all_there and steps == (1, 1)
