"""The monitor of a rank, with a rank that does nothing but beat, or not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support import ROOT

TIMEOUT_S = 0.6
LONG_S = 10 * TIMEOUT_S  # for anything that should happen soon
RANK = """
import contextlib, signal, sys, time
from pathlib import Path
from tandem.train.reliability.watchdog import watch

def ready():
    print("ready", flush=True)

with watch({timeout}, {patience}) as heartbeat:
    heartbeat.place(Path({run_dir!r}), 0)
    {body}
print("end", flush=True)
"""


@pytest.fixture
def rank(tmp_path):
    """rank(body) -> process that runs `body` under a watchdog; killed with the test."""
    started = []

    def start(body, number=0, world=1, patience=60.0):
        script = RANK.format(timeout=TIMEOUT_S, patience=patience, run_dir=str(tmp_path), body=body)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(number), "WORLD_SIZE": str(world)}
        process = subprocess.Popen(
            [sys.executable, "-S", "-c", script], env=environment, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def ready(process) -> psutil.Process:
    """Waits for the line; returns the monitor."""
    assert process.stdout.readline() == "ready\n"
    (monitor,) = psutil.Process(process.pid).children()
    return monitor


def end(folder: Path, rank: int = 0) -> dict:
    return json.loads((folder / f"ends/rank-{rank}.json").read_text())


def stacks(folder: Path, rank: int = 0) -> str:
    return (folder / f"stacks/rank-{rank}.txt").read_text()


RUNNING = 'heartbeat.step_done(7); heartbeat.beat("llm"); ready(); '


def test_silence_in_a_step_is_told_with_the_stacks_and_ended(rank, tmp_path):
    process = rank(RUNNING + "time.sleep(60)")
    assert process.wait(LONG_S) == -signal.SIGKILL
    assert "in phase 'llm' after step 7; process state S" in stacks(tmp_path)
    assert 'File "<string>", line 11 in <module>' in stacks(tmp_path)
    said = end(tmp_path)
    assert (said["why"], said["phase"], said["step"]) == ("hung", "llm", 7)
    assert said["silent_s"] >= TIMEOUT_S


@pytest.mark.parametrize("phase", ["step", "save"])
def test_a_stopped_process_is_noticed_whatever_it_does(rank, tmp_path, phase):
    body = RUNNING + "time.sleep(60)" if phase == "step" else "ready(); time.sleep(60)"
    process = rank(body)
    ready(process)
    process.send_signal(signal.SIGSTOP)
    assert process.wait(LONG_S) == -signal.SIGKILL
    assert "process state T. It was stopped by a signal." in stacks(tmp_path)
    assert "most recent call first" in stacks(tmp_path)
    assert end(tmp_path)["why"] == "stopped"


def test_every_rank_leaves_its_stacks_when_one_is_silent(rank, tmp_path):
    """The others wait for it and are silent too, if for less long; they are given the time."""
    late = f"time.sleep({0.6 * TIMEOUT_S}); " + RUNNING + "time.sleep(60)"
    both = [rank(RUNNING + "time.sleep(60)", 0, 2), rank(late, 1, 2)]
    assert [process.wait(LONG_S) for process in both] == [-signal.SIGKILL] * 2
    for number in range(2):
        assert f"rank {number}, process {both[number].pid}" in stacks(tmp_path, number)


PATIENT = {
    "before the first step": "ready(); time.sleep({long})",
    "while a checkpoint is written": RUNNING + 'p = heartbeat.patient("save"); p.__enter__(); time.sleep({long})',
    "with beats": RUNNING + "[(time.sleep({long} / 40), heartbeat.beat('x')) for _ in range(40)]",
}


@pytest.mark.parametrize("body", PATIENT.values(), ids=PATIENT)
def test_no_alarm(rank, tmp_path, body):
    process = rank(body.format(long=3 * TIMEOUT_S))
    monitor = ready(process)
    assert process.wait(2 * LONG_S) == 0
    assert not (tmp_path / "stacks").exists()
    assert not (tmp_path / "ends").exists()
    assert not monitor.is_running()


def test_patience_ends_too(rank, tmp_path):
    process = rank("ready(); time.sleep(60)", patience=TIMEOUT_S)
    assert process.wait(LONG_S) == -signal.SIGKILL
    assert end(tmp_path)["phase"] == "start"


def test_a_killed_rank_leaves_word_and_no_monitor(rank, tmp_path):
    process = rank(RUNNING + "time.sleep(60)")
    monitor = ready(process)
    process.kill()
    monitor.wait(LONG_S)
    said = end(tmp_path)
    assert (said["why"], said["step"], said["phase"]) == ("killed", 7, "llm")
    assert not (tmp_path / "stacks").exists()


def test_an_exception_is_left_as_word_and_the_process_may_not_linger(rank, tmp_path):
    """A thread that keeps the interpreter from ending, as a library's may."""
    body = RUNNING + "import threading; threading.Thread(target=time.sleep, args=(60,)).start(); [][0]"
    process = rank(body)
    ready(process)
    assert process.wait(LONG_S) == -signal.SIGKILL
    assert end(tmp_path)["why"] == "hung"
    body = RUNNING + "[][0]"
    assert rank(body).wait(LONG_S) == 1
    assert end(tmp_path)["error"] == "IndexError: list index out of range"


def test_signals_that_ask_a_run_to_stop_do_not_stop_the_monitor(rank, tmp_path):
    process = rank(RUNNING + "time.sleep(60)")
    monitor = ready(process)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        monitor.send_signal(number)
    assert process.wait(LONG_S) == -signal.SIGKILL
    assert end(tmp_path)["why"] == "hung"


LAUNCHED = """
import os, signal, subprocess, sys, time
os.environ["TORCHELASTIC_RUN_ID"] = "job"
rank = subprocess.Popen([sys.executable, "-S", "-c", sys.argv[1]])
time.sleep(60)
"""
FOLLOWING = """
import time
from tandem.train.reliability.stopping import follow_launcher, stop_wish
assert follow_launcher()
with stop_wish() as stop:
    print("ready", flush=True)
    print("stopped" if stop.wait(30) else "alone", flush=True)
"""


def test_ranks_are_asked_to_stop_when_their_launcher_dies():
    """As torchrun does of SIGUSR1 where it is not told to pass it on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-S", "-c", LAUNCHED, FOLLOWING]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout.readline() == "ready\n"
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.stdout.readline() == "stopped\n"
    assert launcher.returncode == -signal.SIGUSR1
