"""Four ranks that train, and what goes wrong with them: each case ends as docs/reliability.md says, in time."""

import json
import os
import signal
import time

import pytest

from tandem.train.reliability import history
from tandem.train.reliability.stopping import STOPPED
from tests.faults import harm
from tests.faults.ranks import WORLD, Ranks, Torchrun, steps_done, tiny, until
from tests.support import read_metrics

TIMEOUT_S = 6  # of the watchdog
SILENT_S = (
    TIMEOUT_S + 25
)  # until a hung start is over: silence, stacks, the pause for the other monitors, slow machines


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def start(corpus, run_dir, tmp_path):
    """start(*overrides, harm=()) -> Ranks of this run; they end with the test."""
    started = []

    def begin(*overrides, harm=()):
        watchdog = f"watchdog.timeout_s={TIMEOUT_S}"
        ranks = Ranks(tiny(corpus, run_dir, watchdog, *overrides), harm, tmp_path / "output.txt")
        started.append(ranks)
        return ranks

    yield begin
    for ranks in started:
        ranks.close()


def events(run_dir, name):
    return [event for event in history.read(run_dir) if event["event"] == name]


def summary(run_dir):
    return json.loads((run_dir / "summary.json").read_text())


def step(run_dir, ranks, count):
    until(lambda: steps_done(run_dir) >= count, 90, f"step {count}", alive=lambda: len(ranks.running) == WORLD)


def test_a_signal_to_one_rank_stops_all_after_the_same_step(start, run_dir):
    for number, rank in ((signal.SIGTERM, 2), (signal.SIGUSR1, 1)):
        ranks, before = start("train.steps=100000"), steps_done(run_dir)
        step(run_dir, ranks, before + 2)
        ranks.send(rank, number)
        assert ranks.wait(30) == [STOPPED] * WORLD
        done = steps_done(run_dir)
        assert (summary(run_dir)["status"], summary(run_dir)["last"]["step"]) == ("stopped", done - 1)
        assert (run_dir / f"checkpoints/step-{done:08d}/manifest.json").is_file()
    assert [event["cause"] for event in events(run_dir, "start")] == [history.FIRST, "stopped on request"]
    assert summary(run_dir)["restarts"] == summary(run_dir)["lost_steps"] == 0


def test_a_value_that_is_not_finite_skips_the_step_on_all_ranks(start, run_dir):
    """In one rank's encoder gradient, once; in one rank's LLM gradient, and again when the step is computed again."""
    encoder, llm = (harm.nan_gradient, 1, "encoder", [2]), (harm.nan_gradient, 3, "llm", [5, 6])
    ranks = start("train.steps=7", "guard.replay=true", harm=(harm.several, encoder, llm))
    assert ranks.wait(90) == [0] * WORLD
    assert [line["applied"] for line in read_metrics(run_dir)] == [True, True, False, True, False, True, True]
    transient, persistent = events(run_dir, "skipped")
    assert (transient["step"], persistent["step"]) == (2, 4)
    assert transient["why"] == "gradient norm nan"
    assert transient["replay"].startswith("transient")
    assert persistent["replay"].startswith("persistent")
    assert summary(run_dir)["skipped_steps"] == 2
    assert all(line["loss"] is not None for line in read_metrics(run_dir))


def test_a_slow_rank_is_named(start, run_dir):
    ranks = start("train.steps=4", "health.every=2", harm=(harm.slow, 2, 0.5))
    assert ranks.wait(90) == [0] * WORLD
    worst = events(run_dir, "slow")[0]
    assert (worst["rank"], worst["phase"]) == (2, "encode")
    assert worst["ratio"] > 2


def test_too_many_skipped_steps_go_back_and_leave_out_the_data(start, run_dir, tmp_path):
    """A crash after the rollback does not bring the data back."""
    notes = tmp_path / "samples.jsonl"
    note, spoil = (harm.note_samples, str(notes)), (harm.nan_gradient, 3, "llm", [3, 4])
    limits = ("train.steps=6", "checkpoint.every=2", "guard.consecutive=2")
    ranks = start(*limits, harm=(harm.several, note, spoil, (harm.fail, 1, 6)))
    assert 0 not in ranks.wait(90)
    assert start(*limits, harm=note).wait(90) == [0] * WORLD
    (rollback,) = events(run_dir, "rollback")
    assert (rollback["from_step"], rollback["to_step"]) == (5, 4)
    taken = [json.loads(line) for line in notes.read_text().splitlines()]
    assert [line["step"] for line in taken] == [0, 1, 2, 3, 4, 4, 4, 5]
    left_out, again, after_the_crash = (line["samples"] for line in taken[4:7])
    assert left_out != again
    assert again == after_the_crash
    assert [line["step"] for line in read_metrics(run_dir)] == list(range(6))
    assert summary(run_dir)["rollbacks"] == 1


