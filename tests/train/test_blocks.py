"""Encoder blocks: compiled with a bounded number of graphs, and what they keep for their backward.

Legend: I images, N patches.
"""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tandem.parallel.kernels import compilation, recompute
from tandem.train.cost.memory import activation_bytes
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.blocks import _lengthened, run_blocks
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import drop_path_factors
from tandem.train.vision import vision_spec
from tests.graphs import CountedGraphs
from tests.train.toys import packed, packed_for, random_images

CONFIG = ViTConfig(width=32, depth=3, heads=2)
KEPT = ("selective", "offload", "full")


@pytest.fixture(scope="module")
def vit():
    vit = SeedViT(CONFIG)
    initialize(vit, seed=0)
    return vit


@pytest.fixture
def graphs():
    """Counts what is compiled; the mode that was is set again."""
    counted = CountedGraphs("eager")
    compilation.configure("always", counted.backend)
    yield counted
    compilation.configure("auto")


def chunk(seed: int, *, drop: bool) -> PackedImages:
    """1 to 20 images of 4 to 196 patches."""
    generator = np.random.default_rng(seed)
    grids = 2 * generator.integers(1, 8, (int(generator.integers(1, 21)), 2))
    images = packed(random_images(grids.tolist(), seed), grids)
    if not drop:
        return images
    keep_LI = drop_path_factors(CONFIG.depth, 0.5, np.arange(len(grids))[:, None])
    return dataclasses.replace(images, keep_LI=torch.from_numpy(keep_LI))


def trained(vit: SeedViT, images: PackedImages, recompute: str):
    """Features and all gradients; every feature has another weight in the loss."""
    vit.zero_grad()
    features_ND = vit(images, recompute)
    weights = torch.linspace(-1, 1, features_ND.numel()).view_as(features_ND)
    (features_ND * weights).sum().backward()
    return [features_ND.detach(), *(parameter.grad for parameter in vit.parameters())]


def test_a_run_compiles_a_handful_of_graphs(vit, graphs):
    """Forty packings of 1 to 20 images, with factors or, as blank chunks, without, trained on and not.

    Three regions, each with autograd and without, those that add branches also with factors and without: ten.
    """
    sizes = set()
    for seed in range(40):
        images = chunk(seed, drop=seed % 4 > 0)
        sizes.add((len(images.patches_NP), len(images.segments.q_lengths_N)))
        if seed % 3:
            vit(images).sum().backward()
        else:
            with torch.no_grad():
                vit(images)
    assert len(sizes) > 30
    assert graphs.count == 10


@pytest.mark.parametrize("kept", ["none", "selective", "offload", "full"])
def test_compiled_blocks_are_the_blocks(vit, configured, kept):
    """What is added to fill a bucket is in no result: 1e-5, as sums over tokens are cut elsewhere and GELU is another
    formula of the same function; a chunk that fills its bucket has nothing added."""
    fills = packed(random_images([(16, 16), (32, 8)]), [(16, 16), (32, 8)])
    keep_LI = torch.tensor([[0.0, 2.0], [2.0, 0.0]]).repeat(CONFIG.depth, 1)
    for images in (chunk(1, drop=True), chunk(2, drop=False), fills, dataclasses.replace(fills, keep_LI=keep_LI)):
        configured("always")
        found = trained(vit, images, kept)
        configured("never")
        wanted = trained(vit, images, "none")
        for mine, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


SWITCHES = {
    "gates and windows": {"norm": "rmsnorm", "activation": "swiglu", "window": 4, "whole_layers": [1], "frames": 2},
    "class token": {"positions": "learned", "class_token": True, "pre_norm": True, "activation": "quick_gelu"},
    "no biases": {"positions": "learned", "interpolation": "antialias", "activation": "gelu", "bias": False},
}


