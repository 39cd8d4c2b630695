"""A few kills of the soak; the whole is `make soak`."""

from tests.faults.soak import Result, forked


def test_killed_at_random_moments_a_run_ends_as_if_nothing_had_happened(corpus, tmp_path):
    result = Result()
    forked(corpus, tmp_path, kills=4, seed=3, result=result, steps=10)
    assert result.kills.total() == 4
    assert (result.unloadable, result.hung, result.samples, result.weights) == (0, 0, 0, 0)
