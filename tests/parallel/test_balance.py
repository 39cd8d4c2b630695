"""The greedy assignment: deterministic, bounded, balanced at the report's scale."""

import numpy as np
import pytest

from tandem.data.vision import VisionSpec
from tandem.parallel.plan.balance import assign_images, cut_in_order, load_max_over_mean


def log_uniform_mix(images, seed=0):
    draw = np.random.default_rng(seed)
    return np.exp(draw.uniform(np.log(196), np.log(6400), images)).astype(np.int64)


def test_at_scale_the_load_is_even():
    patches_I = log_uniform_mix(30_720)
    spec = VisionSpec(width=1280, depth=27, mlp_width=5120)
    costs = spec.cost(np.stack([patches_I, np.ones_like(patches_I)], -1))
    encoding_rank_I = assign_images(costs, 256)
    assert load_max_over_mean(costs, encoding_rank_I, 256) <= 1.02


def test_greedy_by_hand():
    assert assign_images([1, 5, 3, 3], 2).tolist() == [0, 0, 1, 1]
    assert assign_images([2, 2, 2, 2], 3).tolist() == [0, 1, 2, 0]


def test_within_the_known_bound_of_the_optimum():
    draw = np.random.default_rng(1)
    for _ in range(50):
        ranks, costs = int(draw.integers(1, 9)), draw.integers(0, 1000, int(draw.integers(0, 60)))
        load = np.bincount(assign_images(costs, ranks), weights=costs, minlength=ranks)
        least = max(costs.max(initial=0), -(-costs.sum() // ranks))
        assert load.max() <= 4 / 3 * least + costs.max(initial=0)
        assert load.sum() == costs.sum()


def test_costs_past_64_bits_of_a_heap_entry():
    encoding_rank_I = assign_images([2**61, 2**61, 1], 2**10)
    assert encoding_rank_I.tolist() == [0, 1, 2]


def test_no_images_and_bad_input():
    assert assign_images([], 4).size == 0
    assert load_max_over_mean(np.array([]), np.array([], dtype=np.int64), 4) == 1.0
    with pytest.raises(ValueError, match="0 ranks"):
        assign_images([1], 0)
    with pytest.raises(ValueError, match="image 1 has the negative cost -2"):
        assign_images([1, -2], 2)


def test_chunks_hold_what_fits():
    sizes = np.array([10, 20, 70, 40, 60, 5])
    assert [chunk.tolist() for chunk in cut_in_order(np.arange(6), sizes, 60)] == [[0, 1], [2], [3], [4], [5]]
    assert cut_in_order(np.empty(0, np.int64), sizes, 60) == []


def test_a_chunk_may_be_filled_to_the_brim():
    chunks = cut_in_order(np.arange(5), np.array([2, 2, 3, 1, 9]), most=4)
    assert [chunk.tolist() for chunk in chunks] == [[0, 1], [2, 3], [4]]
