"""FLOPs by formula against torch's counter on real forward and backward passes of toy models: equal to the last one.

torch's counter multiplies matrices as they are, so attention is run as plain matrix products (the counter does not know
the CPU's fused kernel) and costs the whole square of a segment, causal or not: the formula is asked for n * n pairs a
segment.  In training it is asked for the half that causal attention looks at.  Experts run one after the other, because
rows that pad a batch of experts are multiplied too.
"""

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tandem.data.vision import VisionSpec
from tandem.parallel.kernels import experts
from tandem.train.cost.flops import (
    causal_pairs,
    encoder_flops,
    llm_flops,
    llm_pairs,
    mim_flops,
    peak_of,
    pool_flops,
    step_flops,
    text_flops,
)
from tandem.train.models.connectors.base import Sizes
from tandem.train.models.connectors.mlp import CONNECTOR
from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig, TextEncoder
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.attention_pool import AttentionPool
from tandem.train.models.layers.masking import mask_images
from tandem.train.models.towers.masked import MaskedImages, MimConfig, MimTower
from tandem.train.models.towers.vision_tower import VisionTower
from tandem.train.vision import vision_spec
from tests.support import settings
from tests.train.toys import LLM_KINDS, SWITCHED, packed, packed_for, random_images

LENGTHS = [10, 7, 7, 16]
GRIDS = [[2, 4], [4, 4], [4, 4], [6, 2]]


def counted(run) -> int:
    unknown = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}  # of shapes
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


@pytest.fixture(scope="module")
def encoder():
    return SeedViT(settings("stage1").model.encoder)


@pytest.fixture(scope="module")
def images():
    return np.prod(GRIDS, axis=1), packed(random_images(GRIDS), GRIDS)


def test_encoder_forward(encoder, images):
    _, pixels = images
    assert counted(lambda: encoder(pixels)) == encoder_flops(encoder.config, GRIDS)


def test_windows_and_gates_are_counted():
    """Windows of 4 x 4 patches in one of two blocks, cut off at the borders of images."""
    config = ViTConfig(width=32, depth=2, heads=2, activation="swiglu", window=4, whole_layers=[1], norm="rmsnorm")
    encoder, vision = SeedViT(config), vision_spec(config)
    images = packed_for(vision, GRIDS)
    assert counted(lambda: encoder(images)) == encoder_flops(config, GRIDS)
    assert encoder_flops(config, GRIDS) == vision.cost(GRIDS).sum() + 2 * 52 * 588 * 32


def test_a_class_token_is_counted_and_the_resizing_of_positions_is_not():
    config = ViTConfig(width=32, depth=2, heads=2, positions="learned", position_grid=5, class_token=True)
    encoder, images = SeedViT(config), packed_for(vision_spec(config), GRIDS)
    assert counted(lambda: encoder(images)) == encoder_flops(config, GRIDS) + 2 * 52 * 25 * 32


def test_encoder_training_is_three_forwards_less_the_gradient_of_pixels(encoder, images):
    """Nobody needs the gradient of the pixels; the usual factor of three counts it."""
    patches_I, pixels = images
    of_pixels = 2 * int(patches_I.sum()) * VisionSpec().patch_values * encoder.config.width
    real = counted(lambda: encoder(pixels).sum().backward())
    assert real == 3 * encoder_flops(encoder.config, GRIDS) - of_pixels


