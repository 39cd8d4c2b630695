"""Compiled blocks and every way to keep activations, on a CUDA device in bf16, beside the plain ones.

python -m pytest tests/gpu/test_compilation.py
"""

import numpy as np
import pytest
import torch

from tandem.data.vision import VisionSpec
from tandem.parallel.kernels import compilation
from tandem.parallel.kernels.attention import choose
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import drop_path_factors

CUDA = torch.device("cuda", 0)
CONFIG = ViTConfig(width=256, depth=4, heads=4)
CLOSE = 2e-2  # of a tensor's norm: bf16 has 8 bits, and fused code rounds elsewhere


@pytest.fixture(scope="module")
def vit():
    choose("auto", CUDA, torch.bfloat16)
    vit = SeedViT(CONFIG)
    initialize(vit, seed=0)
    return vit.to(CUDA, torch.bfloat16)


@pytest.fixture(autouse=True)
def mode():
    yield
    compilation.configure("auto")


def chunk(images: int = 7, seed: int = 0) -> PackedImages:
    generator = np.random.default_rng(seed)
    grids = 2 * generator.integers(4, 20, (images, 2))
    patches_NP = generator.integers(0, 256, (grids.prod(1).sum(), VisionSpec().patch_values), np.uint8)
    keep_LI = drop_path_factors(CONFIG.depth, 0.3, np.arange(images)[:, None])
    return PackedImages.of(patches_NP, VisionSpec().positions(grids), grids.prod(1), CUDA, keep_LI)


def random_gradient(features_ND: torch.Tensor) -> torch.Tensor:
    """Of features that a norm has made: their mean square has a gradient of rounding alone."""
    generator = torch.Generator(CUDA).manual_seed(1)
    return torch.randn(features_ND.shape, generator=generator, device=CUDA).to(features_ND.dtype)


def trained(vit: SeedViT, images: PackedImages, recompute: str) -> tuple[list[torch.Tensor], int]:
    """Features and gradients, and the bytes that the forward left behind."""
    vit.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    features_ND = vit(images, recompute)
    left = torch.cuda.memory_allocated() - before
    features_ND.backward(random_gradient(features_ND))
    torch.cuda.synchronize()
    return [features_ND.detach(), *(parameter.grad for parameter in vit.parameters())], left


def assert_close(found, wanted):
    for mine, other in zip(found, wanted, strict=True):
        assert (mine.float() - other.float()).norm() <= CLOSE * other.float().norm() + 1e-6


@pytest.mark.parametrize("mode", ["never", "always"])
def test_what_is_kept_changes_memory_and_no_gradient(vit, mode):
    images = chunk()
    compilation.configure("never")
    wanted, _ = trained(vit, images, "none")
    compilation.configure(mode)
    left = {}
    for recompute in ("none", "selective", "full", "offload"):
        trained(vit, images, recompute)  # the first compiles
        found, left[recompute] = trained(vit, images, recompute)
        assert_close(found, wanted)
    assert left["offload"] < left["full"] < left["selective"] < left["none"]


def test_stored_tensors_come_back_whole_while_the_host_runs_ahead(vit):
    """Several forwards before the first backward, as a step has chunks; nothing waits in between."""
    compilation.configure("never")
    chunks = [chunk(5, seed) for seed in range(3)]
    gradients = []
    for recompute in ("selective", "offload"):
        vit.zero_grad()
        outputs = [vit(images, recompute) for images in chunks]
        for output_ND in outputs:
            output_ND.backward(random_gradient(output_ND))
        gradients.append([parameter.grad.clone() for parameter in vit.parameters()])
    assert_close(*gradients)


def test_forward_and_backward_wait_for_nothing(vit):
    images = chunk()
    compilation.configure("auto")
    for recompute in ("none", "selective", "offload"):
        trained(vit, images, recompute)  # compiles, and pins memory
        torch.cuda.set_sync_debug_mode("error")
        try:
            vit(images, recompute).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_a_run_compiles_once_for_all_packings(vit):
    compilation.configure("always")
    graphs = torch._dynamo.utils.counters["stats"]
    trained(vit, chunk(), "none")
    first = graphs["unique_graphs"]
    for seed in range(1, 8):
        trained(vit, chunk(2 + 3 * seed, seed), "none")
    assert graphs["unique_graphs"] == first
