"""The geometry between a student's patches and a teacher's square of pixels and grid of features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tandem.data.vision import VisionSpec
from tandem.train.models.pretrained import hf_vision
from tests.train.toys import pack_pictures, pictures


def test_pixels_come_back_from_patches():
    raw = pictures([(56, 84), (56, 84)])
    images, _ = pack_pictures(raw)
    pixels_n3HW = hf_vision.pixels_of(images.patches_NP, (4, 6), VisionSpec())
    assert torch.equal(pixels_n3HW, torch.from_numpy(np.stack(raw)).permute(0, 3, 1, 2))


def direct(pixels_n3HW, size):
    return F.interpolate(pixels_n3HW.float(), (size, size), mode="bilinear", align_corners=False, antialias=True)


@pytest.mark.parametrize("height, width", [(28, 8 * 32), (8 * 32, 8 * 32), (56, 56)])
def test_resizing_by_up_to_32_is_antialiasing_alone(height, width):
    pixels_n3HW = torch.from_numpy(np.stack(pictures([(height, width)] * 2))).permute(0, 3, 1, 2)
    assert torch.equal(hf_vision.squared(pixels_n3HW, 8), direct(pixels_n3HW, 8))


@pytest.mark.parametrize("height, width", [(14, 100_002), (9_996, 28), (14, 8 * 32 + 2), (600, 610), (14, 8 * 64)])
def test_strips_are_averaged_before_they_are_resized(height, width):
    """A GPU's block has no room for the antialiasing of more; the CPU's has, and that is what it comes close to.

    Off by at most a run, a 16th of a pixel of the result, which on these pictures is 2 of 255.
    """
    y, x = torch.arange(height)[:, None] / height, torch.arange(width) / width
    smooth_HW = 128 + 60 * torch.sin(5 * x) + 60 * torch.cos(4 * y)
    noise_HW = torch.randint(-8, 8, (height, width), generator=torch.Generator().manual_seed(0))
    pixels_n3HW = (smooth_HW + noise_HW).expand(1, 3, -1, -1)
    found = hf_vision.squared(pixels_n3HW, 8)
    assert found.shape == (1, 3, 8, 8)
    torch.testing.assert_close(found, direct(pixels_n3HW, 8), rtol=0, atol=1)
    torch.testing.assert_close(found.mean(), direct(pixels_n3HW, 8).mean(), rtol=0, atol=0.25)
    constant_n3HW = torch.full((1, 3, height, width), 77, dtype=torch.uint8)
    torch.testing.assert_close(hf_vision.squared(constant_n3HW, 8), torch.full((1, 3, 8, 8), 77.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("grid", [(4, 4), (6, 2), (2, 8), (10, 12)])
def test_grids_span_the_same_picture(grid):
    """A ramp over the picture stays one: at a place's middle stands its height; outside the teacher's outermost
    middles, the outermost value."""
    side = (torch.arange(4) + 0.5) / 4
    ramp_2gg = torch.stack(torch.meshgrid(side, side, indexing="ij"))
    rows_N2 = hf_vision.regridded(ramp_2gg[None], grid, 2)
    middles = (torch.from_numpy(VisionSpec().positions([grid])) + 0.5) / torch.tensor(grid)
    torch.testing.assert_close(rows_N2, middles.clamp(0.125, 0.875), rtol=0, atol=1e-6)
