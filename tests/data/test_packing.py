import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.planning.packing import pack_block


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=200), st.integers(0, 20))
def test_packing_fills_rows_and_never_overfills(lengths, carried):
    length_N = np.array(lengths)
    carried = min(carried, int(np.searchsorted(np.cumsum(length_N), 100, side="right")))
    row_N, open_row = pack_block(length_N, carried, 100)
    fill_R = np.bincount(row_N, length_N)
    assert fill_R.max() <= 100 and fill_R.min() > 0
    assert (row_N[:carried] == 0).all()
    if open_row >= 0:
        others = fill_R[1:] if carried and len(fill_R) > 1 else fill_R
        assert fill_R[open_row] == others.min() and (open_row > 0 or not carried or len(fill_R) == 1)
    else:
        assert (fill_R[1:] == 100).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=60))
def test_each_sample_goes_where_it_leaves_least_room(lengths):
    """Replays the rows, longest sample first: none had fitted more tightly elsewhere, none opened a row needlessly."""
    length_N = np.array(lengths)
    row_N, _ = pack_block(length_N, 0, 100)
    rooms = {}
    for sample in np.argsort(-length_N, kind="stable").tolist():
        length, row = lengths[sample], int(row_N[sample])
        fitting = [room for room in rooms.values() if room >= length]
        assert (row in rooms) == bool(fitting)
        if fitting:
            assert rooms[row] == min(fitting)
        rooms[row] = rooms.get(row, 100) - length


def test_a_carried_row_is_emitted_next_however_empty_it_stays():
    row_N, open_row = pack_block(np.array([50, 90, 80]), 1, 100)
    assert row_N.tolist() == [0, 1, 2] and open_row == 2
    row_N, open_row = pack_block(np.array([50, 20]), 1, 100)
    assert row_N.tolist() == [0, 0] and open_row == 0  # alone: stays open


def test_a_block_without_samples():
    row_N, open_row = pack_block(np.zeros(0, np.int64), 0, 100)
    assert len(row_N) == 0 and open_row == -1


@pytest.mark.parametrize("seq_length", [32_768, 131_072])
@pytest.mark.parametrize("median, sigma", [(400, 1.0), (1500, 1.5), (4000, 1.2)])
def test_rows_of_a_log_normal_mix_are_98_percent_full(seq_length, median, sigma):
    rng = np.random.default_rng(seq_length + median)
    carried_N, filled, rows = np.zeros(0, np.int64), 0, 0
    for _ in range(30):
        fresh_N = np.clip(rng.lognormal(np.log(median), sigma, 1024).astype(np.int64), 8, seq_length)
        length_N = np.concatenate([carried_N, fresh_N])
        row_N, open_row = pack_block(length_N, len(carried_N), seq_length)
        carried_N = length_N[row_N == open_row]
        filled += length_N.sum() - carried_N.sum()
        rows += len(np.unique(row_N)) - (open_row >= 0)
    assert filled / (rows * seq_length) >= 0.98
