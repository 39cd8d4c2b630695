"""What happened to a run over all its starts: <run.dir>/history.jsonl, one event a line, appended by rank 0 alone.

    start     began (of the process), attempt, launch (torchrun's name), world, step it goes on from, checkpoint, cause
              (why the attempt before it ended), lost_steps (done before and to do again)
    skipped   step, loss, grad_norm, why, replay (what computing it again said, or null)
    rollback  why, from_step, to_step, data (where the stream went on), lost_steps
    slow      rank, host, phase, ratio          warning   text
    end       status (finished, stopped or failed), step

Effective training time is the time of steps whose result was kept, over the time since the first start; time between a
requested stop and the next start does not count.
"""

import contextlib
import json
import os
import re
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tandem.train.reliability.watchdog import ENDS

FILE = "history.jsonl"
FIRST = "first start"
_OTHERS_DIED = re.compile(r"gloo|NCCL|Connection|ProcessGroup|TCPStore|Broken pipe|DistBackendError|DistNetworkError")


@dataclass(frozen=True)
class Totals:
    """restarts: starts after an end that nobody asked for.  elapsed_s: see above."""

    restarts: int = 0
    causes: tuple[str, ...] = ()
    lost_steps: int = 0
    rollbacks: int = 0
    skipped_steps: int = 0
    elapsed_s: float = 0.0


class History:
    """The events of one run; `append` writes at once."""

    def __init__(self, run_dir: Path):
        self._path = run_dir / FILE
        self.events = read(run_dir)
        if self._path.is_file() and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")  # the line that was being written at a crash is left alone

    def append(self, event: str, **fields) -> dict:
        line = {"event": event, "time": time.time(), **fields}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.events.append(line)
        return line


def read(run_dir: Path) -> list[dict]:
    """All events, oldest first; what is half written is left out."""
    path, events = run_dir / FILE, []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def process_began() -> float:
    """When this process was started, in seconds since 1970."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def last_launch(events: list[dict]) -> str | None:
    """The torchrun that started the last attempt."""
    return next((event["launch"] for event in reversed(events) if event["event"] == "start"), None)


def attempts(events: list[dict]) -> int:
    return sum(event["event"] == "start" for event in events)


def totals(events: list[dict], now: float) -> Totals:
    starts = [event for event in events if event["event"] == "start"]
    if not starts:
        return Totals()
    paused = sum(
        after["began"] - before["time"]
        for before, after in pairwise(events)
        if _is_start(after) and _was_asked_for(before)
    )
    asked = [_was_asked_for(before) for before, after in pairwise(events) if _is_start(after)]
    again = starts[1:]
    return Totals(
        restarts=sum(not it for it in asked),
        causes=tuple(event["cause"] for event, it in zip(again, asked, strict=True) if not it),
        lost_steps=sum(event.get("lost_steps", 0) for event in events),
        rollbacks=sum(event["event"] == "rollback" for event in events),
        skipped_steps=sum(event["event"] == "skipped" for event in events),
        elapsed_s=now - starts[0]["began"] - paused,
    )


def _is_start(event: dict) -> bool:
    return event["event"] == "start"


def _was_asked_for(event: dict) -> bool:
    return event["event"] == "end" and event["status"] in ("finished", "stopped")


def cause_of_start(events: list[dict], ends: list[dict]) -> str:
    """Why the attempt before ended, from the events so far and the words that its ranks and monitors left."""
    if not events:
        return FIRST
    if events[-1]["event"] == "end" and events[-1]["status"] != "failed":
        return {"stopped": "stopped on request"}.get(events[-1]["status"], events[-1]["status"])
    return explain(ends)


def explain(ends: list[dict]) -> str:
    """One sentence about what ended the ranks: the first of them that did not merely lose the others."""

    def weight(end: dict) -> tuple:
        followed = end["why"] == "error" and bool(_OTHERS_DIED.search(end["error"]))
        order = {"stopped": 0, "hung": 1, "error": 1, "killed": 2}[end["why"]]
        return (3 if followed else order, end["time"])

    if not ends:
        return "all ranks ended without a word"
    first = min(ends, key=weight)
    name = f"rank {first['rank']} on {first['host']}"
    where = f"in phase {first['phase']!r} after step {first['step']}"
    if first["why"] == "error":
        return f"{name} failed {where}: {first['error']}"
    if first["why"] == "killed":
        same = sorted(end["rank"] for end in ends if end["why"] == "killed")
        name = f"ranks {', '.join(map(str, same))}" if len(same) > 1 else name
        return f"{name} killed or out of memory {where}"
    return f"{name} {first['why']} for {first['silent_s']} s {where}"


def take_ends(run_dir: Path) -> list[dict]:
    """What ranks and monitors of the attempt before left, and forgets it."""
    ends = []
    for path in sorted((run_dir / ENDS).glob("rank-*.json")):
        try:
            ends.append(json.loads(path.read_text()))
        except ValueError:  # its writer died too
            continue
        finally:
            path.unlink(missing_ok=True)
    return ends