@pytest.mark.parametrize("switches", SWITCHES)
def test_other_blocks_compile_and_are_computed_again(switches, configured):
    """Compiled within 1e-5; whatever is kept for the backward changes no number."""
    config = ViTConfig(width=32, depth=3, heads=2, **SWITCHES[switches])
    vit = SeedViT(config)
    initialize(vit, seed=0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    grids = [[2, 6], [4, 4], [10, 6]]
    keep_LI = torch.from_numpy(drop_path_factors(config.depth, 0.5, np.arange(len(grids))[:, None]))
    images = dataclasses.replace(packed_for(vision_spec(config), grids), keep_LI=keep_LI)
    configured("never")
    wanted = trained(vit, images, "none")
    assert all(gradient.abs().max() > 0 for gradient in wanted[1:])
    for kept in KEPT:
        assert all(torch.equal(mine, other) for mine, other in zip(trained(vit, images, kept), wanted, strict=True))
    configured("always")
    for kept in ("none", "offload"):
        for mine, other in zip(trained(vit, images, kept), wanted, strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5 * max(1.0, other.abs().max().item()))


def test_compiled_blocks_in_bf16_are_near_fp32(vit, configured):
    """Of each tensor at most twice as far as eager code in bf16, whose roundings are others but as many."""
    images, off = chunk(1, drop=True), {}
    configured("never")
    wanted = trained(vit, images, "none")
    for mode in ("never", "always"):
        configured(mode)
        found = trained(copy.deepcopy(vit).bfloat16(), images, "none")
        off[mode] = [(mine.float() - exact).norm() / exact.norm() for mine, exact in zip(found, wanted, strict=True)]
    assert all(mine < 2 * eager + 2**-9 for mine, eager in zip(off["always"], off["never"], strict=True))


def test_filling_a_bucket_asks_no_device(monkeypatch):
    """No number is read back while blocks are filled up and cut: the lengths are known on the host."""
    images = chunk(3, drop=True)
    for name in ("item", "tolist", "cpu", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("reads a device"))
    longer = _lengthened(images.segments, 7)
    monkeypatch.undo()
    assert longer.q_lengths_N == (*images.segments.q_lengths_N, 7)
    assert longer.cu_k_N1.tolist() == [*images.segments.cu_k_N1.tolist(), images.segments.cu_k_N1[-1].item() + 7]
    assert longer.cu_q_N1.dtype == torch.int32


@pytest.mark.parametrize("drop", [True, False])
@pytest.mark.parametrize("kept", KEPT)
def test_what_is_kept_changes_no_number(vit, monkeypatch, kept, drop):
    monkeypatch.setattr(recompute, "LEAST_BYTES", 0)
    images = chunk(4, drop=drop)
    wanted, found = trained(vit, images, "none"), trained(vit, images, kept)
    assert all(torch.equal(mine, other) for mine, other in zip(found, wanted, strict=True))


def bytes_of_blocks(vit: SeedViT, images: PackedImages, kept: str) -> int:
    """Memory of all that the backward of the blocks will ask for, weights and tables left out, and each once."""
    x_ND, tables = vit.embed(images.patches_NP).detach().requires_grad_(), vit.rotary(images.positions_N2)
    left_out = {tensor.untyped_storage().data_ptr() for tensor in (*tables, *vit.parameters())}
    found = {}

    def pack(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out_ND = run_blocks(vit.blocks, x_ND, *tables, images.segments, kept)
    del out_ND
    return sum(storage.nbytes() for address, storage in found.items() if address not in left_out)


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
def test_bytes_kept_are_those_of_the_formula(vit, kept):
    """One image, so that the CPU's kernel copies nothing to bring images of one size together; borders of segments and
    the like are a hundredth of it."""
    images = packed(random_images([(32, 32)]), [(32, 32)])
    size = dict(layers=CONFIG.depth, width=CONFIG.width, heads=CONFIG.heads, mlp=4 * CONFIG.width, element=4)
    wanted = activation_bytes(kept, 1024, **size)
    assert bytes_of_blocks(vit, images, kept) == pytest.approx(wanted, rel=0.01)


def test_offloaded_blocks_keep_nothing_on_the_device(vit, monkeypatch):
    """Every saved tensor of the blocks stands for host memory, or for queries, keys and values to be made again."""
    monkeypatch.setattr(recompute, "LEAST_BYTES", 4096)
    copies, original = [], recompute._Held.__init__

    def counted(self, storage, *others):
        original(self, storage, *others)
        copies.append(storage.nbytes())

    monkeypatch.setattr(recompute._Held, "__init__", counted)
    images = packed(random_images([(32, 32)]), [(32, 32)])
    vit(images, "offload").sum().backward()
    rows = 1024 * CONFIG.width * 4
    lse = 1024 * CONFIG.heads * 4
    assert sorted(copies) == sorted([rows, rows, lse] * CONFIG.depth), "input and what attention made of each block"
