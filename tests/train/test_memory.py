"""The formulas of train/cost/memory.py against what real modules and engines hold, at sizes at which small tensors
matter.

Measured is what lives after a forward: tensors that autograd has saved and those that Python can reach.  A tolerance
of a tenth covers what the formulas leave out (masks, offsets, places); where the CPU's kernels keep more than CUDA's,
the test says so and adds it.
"""

import dataclasses
import gc

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from benchmarks.workloads import language, tower
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.parallel.layout import Layout
from tandem.train.cost.flops import llm_parameters
from tandem.train.cost.memory import (
    FP32,
    activation_bytes,
    encoder_memory,
    encoder_parameters,
    layer_bytes,
    layers_of,
    micro_batches_held,
    stage_memory,
    stage_parameters,
)
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import PackedImages, ViTConfig
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers.vision_tower import VisionTower
from tandem.train.vision import vision_spec
from tests.support import ROOT
from tests.train.toys import packed_for

CPU = torch.device("cpu")
WIDTH = 96  # of the LLM
# Two experts for two choices: the CPU's experts pad to the longest, and here all are equally long.
MOE = LLMConfig(
    layers=2, width=128, heads=4, kv_heads=2, head_width=64, vocab_size=256, ffn_width=0, num_experts=2, top_k=2,
    expert_width=96, shared_expert_width=0, aux_loss=0.0, z_loss=0.0, rope_base=1e4, norm_eps=1e-6, init_std=0.02,
)  # fmt: skip
GIB = 2**30


def recipe() -> tuple[ViTConfig, LLMConfig]:
    models = OmegaConf.load(ROOT / "recipes/model/seed_vl.yaml")
    return ViTConfig(**models.encoder), LLMConfig(**models.llm)


class Live:
    """Bytes of tensors that are alive at the end of a `with` and were not at its begin."""

    def __enter__(self):
        gc.collect()
        self._before, self._saved = set(_storages(_reachable())), []
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x)
        self._hooks.__enter__()
        return self

    def _pack(self, tensor):
        self._saved.append(tensor.detach())
        return tensor

    def __exit__(self, *exc):
        self._hooks.__exit__(*exc)
        gc.collect()
        held = _storages([*_reachable(), *self._saved])
        self.bytes = sum(size for address, size in held.items() if address not in self._before)


def _reachable():
    return [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]


def _storages(tensors) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages if storage.nbytes()}


# ---- encoder ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(width=64, depth=2, heads=4, mlp_ratio=3.0),
        ViTConfig(patch_size=16),
        recipe()[0],
        ViTConfig(width=64, depth=2, heads=4, activation="swiglu", norm="rmsnorm", bias=False, frames=2),
        ViTConfig(width=64, depth=2, heads=4, positions="learned", class_token=True, pre_norm=True, patch_bias=False),
    ],
)
def test_the_encoders_parameters_are_counted(config):
    with torch.device("meta"):
        module = VisionTower(config, ConnectorConfig(), WIDTH)
    counts = [sum(p.numel() for p in part.parameters()) for part in (module.encoder, module.adapter)]
    assert list(encoder_parameters(config, WIDTH)) == counts


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "replay"])
def test_what_the_encoder_keeps(recompute):
    config = ViTConfig(width=128, depth=4, heads=2)
    module = VisionTower(config, ConnectorConfig(), WIDTH, recompute)
    initialize(module, seed=0)
    pack = tower.Pack(np.array([[8, 8]] * 6))  # of one size: the CPU's attention copies what it has of several
    images = pack.images(CPU)
    with Live() as live:
        rows = module(images)
    sizes = dict(chunk_patches=pack.patches, recompute=recompute, zero_stage=1, world=1, element=FP32)
    formula = encoder_memory(config, ConnectorConfig(), WIDTH, chunks=1, **sizes)
    assert live.bytes == pytest.approx(formula.activations + rows.numel() * FP32, rel=0.1)
    assert formula.buffers > sum(x.nbytes for x in (images.patches_NP, images.positions_N2)) + rows.nbytes
    # replay holds one chunk of any number
    twice = encoder_memory(config, ConnectorConfig(), WIDTH, chunks=2, **sizes)
    assert twice.activations == formula.activations * (1 if recompute == "replay" else 2)


