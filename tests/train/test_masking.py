"""Masks and dropped branches: exact counts, functions of their keys alone, and as random as they claim."""

import numpy as np
import pytest

from tandem.train.models.layers.masking import drop_path_factors, mask_images


def mask_of(patches, ratio, *key):
    return mask_images([patches], ratio, np.array([key]))


@pytest.mark.parametrize(
    ("patches", "ratio", "masked"),
    [(4, 0.75, 3), (6, 0.75, 5), (16, 0.75, 12), (100, 0.6, 60), (4, 0.05, 1), (4, 0.99, 3), (6400, 0.75, 4800)],
)
def test_masked_patches_are_counted_exactly(patches, ratio, masked):
    """Half up; at least one is masked and at least one visible."""
    for key in range(5):
        assert mask_of(patches, ratio, key).sum() == masked
    assert mask_images([patches] * 3, ratio, np.arange(3)[:, None]).sum() == 3 * masked


def test_a_mask_is_a_function_of_its_key():
    """The same beside other images and on every machine; another for any other key, also for swapped integers."""
    keys = np.array([[7, 0, 1], [7, 1, 0], [7, 0, 2], [-1, 2**40, 3]])
    together = np.split(mask_images([16, 24, 16, 8], 0.5, keys), np.cumsum([16, 24, 16]))
    for patches, key, mask in zip((16, 24, 16, 8), keys, together, strict=True):
        assert np.array_equal(mask, mask_of(patches, 0.5, *key))
    masks = {mask_of(64, 0.5, *key).tobytes() for key in ((1, 2), (2, 1), (1, 3), (0, 1, 2), (1, 2, 0))}
    assert len(masks) == 5
    assert np.flatnonzero(mask_of(16, 0.25, 1, 2, 3)).tolist() == [3, 5, 6, 14]


def test_every_patch_is_masked_as_often_as_the_others():
    keys = np.stack(np.meshgrid(np.arange(50), np.arange(80), indexing="ij"), -1).reshape(-1, 2)
    often_N = mask_images([16] * len(keys), 0.75, keys).reshape(-1, 16).mean(0)
    deviation = (0.75 * 0.25 / len(keys)) ** 0.5
    assert np.abs(often_N - 0.75).max() < 4.5 * deviation


def test_branches_are_dropped_at_rates_that_rise_with_depth():
    keys, depth, rate = np.arange(20_000)[:, None], 4, 0.4
    factors_LI = drop_path_factors(depth, rate, keys)
    assert factors_LI.shape == (2 * depth, len(keys)) and factors_LI.dtype == np.float32
    rates = np.repeat(rate * np.arange(1, depth + 1) / depth, 2)
    assert np.abs((factors_LI == 0).mean(1) - rates).max() < 4.5 * 0.5 / len(keys) ** 0.5
    for row, p in zip(factors_LI, rates, strict=True):
        assert set(np.unique(row)) == {np.float32(0), np.float32(1 / (1 - p))}
    assert np.abs(np.corrcoef(factors_LI) - np.eye(2 * depth)).max() < 4.5 / len(keys) ** 0.5


def test_dropped_branches_are_functions_of_the_key():
    keys = np.array([[3, 1], [3, 2], [1, 3]])
    together_LI = drop_path_factors(3, 0.5, keys)
    for image, key in enumerate(keys):
        assert np.array_equal(together_LI[:, image], drop_path_factors(3, 0.5, key[None])[:, 0])
    assert (drop_path_factors(3, 0.0, keys) == 1).all()