def test_balance_costs_are_the_encoder_without_its_patch_embedding(encoder):
    for patches in (4, 100, 16384):
        embedding = 2 * patches * VisionSpec().patch_values * encoder.config.width
        (cost,) = vision_spec(encoder.config).cost([[2, patches // 2]])
        assert cost == encoder_flops(encoder.config, [[2, patches // 2]]) - embedding


def test_adapter_forward():
    config = settings("stage1").model.encoder
    adapter = CONNECTOR.build(Sizes(config.width, 96, merge=2, norm_eps=1e-6), CONNECTOR.read({}))
    flops = vision_spec(config, llm_width=96).connector_flops(13)
    assert counted(lambda: adapter(torch.randn(4 * 13, config.width))) == flops


@pytest.mark.parametrize("reading", ["drop", "token"])
def test_masked_modelling_forward(reading, encoder, images):
    """Its encoder costs what is left of the images where masked patches are dropped, all of their trunk otherwise."""
    (patches_I, pixels), width = images, 24
    mask_N = mask_images(patches_I, 0.75, np.arange(len(patches_I))[:, None])
    visible_I = np.add.reduceat(~mask_N, patches_I.cumsum() - patches_I, dtype=np.int64)
    mim = MimConfig(masked=reading, decoder_width=32, decoder_depth=3, decoder_heads=2)
    tower, masked = MimTower(encoder.config, mim, width), MaskedImages.of(pixels, mask_N)
    of_encoder, of_head = mim_flops(encoder.config, mim, patches_I, visible_I, width)
    assert counted(lambda: tower.predict(masked)) == of_encoder + of_head
    assert (of_encoder == encoder_flops(encoder.config, np.stack([visible_I, np.ones_like(visible_I)], -1))) == (
        reading == "drop"
    )


@pytest.mark.parametrize("out_width", [48, None], ids=["projected", "as wide as the encoder"])
def test_attention_pooling_forward(out_width, encoder, images):
    config, (patches_I, pixels) = encoder.config, images
    out_width = out_width or config.width
    pool, features_ND = AttentionPool(config.width, 4, out_width, config.norm_eps), torch.randn(52, config.width)
    assert counted(lambda: pool(features_ND, pixels.segments)) == pool_flops(config, patches_I, out_width)


def test_text_encoder_forward():
    config = TextConfig(width=48, depth=3, heads=4, vocab_size=90, max_tokens=32)
    texts = PackedTexts.of(np.arange(sum(LENGTHS)), np.array(LENGTHS), torch.device("cpu"))
    assert counted(lambda: TextEncoder(config)(texts)) == text_flops(config, np.array(LENGTHS)).sum()


@pytest.fixture
def llm_run(build_llm, monkeypatch):
    """llm_run(kind) -> (config, callable that runs forward and returns the summed loss)."""
    monkeypatch.setattr(experts, "arrange", lambda rows, weight, counts: experts.Looped(counts.tolist()))

    def prepare(kind, trained=True):
        llm = build_llm(kind)
        llm.chunk.requires_grad_(trained)
        tokens_T = torch.randint(0, llm.config.vocab_size, (sum(LENGTHS),))
        leaf_UD = torch.randn(4, llm.config.width, requires_grad=True)
        return llm.config, lambda: llm.losses(tokens_T, LENGTHS, leaf_UD, torch.arange(4)).sum()

    return prepare


TOKENS = sum(LENGTHS)
FULL_PAIRS = sum(length * length for length in LENGTHS)


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_llm_forward(kind, llm_run):
    """Every token goes to top_k experts, to the shared one and through the router, and no further."""
    config, run = llm_run(kind)
    assert counted(run) == llm_flops(config, TOKENS, config.layers * FULL_PAIRS)


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_llm_training_is_three_forwards(kind, llm_run):
    config, run = llm_run(kind)
    assert counted(lambda: run().backward()) == 3 * llm_flops(config, TOKENS, config.layers * FULL_PAIRS)


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_frozen_llm_is_two_forwards_and_attention_a_third_time(kind, llm_run):
    config, run = llm_run(kind, trained=False)
    attention = llm_flops(config, 0, config.layers * FULL_PAIRS)
    assert counted(lambda: run().backward()) == 2 * llm_flops(config, TOKENS, config.layers * FULL_PAIRS) + attention


@pytest.mark.parametrize(("patch_size", "merge"), [(16, 2), (14, 3)])
def test_other_patches_and_blocks_are_counted(patch_size, merge):
    """FLOPs of a step of two images, from which MFU follows, are those that torch counts."""
    overrides = [f"model.encoder.patch_size={patch_size}", f"model.connector.merge={merge}"]
    config = settings("stage1", *overrides)
    vision, grids = config.vision, np.array([[6, 12], [12, 6]])
    tower = VisionTower(config.model.encoder, config.model.connector, config.model.llm.width)
    patches_NP = np.zeros((144, patch_size**2 * 3), np.uint8)
    images = PackedImages.of(patches_NP, vision.positions(grids), [72, 72], torch.device("cpu"))
    step = step_flops(vision, config.model.llm, [], grids, 128, np.array([128]))
    assert counted(lambda: tower(images)) == step.encoder + step.adapter


def test_step_adds_up_what_each_stage_trains():
    config = settings("stage1")
    vit, llm = config.model.encoder, config.model.llm
    grids_I2, lengths_N = np.array([[4, 4], [8, 8]]), np.array([30, 50])
    forward, attention = (llm_flops(llm, tokens, llm.layers * causal_pairs(lengths_N)) for tokens in (128, 0))

    vision = vision_spec(vit, llm_width=llm.width)

    def step(trainable):
        return step_flops(vision, llm, trainable, grids_I2, 128, lengths_N)

    everything, adapter = step(["encoder", "adapter", "llm"]), step(["adapter"])
    assert (everything.encoder, everything.llm) == (3 * encoder_flops(vit, grids_I2), 3 * forward)
    assert (adapter.encoder, adapter.llm) == (encoder_flops(vit, grids_I2), 2 * forward + attention)
    assert everything.adapter == adapter.adapter == 3 * vision.connector_flops(20)
    assert step(["llm"]).adapter == vision.connector_flops(20) == step(["encoder"]).adapter // 2
    assert adapter.total == adapter.encoder + adapter.adapter + adapter.llm


def test_causal_pairs_are_those_a_causal_mask_leaves():
    lengths_N = [1, 2, 5, 9]
    assert causal_pairs(np.array(lengths_N)) == sum(int(torch.ones(n, n).tril().sum()) for n in lengths_N)
    assert causal_pairs(np.array([131072] * 544)) == 544 * 131072 * 131073 // 2


def test_a_window_leaves_its_own_pairs_in_its_layers():
    lengths_N, window = np.array([1, 4, 9]), 4
    seen = [torch.ones(n, n).tril().triu(1 - window).sum() for n in lengths_N]
    assert causal_pairs(lengths_N, window) == sum(map(int, seen))
    llm = settings("stage1", f"model.llm.window={window}", "model.llm.window_from=1").model.llm
    assert llm_pairs(llm, lengths_N) == causal_pairs(lengths_N) + 3 * causal_pairs(lengths_N, window)


def test_a_full_scale_step_does_not_overflow():
    """The largest images, as many as fill stage 1's batch of 71M tokens, against arithmetic on Python's integers."""
    vit = settings("stage1", "model=seed_vl").model.encoder
    n, d, images = 16384, 1280, 71_303_168 // 4096
    by_hand = images * (27 * (24 * n * d * d + 4 * n * n * d) + 2 * n * VisionSpec().patch_values * d)
    assert encoder_flops(vit, np.full((images, 2), 128)) == by_hand


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H20", 148),
        ("NVIDIA GB200", 2500),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_a_gpus_peak_is_its_own_and_not_that_of_a_longer_name(name, peak):
    assert peak_of(name) == peak
