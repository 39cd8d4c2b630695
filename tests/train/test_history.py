"""Book-keeping over starts: causes, lost steps and the time that counts."""

import json

import pytest

from tandem.train.reliability import history
from tandem.train.reliability.health import slow_ranks
from tandem.train.reliability.history import History, cause_of_start, explain, read, take_ends, totals


def start(began, step=0, cause="", lost=0, launch="a"):
    return {"event": "start", "began": began, "time": began + 10, "step": step, "cause": cause, "lost_steps": lost}


def end(time, status):
    return {"event": "end", "time": time, "status": status, "step": 9}


def test_totals_count_what_nobody_asked_for():
    events = [
        start(100),
        {"event": "skipped", "time": 150},
        start(200, cause="rank 3 killed", lost=4),
        {"event": "rollback", "time": 220, "lost_steps": 7},
        end(300, "stopped"),
        start(1000, cause="stopped on request"),
        end(1100, "failed"),
        start(1150, cause="rank 0 failed"),
    ]
    found = totals(events, now=1250)
    assert (found.restarts, found.causes) == (2, ("rank 3 killed", "rank 0 failed"))
    assert (found.lost_steps, found.rollbacks, found.skipped_steps) == (11, 1, 1)
    assert found.elapsed_s == (300 - 100) + (1250 - 1000)


def word(rank, why, time, **facts):
    return {"rank": rank, "host": f"n{rank}", "why": why, "time": time, "step": 5, "phase": "llm", **facts}


PEER = "RuntimeError: [gloo/transport/tcp/pair.cc:553] Connection closed by peer"


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ([], "all ranks ended without a word"),
        ([word(0, "error", 1, error=PEER), word(2, "killed", 2)], "rank 2 on n2 killed or out of memory in phase"),
        ([word(0, "killed", 1), word(2, "killed", 2)], "ranks 0, 2 killed or out of memory in phase"),
        (
            [word(1, "error", 3, error="KeyError: 3"), word(2, "killed", 4), word(0, "error", 2, error=PEER)],
            "rank 1 on n1 failed in phase 'llm' after step 5: KeyError: 3",
        ),
        ([word(0, "hung", 1, silent_s=9), word(1, "stopped", 2, silent_s=8)], "rank 1 on n1 stopped for 8 s in phase"),
        ([word(3, "hung", 2, silent_s=9), word(1, "hung", 1, silent_s=8)], "rank 1 on n1 hung for 8 s in phase"),
        ([word(0, "error", 1, error=PEER)], "rank 0 on n0 failed in phase"),
    ],
)
def test_the_first_rank_that_did_not_merely_lose_the_others_is_the_cause(ends, words):
    assert explain(ends).startswith(words)


def test_causes_of_a_start():
    assert cause_of_start([], []) == history.FIRST
    assert cause_of_start([start(1), end(2, "stopped")], []) == "stopped on request"
    assert cause_of_start([start(1), end(2, "failed")], [word(0, "error", 1, error="E")]).startswith(
        "rank 0 on n0 failed"
    )


def test_a_crash_while_a_line_is_written_loses_that_line_alone(tmp_path):
    History(tmp_path).append("start", step=0)
    with (tmp_path / history.FILE).open("a") as file:
        file.write('{"event": "en')
    History(tmp_path).append("start", step=4)
    assert [(event["event"], event["step"]) for event in read(tmp_path)] == [("start", 0), ("start", 4)]


def test_what_ranks_leave_is_taken_once(tmp_path):
    (tmp_path / "ends").mkdir()
    (tmp_path / "ends/rank-1.json").write_text(json.dumps(word(1, "killed", 1)))
    (tmp_path / "ends/rank-2.json").write_text("{")
    assert [said["rank"] for said in take_ends(tmp_path)] == [1]
    assert take_ends(tmp_path) == []


def test_slow_ranks_are_those_that_work_longer_and_not_those_that_wait():
    """Rank 2 encodes for long; the others wait for it in the LLM's phase."""
    seconds = [{"encode": 1.0, "llm": 5.0} for _ in range(8)]
    seconds[2] = {"encode": 3.0, "llm": 3.0}
    (slow,) = slow_ranks(seconds, [f"n{rank // 4}" for rank in range(8)], factor=1.5)
    assert (slow.rank, slow.host, slow.phase, slow.ratio) == (2, "n0", "encode", 3.0)


def test_many_that_wait_are_not_slow():
    """Three of eight wait long in the LLM's phase: more than a quarter is no exception."""
    seconds = [{"encode": 1.0, "llm": 5.0 if rank < 3 else 3.0} for rank in range(8)]
    assert slow_ranks(seconds, ["n"] * 8, factor=1.5) == []
    assert len(slow_ranks(seconds[2:], ["n"] * 6, factor=1.5)) == 1


def test_short_delays_and_small_worlds_are_not_reported():
    assert slow_ranks([{"a": 1.0, "b": 0.01}] * 3 + [{"a": 1.0, "b": 0.05}], ["n"] * 4, 1.5) == []
    assert slow_ranks([{"a": 1.0}, {"a": 9.0}], ["n"] * 2, 1.5) == []
