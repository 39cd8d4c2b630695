from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.planning.mixture import Mixture

WEIGHTS = st.lists(st.one_of(st.integers(1, 10**6), st.floats(1e-3, 1e3)), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12))
def test_shares_are_exact_within_the_stated_bound_at_any_position(weights, position):
    mixture = Mixture(weights)
    counts = mixture.counts(position)
    assert sum(counts) == position
    for count, weight in zip(counts, mixture.weights, strict=True):
        share = Fraction(weight, mixture.period)
        assert abs(count - position * share) <= Fraction(1, 2) + len(weights) * share / 2
    assert mixture.counts(3 * mixture.period) == [3 * weight for weight in mixture.weights]


@settings(max_examples=60, deadline=None)
@given(WEIGHTS, st.integers(0, 10**12), st.integers(0, 400))
def test_a_block_is_the_sequence_whose_counts_are_counted(weights, first, count):
    mixture = Mixture(weights)
    source_N = mixture.block(first, count)
    assert len(source_N) == count
    counts = np.array(mixture.counts(first), object)
    for slot, source in enumerate(source_N.tolist()):
        if slot % 50 == 0:
            assert counts.tolist() == mixture.counts(first + slot)
        counts[source] += 1
    assert counts.tolist() == mixture.counts(first + count)
    assert np.array_equal(source_N[count // 3 :], mixture.block(first + count // 3, count - count // 3))


def test_weights_are_taken_as_written():
    assert Mixture([0.1, 0.2, 0.7]).weights == [1, 2, 7]
    assert Mixture([0.5, 1, Fraction(3, 2)]).weights == [1, 2, 3]
    assert Mixture([30, 20]).block(0, 10).tolist() == [0, 1, 0, 1, 0, 0, 1, 0, 1, 0]
    assert Mixture([1, 1, 1]).block(0, 6).tolist() == [0, 1, 2, 0, 1, 2]


def test_weights_that_cannot_be_shares():
    for weights in ([], [1, 0], [1, -2]):
        with pytest.raises(ValueError, match="weights above 0"):
            Mixture(weights)
