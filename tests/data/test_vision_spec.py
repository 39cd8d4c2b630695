"""Geometry and cost of vision: properties that hold for any patch size, block and limit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.vision import VisionSpec, changed


@st.composite
def specs(draw):
    merge = draw(st.integers(1, 4))
    most = draw(st.integers(merge**2, 4000))
    least = draw(st.integers(1, most))
    return VisionSpec(least, most, patch_size=draw(st.integers(1, 20)), merge=merge)


@settings(max_examples=200, deadline=None)
@given(specs(), st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=8))
def test_views_are_whole_blocks_within_the_limit(spec, sizes):
    height_I, width_I = np.array(sizes).T
    grid_I2 = spec.views(height_I, width_I)
    assert (grid_I2 >= spec.merge).all() and (grid_I2 % spec.merge == 0).all()
    assert (grid_I2.prod(1) <= spec.max_patches).all()
    assert (spec.tokens(grid_I2) == grid_I2.prod(1) // spec.merge**2).all()
    assert (spec.tokens(grid_I2) <= spec.most_tokens).all()
    assert (spec.patches_of(spec.tokens(grid_I2)) == grid_I2.prod(1)).all()


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(1, 3), st.integers(1, 3))
def test_patches_lie_block_by_block(spec, down, across):
    """Cutting and putting together are inverse; the patch at (y, x) is that of the picture."""
    grid = (down * spec.merge, across * spec.merge)
    pixels_HW3 = np.random.default_rng(0).integers(0, 256, (*spec.pixels_hw(grid), 3), np.uint8)
    patches_NP = spec.cut(pixels_HW3)
    assert patches_NP.shape == (grid[0] * grid[1], spec.patch_values)
    assert np.array_equal(spec.to_pixels(patches_NP, grid), pixels_HW3)
    positions_N2, side = spec.positions([grid]), spec.patch_size
    for patch, (y, x) in zip(patches_NP, positions_N2, strict=True):
        there = pixels_HW3[y * side : (y + 1) * side, x * side : (x + 1) * side]
        assert np.array_equal(patch, there.ravel())
    blocks_N2 = positions_N2 // spec.merge
    assert (blocks_N2.reshape(-1, spec.merge**2, 2) == blocks_N2[:: spec.merge**2, None]).all()


def test_sizes_by_hand():
    """560 x 280 pixels: 40 x 20 patches of 14 in 2x2 blocks, 36 x 18 of 16 in 2x2, 39 x 21 of 14 in 3x3."""
    for spec, grid, tokens in (
        (VisionSpec(), [40, 20], 200),
        (VisionSpec(patch_size=16), [36, 18], 162),
        (VisionSpec(merge=3), [39, 21], 91),
    ):
        assert spec.views(560, 280).tolist() == grid and spec.tokens(np.array(grid)) == tokens


def test_costs_by_hand():
    """Two blocks of width 8 and MLP 24 over 6 patches: 6 (8 64 + 4 8 24) + 4 36 8 operations each."""
    spec = VisionSpec(width=8, depth=2, mlp_width=24, token_flops=130, patch_size=16)
    assert spec.cost(np.array([[2, 3]])).tolist() == [2 * (6 * (8 * 64 + 4 * 8 * 24) + 4 * 36 * 8)]
    assert spec.encoder_flops([[2, 3]]).tolist() == [int(spec.cost(np.array([[2, 3]]))[0]) + 2 * 6 * 768 * 8]
    assert spec.connector_flops(7) == 7 * 130


def test_windows_by_hand():
    """3 x 5 patches in windows of 2 x 2: rows of 2 and 1 patches, columns of 2, 2 and 1."""
    spec = VisionSpec(merge=1, width=8, depth=3, mlp_width=24, mlp_matrices=3, window=2, whole_layers=1)
    order_N, patches_W = spec.windows([(3, 5), (2, 2)])
    assert patches_W.tolist() == [4, 4, 2, 2, 2, 1, 4]
    assert order_N.tolist() == [0, 1, 5, 6, 2, 3, 7, 8, 4, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    pairs = 15**2 + 2 * sum(n * n for n in patches_W[:-1])
    assert spec.cost(np.array([[3, 5]])).tolist() == [3 * 15 * (8 * 64 + 6 * 8 * 24) + 4 * pairs * 8]
    assert VisionSpec(width=8, depth=2, mlp_width=24, class_tokens=1).cost(np.array([[2, 3]])) == [
        2 * (7 * (8 * 64 + 4 * 8 * 24) + 4 * 49 * 8)
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"patch_size": 0}, "model.encoder.patch_size=0"),
        ({"merge": 0}, "model.connector.merge=0"),
        ({"merge": True}, "model.connector.merge=True"),
        ({"mean": (0.5, 0.5)}, r"model.encoder.image_mean=\[0.5, 0.5\]: must be 3 finite numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "model.encoder.image_std=.* must be above 0"),
        ({"mean": (0.5, float("nan"), 0.5)}, "model.encoder.image_mean"),
        ({"max_patches": 3}, "data.max_patches is 3"),
        ({"min_patches": 9, "max_patches": 8}, "data.min_patches is 9, above data.max_patches, 8"),
    ],
)
def test_values_that_cannot_be_are_refused(values, words):
    with pytest.raises(ValueError, match=words):
        VisionSpec(**values)


def test_what_changed_is_named():
    said = changed(VisionSpec().identity, VisionSpec(merge=3, std=(0.2, 0.5, 0.5)).identity)
    assert (
        said
        == "model.connector.merge was 2 and is 3, model.encoder.image_std was [0.5, 0.5, 0.5] and is [0.2, 0.5, 0.5]"
    )
