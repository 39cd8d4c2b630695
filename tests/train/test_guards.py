"""Which steps are skipped and when a run goes back: plain functions."""

import json
import math
from dataclasses import replace

import pytest

from tandem.train.config.schema import GuardConfig
from tandem.train.reliability.guards import Record, after, deviations, replay_finding, should_roll_back, spike_reason

CONFIG = GuardConfig(window=8, spike_loss=6.0, spike_norm=20.0, consecutive=3, total=5, rollbacks=2, replay=False)
USUAL = Record(losses=(2.0, 2.1, 1.9, 2.05, 1.95), norms=(1.0, 1.3, 0.8, 1.1, 0.9))


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (2.0, 1.0, None),
        (0.1, 0.1, None),  # only upward
        (2.3, 3.0, None),
        (9.0, 1.0, "loss 9 is 94.4 deviations above the median 2"),
        (2.0, 90.0, "gradient norm 90 is 600.3 deviations above the median 1"),
        (math.nan, 1.0, "loss nan"),
        (2.0, math.inf, "gradient norm inf"),
        (math.nan, math.nan, "loss nan"),
    ],
)
def test_verdicts(loss, norm, words):
    assert spike_reason(CONFIG, USUAL, loss, norm) == words


def test_spikes_are_judged_once_half_the_window_is_seen_and_can_be_turned_off():
    early = Record(USUAL.losses[:3], USUAL.norms[:3])
    assert spike_reason(CONFIG, early, 99.0, 99.0) is None
    assert spike_reason(CONFIG, early, math.nan, 99.0) is not None
    assert spike_reason(replace(CONFIG, spike_loss=0.0), USUAL, 99.0, 1.0) is None


def test_values_that_hardly_vary_are_not_judged_finely():
    assert deviations(1.0 + 1e-6, (1.0,) * 8) < 1
    assert deviations(1.0, (0.0,) * 8) > 1e6


def test_the_record_holds_updates_of_the_window_and_survives_json():
    record = Record()
    for step in range(20):
        record = after(CONFIG, record, loss=float(step), grad_norm=1 / (step + 3), applied=step % 5 != 0)
    assert record.losses == (9.0, 11.0, 12.0, 13.0, 14.0, 16.0, 17.0, 18.0, 19.0)[-8:]
    assert record.skipped == tuple(step % 5 == 0 for step in range(12, 20))
    assert Record.of(json.loads(json.dumps(record.state()))) == record


def skipped(*flags: int) -> Record:
    return Record(skipped=tuple(bool(flag) for flag in flags))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (Record(), None),
        (skipped(1, 1), None),
        (skipped(1, 1, 0, 1, 1), None),
        (skipped(0, 1, 1, 1), "3 steps in a row were skipped"),
        (skipped(1, 1, 0, 1, 1, 0, 1, 0), "5 of the last 8 steps were skipped"),
    ],
)
def test_limits(record, words):
    assert should_roll_back(CONFIG, record) == words


def test_a_replay_tells_transient_from_persistent():
    assert replay_finding((math.nan, 1.0), (2.0, 1.0), None).startswith("transient")
    assert replay_finding((math.nan, 1.0), (math.nan, 1.0), "loss nan").endswith("the same")
    assert replay_finding((9.0, 1.0), (8.0, 1.0), "loss 8 is ...").endswith("no better (loss 8 is ...)")