@pytest.mark.parametrize(
    "switches",
    [
        {"activation": "swiglu", "norm": "rmsnorm", "window": 4, "whole_layers": [1]},
        {"positions": "learned", "position_grid": 24, "class_token": True, "activation": "quick_gelu"},
    ],
    ids=["gate and windows", "learned positions"],
)
def test_what_switches_keep(switches):
    config = ViTConfig(width=128, depth=4, heads=2, **switches)
    module = VisionTower(config, ConnectorConfig(), WIDTH)
    initialize(module, seed=0)
    images = packed_for(vision_spec(config), [[8, 8]] * 6)
    with Live() as live:
        rows = module(images)
    sizes = dict(chunk_patches=6 * 64, chunks=1, recompute="none", zero_stage=1, world=1, element=FP32)
    formula = encoder_memory(config, ConnectorConfig(), WIDTH, **sizes)
    assert live.bytes == pytest.approx(formula.activations + rows.numel() * FP32, rel=0.1)


@pytest.mark.parametrize(("patch_size", "merge"), [(16, 2), (14, 3)])
def test_other_patches_and_blocks_are_counted(patch_size, merge):
    config, connector = ViTConfig(width=128, depth=4, heads=2, patch_size=patch_size), ConnectorConfig(merge=merge)
    vision, grids = vision_spec(config, connector), np.array([[12, 12]] * 3)
    module = VisionTower(config, connector, WIDTH)
    initialize(module, seed=0)
    patches_NP = np.random.default_rng(0).integers(0, 256, (grids.prod(1).sum(), vision.patch_values), np.uint8)
    images = PackedImages.of(patches_NP, vision.positions(grids), grids.prod(1), CPU)
    with Live() as live:
        rows = module(images)
    assert len(rows) == 3 * 144 // merge**2
    sizes = dict(chunk_patches=len(patches_NP), chunks=1, recompute="none", zero_stage=1, world=1, element=FP32)
    formula = encoder_memory(config, connector, WIDTH, **sizes)
    assert live.bytes == pytest.approx(formula.activations + rows.numel() * FP32, rel=0.1)
    assert formula.buffers >= sum(x.nbytes for x in (images.patches_NP, images.positions_N2)) + rows.nbytes


