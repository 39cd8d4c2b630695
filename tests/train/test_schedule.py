"""The learning rate at every step of a run."""

import itertools

import pytest

from tandem.train.schedule import learning_rate

LR, MIN_LR = 5.22e-5, 5.22e-6


def rates(warmup_steps, total_steps, schedule="cosine"):
    return [
        learning_rate(step, lr=LR, min_lr=MIN_LR, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule)
        for step in range(total_steps)
    ]


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_warm_up_is_linear_and_ends_at_the_full_rate(schedule):
    warm = rates(10, 100, schedule)[:10]
    assert warm == pytest.approx([LR * (step + 1) / 10 for step in range(10)])
    assert warm[-1] == LR


@pytest.mark.parametrize(("warmup", "total"), [(0, 2), (0, 100), (10, 100), (500, 42075)])
def test_cosine_falls_from_the_full_rate_to_the_minimum(warmup, total):
    falling = rates(warmup, total)[warmup:]
    assert falling[0] == pytest.approx(LR)
    assert falling[-1] == pytest.approx(MIN_LR)
    assert all(later < earlier for earlier, later in itertools.pairwise(falling))


def test_cosine_is_halfway_in_the_middle_of_its_steps():
    falling = rates(10, 111)[10:]
    assert falling[50] == pytest.approx((LR + MIN_LR) / 2)
    assert falling[25] + falling[75] == pytest.approx(LR + MIN_LR)


def test_steps_past_the_end_stay_at_the_minimum():
    past = learning_rate(500, lr=LR, min_lr=MIN_LR, warmup_steps=10, total_steps=100, schedule="cosine")
    assert past == pytest.approx(MIN_LR)


def test_constant_stays_and_needs_no_warm_up():
    assert rates(0, 50, "constant") == [LR] * 50


def test_a_run_shorter_than_its_warm_up_only_rises():
    rising = [
        learning_rate(step, lr=LR, min_lr=MIN_LR, warmup_steps=100, total_steps=20, schedule="cosine")
        for step in range(20)
    ]
    assert rising == sorted(rising) and rising[-1] == pytest.approx(LR / 5)


def test_one_step_is_taken_at_the_full_rate():
    assert rates(0, 1) == [LR]
