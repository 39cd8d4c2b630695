"""Compiled encoder blocks under ZeRO 1 and 2 on two ranks train as those that are not; under ZeRO-3 none is compiled.

Legend: I images.
"""

import numpy as np
import torch

from tandem.data.vision import VisionSpec
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.parallel.kernels import compilation
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import PackedImages, ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import drop_path_factors
from tandem.train.models.towers.vision_tower import VisionTower
from tests.distributed.runs import whole_state
from tests.distributed.world import run_world
from tests.graphs import CountedGraphs

ENCODER = ViTConfig(width=16, depth=2, heads=2, drop_path=0.4)
ADAM = AdamSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
STEPS = 2


def chunk(seed: int) -> PackedImages:
    generator = np.random.default_rng(seed)
    grids_I2 = 2 * generator.integers(1, 10, (int(generator.integers(2, 9)), 2))
    patches_NP = generator.integers(0, 256, (grids_I2.prod(1).sum(), VisionSpec().patch_values), np.uint8)
    keep_LI = drop_path_factors(ENCODER.depth, ENCODER.drop_path, np.arange(len(grids_I2))[:, None])
    return PackedImages.of(patches_NP, VisionSpec().positions(grids_I2), grids_I2.prod(1), torch.device("cpu"), keep_LI)


def engine_of(zero_stage: int, recompute: str) -> tuple[EncoderEngine, VisionTower]:
    tower = VisionTower(ENCODER, ConnectorConfig(), 24, recompute)
    initialize(tower, seed=0)
    parts = dict(tower.named_children())
    return EncoderEngine(tower, parts, zero_stage=zero_stage, precision="fp32", adam=ADAM), tower


def train(zero_stage: int, recompute: str, mode: str):
    """(weights and moments, graphs) after some steps of two chunks, one of them blank on rank 1."""
    graphs, rank = CountedGraphs(), torch.distributed.get_rank()
    compilation.configure(mode, graphs.backend)
    engine, _ = engine_of(zero_stage, recompute)
    for step in range(STEPS):
        blank = PackedImages.blank(VisionSpec(), torch.device("cpu"))
        for images in (chunk(10 * step + rank), blank if rank else chunk(10 * step + 5)):
            output = engine.encode(images)
            engine.backward(output, output.detach() if len(output) > 1 else torch.zeros_like(output))
        engine.squared_grad_norms()
        engine.step(1.0)
    return whole_state(engine), graphs.count


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-12)).item()


def compared(zero_stages):
    """Of each stage, (largest relative difference of a tensor, graphs); and whether blocks compile under ZeRO-3."""
    wanted, _ = train(1, "none", "never")
    found = []
    for zero_stage, recompute in zero_stages:
        weights, graphs = train(zero_stage, recompute, "always")
        found.append((max(relative(weights[name], wanted[name]) for name in wanted), graphs))
    return found, compilation.compilable(engine_of(3, "none")[1].encoder.blocks)


def test_compiled_blocks_train_like_others():
    """Within 1e-4 of a tensor's largest entry: sums over tokens are cut elsewhere, GELU is another formula of the same
    function, ZeRO 2 adds chunks after it has reduced them, and Adam divides by what differs.  Graphs: three regions,
    and on rank 1, whose blank chunks have no factors, the two with branches once more.  ZeRO-3's hooks gather
    weights."""
    for rank, (found, under_zero3) in enumerate(run_world(compared, 2, [(1, "none"), (2, "selective")], timeout=240)):
        differences, graphs = zip(*found, strict=True)
        assert max(differences) < 1e-4
        assert graphs == (3 + 2 * rank, 3 + 2 * rank), "one set for all blocks"
        assert not under_zero3