def test_zero_divides_the_encoders_state_over_the_world():
    config, parameters = recipe()[0], sum(encoder_parameters(recipe()[0], 5120))
    sizes = dict(chunk_patches=32768, chunks=1, recompute="full", element=2)
    one, three = (
        encoder_memory(config, ConnectorConfig(), 5120, zero_stage=stage, world=64, **sizes) for stage in (1, 3)
    )
    assert (one.weights, one.gradients, one.optimizer) == (2 * parameters, 4 * parameters, 12 * parameters // 64)
    assert (three.weights, three.gradients) == (2 * parameters // 64, 4 * parameters // 64)


# ---- LLM -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world():
    with language.World(CPU) as world:
        yield world


LAYOUTS = [
    Layout(world=1),
    Layout(world=8, tp=2, pp=2, ep=2, etp=1),
    Layout(world=16, pp=4, ep=4),
    Layout(world=16, tp=2, cp=2, pp=2, ep=4, etp=2),
]


def test_shares_of_switched_models_are_the_whole():
    """On two stages a tied embedding is twice there; what is not cut over tp is there for each rank."""
    tied = dataclasses.replace(MOE, layers=4, tied_embeddings=True, first_dense_layers=1, ffn_width=64, qkv_bias=True)
    whole = dataclasses.replace(MOE, layers=4, qk_norm=True, qk_norm_whole=True, moe_every=2, ffn_width=64)
    embedding, routers = MOE.vocab_size * MOE.width, MOE.width * MOE.num_experts
    norms = 2 * MOE.width
    for config, twice, sparse in ((tied, embedding, 3), (whole, 0, 2)):
        layout = Layout(world=4, tp=2, pp=2)
        stages = [stage_parameters(config, layout, stage) for stage in range(2)]
        assert [sum(layers_of(config, layout, stage)) for stage in range(2)] == [2, 2]
        copied = config.layers * norms + sparse * routers + MOE.width
        everything = sum(2 * (s.experts + s.others) for s in stages)
        assert everything == llm_parameters(config)[0] + twice + copied


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_shares_of_all_ranks_are_the_whole(layout):
    config = recipe()[1]
    stages = [stage_parameters(config, layout, stage) for stage in range(layout.pp)]
    whole = llm_parameters(config)[0]
    # norms and routers are on all tp ranks
    copied = (layout.tp - 1) * (config.layers * (2 * config.width + config.width * config.num_experts) + config.width)
    assert sum(s.experts * layout.ep * layout.etp + s.others * layout.tp for s in stages) == whole + copied
    memories = [
        stage_memory(config, layout, stage=stage, row_tokens=32768, micro_batches=8, recompute="full", element=2)
        for stage in range(layout.pp)
    ]
    ranks = layout.world // layout.pp
    assert sum(m.optimizer for m in memories) * ranks == pytest.approx(12 * (whole + copied), rel=1e-6)


def test_an_engine_holds_these_weights_gradients_and_moments(world):
    megatron = transformer_config(MOE, world.layout, dtype=torch.bfloat16, recompute="none", deterministic=False)

    def build(vp_stage, first, last):
        chunk = build_chunk(MOE, megatron, vp_stage=vp_stage, first=first, last=last)
        language.draw_weights(chunk, MOE.init_std)
        return chunk

    adam = AdamSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    engine = LLMEngine(megatron, world.grid, build=build, forward=None, loss=None, trainable=True, adam=adam)
    parameters = [parameter for chunk in engine.chunks for parameter in chunk.parameters()]
    sizes = dict(stage=0, row_tokens=256, micro_batches=1, recompute="none", element=2)
    formula = stage_memory(MOE, world.layout, **sizes)
    assert formula.weights == sum(parameter.nbytes for parameter in parameters)
    assert formula.gradients == sum(parameter.main_grad.nbytes for parameter in parameters)
    assert formula.optimizer == sum(chunk.tensor_N.nbytes for chunk in engine.state())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_what_the_layers_keep(world, recompute):
    tokens = 256
    built = language.build_language(MOE, world, torch.float32, tokens, 64, recompute)
    with Live() as live:
        output = built.forward()
    wanted = MOE.layers * layer_bytes(MOE, world.layout, recompute, tokens, FP32, sparse=True)
    wanted += output.nbytes + 2 * tokens * MOE.head_width * FP32  # rotary tables, once for all layers
    # the first layer's input was there before; what leaves the last is counted
    wanted -= built.row.hidden_T1D.nbytes
    if recompute == "none":  # the CPU's RMSNorm keeps its input a second time, normed
        wanted += MOE.layers * 2 * built.row.hidden_T1D.nbytes
    assert live.bytes == pytest.approx(wanted, rel=0.1)


def test_micro_batches_in_flight():
    plain, virtual = Layout(world=4, pp=4), Layout(world=4, pp=4, vpp=2)
    assert [micro_batches_held(plain, stage, 8) for stage in range(4)] == [4, 3, 2, 1]
    assert [micro_batches_held(plain, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    # 11, 9, 7 and 5 parts of half a stage each
    assert [micro_batches_held(virtual, stage, 8) for stage in range(4)] == [5.5, 4.5, 3.5, 2.5]
    assert micro_batches_held(virtual, 0, 4) == 4


def test_longer_rows_more_recomputation_and_more_ranks_cost_what_they_should():
    config = recipe()[1]

    def memory(layout, recompute, row=32768):
        return stage_memory(config, layout, stage=0, row_tokens=row, micro_batches=8, recompute=recompute, element=2)

    layout, wide = (Layout(world=64, pp=8, ep=8, cp=cp) for cp in (1, 2))
    kept = [memory(layout, recompute).activations for recompute in ("none", "selective", "full", "offload")]
    assert kept == sorted(kept, reverse=True)
    assert memory(layout, "full", 65536).activations == 2 * memory(layout, "full").activations
    assert memory(wide, "full").activations == memory(layout, "full").activations / 2
    assert memory(layout, "full").total > memory(layout, "full").weights > 0


def test_bytes_at_the_size_of_the_report():
    """32,076 patches through 27 blocks of 1,280 in bf16, in GiB; an H200 run measured 37 for all, weights included."""
    size = dict(tokens=32076, layers=27, width=1280, heads=20, mlp=5120, element=2)
    gib = {name: activation_bytes(name, **size) / 2**30 for name in ("none", "selective", "full", "offload")}
    assert gib["none"] == pytest.approx(33.2, abs=0.1)
    assert gib["selective"] == pytest.approx(10.4, abs=0.1)
    assert gib["full"] == pytest.approx(2.1, abs=0.1)
    assert gib["offload"] == pytest.approx(0.46, abs=0.02)