def test_a_fault_without_a_checkpoint_to_go_back_to_ends_the_run(start, run_dir, tmp_path):
    ranks = start("train.steps=9", "guard.consecutive=2", harm=(harm.nan_gradient, 2, "encoder", list(range(9))))
    assert ranks.wait(90) == [1] * WORLD
    assert "there is no checkpoint to go back to" in (tmp_path / "output.txt").read_text()
    assert summary(run_dir)["status"] == "failed"


def test_an_exception_in_one_rank_ends_all_and_is_the_cause(start, run_dir):
    ranks = start("train.steps=5", "checkpoint.every=2", harm=(harm.fail, 3, 3))
    codes = ranks.wait(90)
    assert 0 not in codes
    assert ranks.hung == []
    assert start("train.steps=5").wait(90) == [0] * WORLD
    _, again = events(run_dir, "start")
    assert again["cause"].startswith("rank 3 on ")
    assert again["cause"].endswith("in phase 'encode' after step 3: RuntimeError: injected")
    assert (again["step"], again["lost_steps"]) == (2, 1)
    assert summary(run_dir)["restarts"] == 1


def test_a_killed_data_worker_changes_nothing(start, run_dir, tmp_path):
    """Another takes its place and does its work again."""
    losses = []
    for harms in ((), (harm.signal_worker, 2, 3, signal.SIGKILL)):
        run = run_dir / str(len(losses))
        assert start("train.steps=6", "data.workers=1", f"run.dir={run}", harm=harms).wait(90) == [0] * WORLD
        losses.append([line["loss"] for line in read_metrics(run)])
        assert json.loads((run / "summary.json").read_text())["unreadable"] == []
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_a_data_worker_that_hangs_is_found(start, run_dir):
    ranks = start("train.steps=100000", "data.workers=1", harm=(harm.signal_worker, 1, 4, signal.SIGSTOP))
    assert 0 not in ranks.wait(90)
    assert_stacks(run_dir)
    assert start("train.steps=5", "checkpoint.resume=true").wait(90) == [0] * WORLD


def assert_stacks(run_dir):
    """Of every rank."""
    for rank in range(WORLD):
        text = (run_dir / f"stacks/rank-{rank}.txt").read_text()
        assert f"rank {rank}, process" in text
        assert "most recent call first" in text, text


def test_a_stopped_rank_is_found_and_ended(start, run_dir):
    ranks = start("train.steps=100000", "checkpoint.every=2")
    step(run_dir, ranks, 3)
    ranks.send(2, signal.SIGSTOP)
    begin = time.monotonic()
    codes = ranks.wait(SILENT_S)
    assert (codes[2], ranks.hung) == (-signal.SIGKILL, [])
    assert TIMEOUT_S <= time.monotonic() - begin <= SILENT_S
    assert_stacks(run_dir)
    assert "process state T. It was stopped by a signal." in (run_dir / "stacks/rank-2.txt").read_text()
    cause = history.explain(history.take_ends(run_dir))
    assert cause.startswith("rank 2 on ")
    assert " stopped for " in cause


@pytest.mark.parametrize("fault", [harm.hang, harm.hang_prefetcher], ids=["collective", "prefetcher"])
def test_a_rank_that_hangs_is_found_and_its_stacks_say_where(start, run_dir, fault):
    ranks = start("train.steps=100000", harm=(fault, 1, 6))
    step(run_dir, ranks, 2)
    begin = time.monotonic()
    codes = ranks.wait(SILENT_S + 30)
    assert (codes[1], ranks.hung) == (-signal.SIGKILL, [])
    assert time.monotonic() - begin <= SILENT_S + 30
    assert_stacks(run_dir)
    assert "harmed" in (run_dir / "stacks/rank-1.txt").read_text()
    assert "hung for" in history.explain(history.take_ends(run_dir))


RECOVERY_S = 40  # from SIGKILL to the next step, on two cores that have nothing else to do


def test_torchrun_restarts_a_crash_and_not_a_requested_stop(corpus, run_dir, tmp_path):
    arguments = tiny(corpus, run_dir, "train.steps=100000", "checkpoint.every=2", "checkpoint.resume=false")
    job = Torchrun(arguments, "--max-restarts=3", log=tmp_path / "log")
    try:
        until(lambda: steps_done(run_dir) >= 4, 120, "step 4", alive=lambda: job.running)
        os.kill(job.ranks()[2], signal.SIGKILL)
        begin = time.monotonic()
        until(lambda: len(events(run_dir, "start")) == 2, 2 * RECOVERY_S, "the restart", alive=lambda: job.running)
        resumed = events(run_dir, "start")[1]["step"]
        until(lambda: steps_done(run_dir) > resumed, 2 * RECOVERY_S, "recovery", alive=lambda: job.running)
        print(f"from SIGKILL to the next step: {time.monotonic() - begin:.1f} s")
        os.kill(job.ranks()[1], signal.SIGUSR1)
        assert job.wait(60) != 0
    finally:
        job.close()
    starts = events(run_dir, "start")
    assert len(starts) == 2
    assert starts[1]["cause"].startswith("rank 2 on ")
    assert starts[1]["step"] > 0
    assert summary(run_dir)["status"] == "stopped"
    assert summary(run_dir)["restarts"] == 1
