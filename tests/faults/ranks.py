"""Training ranks to break: forked ones, a second a start, and real ones under torchrun.

`Ranks` forks the ranks of one start from the server of tests/distributed/world.py, each running `train.loop.run` with
its watchdog, and treats them as torchrun does: they meet at a store of this process; when one fails, the others get
SIGTERM.  `Torchrun` is the real thing.  A fault is a function of tests/faults/harm.py that a rank calls before it
trains.
"""

import contextlib
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from tests.distributed.world import HOST, REPO, _die_with, _import_path, _kill_tree, _rank_environment
from tests.support import corpus_overrides, settings

TINY = [
    "parallel.pp=2",
    "parallel.ep=2",
    "train.seq_length=128",
    "train.global_batch_size=4",
    "data.max_patches=64",
    "data.block_samples=32",
    "train.deterministic=true",
    "optim.lr=1e-3",
    "checkpoint.resume=true",
    "logger.wandb=disabled",
    "logger.peak_tflops=1",
    "watchdog.timeout_s=8",
    "watchdog.patience_s=90",
]
WORLD = 4
LOST_A_PEER_S = 15.0  # for ranks to end by themselves after another one is gone


def tiny(corpus, run_dir, *overrides: str) -> list[str]:
    return ["+recipe=stage1", "scale=toy", *TINY, *corpus_overrides(corpus), f"run.dir={run_dir}", *overrides]


class Ranks:
    """All ranks of one start; `arguments` as launch/pretrain.py takes them."""

    def __init__(self, arguments: list[str], harm: tuple = (), output: Path | None = None):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        self.hung: list[int] = []
        with _import_path():
            forkserver.ensure_running()
            self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
            payload = pickle.dumps((arguments, harm))
            self._pipes, self._processes = [], []
            for rank in range(WORLD):
                here, there = context.Pipe()
                environment = {**os.environ, **_rank_environment(rank, WORLD, self._store.port)}
                environment["TORCHELASTIC_USE_AGENT_STORE"] = "True"
                process = context.Process(target=_main, args=(there, environment, payload, output), daemon=True)
                process.start()
                there.close()
                self._pipes.append(here)
                self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    @property
    def running(self) -> list[int]:
        return [rank for rank, process in enumerate(self._processes) if process.is_alive()]

    def send(self, rank: int, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pids[rank], number)

    def wait(self, timeout: float) -> list[int]:
        """Exit codes, once all have ended; ranks that had to be killed because they hung stand in `hung`."""
        deadline, failed = time.monotonic() + timeout, False
        while self.running and time.monotonic() < deadline:
            wait([self._processes[rank].sentinel for rank in self.running], max(0.0, deadline - time.monotonic()))
            codes = [process.exitcode for process in self._processes]
            if any(code not in (None, 0) for code in codes) and not failed:
                failed, deadline = True, min(deadline, time.monotonic() + LOST_A_PEER_S)
                for rank in self.running:
                    self.send(rank, signal.SIGTERM)
        self.hung = self.running
        self.close()
        return [process.exitcode for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()


def _main(connection, environment, payload: bytes, output: Path | None) -> None:
    threading.Thread(target=_die_with, args=(connection,), daemon=True).start()
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)
    if output is not None:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    arguments, harm = pickle.loads(payload)
    sys.exit(train(arguments, harm))


def train(arguments: list[str], harm: tuple) -> int:
    """What launch/pretrain.py does, after harm[0](*harm[1:]); the exit code."""
    from tandem.train.loop import run
    from tandem.train.reliability.stopping import STOPPED

    if harm:
        harm[0](*harm[1:])
    recipe = arguments[0].partition("=")[2]
    return STOPPED if run(settings(recipe, *arguments[2:])) == "stopped" else 0


class Torchrun:
    """A real torchrun of launch/pretrain.py."""

    def __init__(self, arguments: list[str], *options: str, log: Path):
        self._log = log.open("w")
        self._path = log
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--local-addr={HOST}"]
        command += [f"--nproc-per-node={WORLD}", *options, "launch/pretrain.py", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPO)}
        self._launcher = subprocess.Popen(
            command, cwd=REPO, env=environment, stdout=self._log, stderr=subprocess.STDOUT
        )
        self.pid = self._launcher.pid

    @property
    def output(self) -> str:
        return self._path.read_text()

    @property
    def running(self) -> bool:
        return self._launcher.poll() is None

    def ranks(self) -> list[int]:
        """Process ids by rank; those that are starting too."""
        found = {}
        for child in psutil.Process(self.pid).children():
            with contextlib.suppress(psutil.Error, KeyError):
                found[int(child.environ()["RANK"])] = child.pid
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout: float) -> int:
        return self._launcher.wait(timeout)

    def close(self) -> None:
        if self.running:
            _kill_tree(self.pid)
            self._launcher.wait()
        self._log.close()


def steps_done(run_dir: Path) -> int:
    """Steps that metrics.jsonl knows of."""
    path = run_dir / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines(True) if line.endswith("\n")] if path.is_file() else []
    return json.loads(whole[-1])["step"] + 1 if whole else 0


def until(done, timeout: float, what: str, alive=lambda: True) -> None:
    """Waits for done(); AssertionError if it takes longer or nothing runs any more."""
    deadline = time.monotonic() + timeout
    while not done():
        assert time.monotonic() < deadline, f"{what} took longer than {timeout} s"
        assert alive() or done(), f"ended before {what}"
        time.sleep(0.05)
