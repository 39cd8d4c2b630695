"""A small process beside each rank that notices when the rank no longer gets on, says where, and ends it.

    rank  --beats in shared memory-->  monitor  --silence-->  <run.dir>/stacks/rank-N.txt of every rank, then SIGKILL

A thread could not do it: it stops with its process (SIGSTOP), and waits with it for the interpreter's lock.  The first
monitor whose rank was silent for too long writes <run.dir>/stacks/alarm-N; those of the other ranks, which wait for
that one, see it and write what their ranks were doing too.  torchrun then finds dead ranks and restarts them.

The monitor runs this file alone, without site packages, so that it costs next to nothing.  It ignores the signals that
ask a run to stop and ends when its rank ends.  Whatever ended a rank without a word, its monitor leaves one in
<run.dir>/ends, for the history of the run.
"""

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

STACKS, ENDS = "stacks", "ends"
TRACE_SIGNAL = signal.SIGUSR2
NOT_FOR_MONITORS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT)
TRACE_S = 1.0  # for a rank to write its stacks once it is asked
_STARTING, _RUNNING, _PATIENT, _LEAVING, _GONE = range(5)
_FORMAT = struct.Struct("<dqqq")  # last beat (monotonic clock), mode, step, attempt
_PHASE, _PLACE, _SIZE = slice(32, 96), slice(96, 4096), 4096


class Heartbeat:
    """What a rank tells its monitor: that it gets on, and where it is.  Does nothing visible where none watches."""

    def __init__(self, memory: mmap.mmap | None = None):
        self._memory = memory or mmap.mmap(-1, _SIZE)
        self._mode, self._step, self._attempt = _STARTING, -1, 0
        self.beat("start")

    def beat(self, phase: str) -> None:
        """A phase begins."""
        name = phase.encode()[: _PHASE.stop - _PHASE.start]
        self._memory[_PHASE] = name.ljust(_PHASE.stop - _PHASE.start, b"\0")
        self._tell()

    def place(self, run_dir: Path, attempt: int) -> None:
        """Where to report, once it is known."""
        name = os.fsencode(run_dir.absolute())
        self._memory[_PLACE] = name.ljust(_PLACE.stop - _PLACE.start, b"\0")
        self._attempt = attempt
        self._tell()

    def step_done(self, step: int) -> None:
        """From the first finished step on, silence is measured by the short time."""
        self._mode, self._step = _RUNNING, step
        self._tell()

    @contextlib.contextmanager
    def patient(self, phase: str):
        """For what may take long without a sign, such as writing a checkpoint or an evaluation."""
        before, self._mode = self._mode, _PATIENT
        self.beat(phase)
        yield
        self._mode = before
        self._tell()

    def leave(self, gone: bool) -> None:
        """The rank has said itself how it ended.  gone: there is nothing more to watch."""
        self._mode = _GONE if gone else _LEAVING
        self._tell()

    @property
    def where(self) -> dict:
        phase = self._memory[_PHASE].rstrip(b"\0").decode(errors="replace")
        return {"step": self._step, "phase": phase}

    @property
    def run_dir(self) -> Path | None:
        name = self._memory[_PLACE].rstrip(b"\0")
        return Path(os.fsdecode(name)) if name else None

    def _tell(self) -> None:
        _FORMAT.pack_into(self._memory, 0, time.monotonic(), self._mode, self._step, self._attempt)


@contextlib.contextmanager
def watch(timeout_s: float, patience_s: float):
    """Runs a monitor of this process and gives the Heartbeat to tell it; 0 seconds for none.

    timeout_s: silence that is too long in a step; patience_s: before the first step is done, and where a phase asks for
    patience.  An exception that passes is recorded; then the process has timeout_s to end.
    """
    rank = int(os.environ.get("RANK", "0"))
    if timeout_s <= 0:
        heartbeat, monitor = Heartbeat(), None
    else:
        beats, traces = os.memfd_create("beats"), os.memfd_create("traces", 0)
        os.ftruncate(beats, _SIZE)
        heartbeat = Heartbeat(mmap.mmap(beats, _SIZE))
        faulthandler.register(TRACE_SIGNAL, file=traces, all_threads=True, chain=False)
        world = int(os.environ.get("WORLD_SIZE", "1"))
        said = json.dumps([os.getpid(), rank, world, timeout_s, patience_s, beats, traces])
        command = [sys.executable, "-I", "-S", __file__, said]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, NOT_FOR_MONITORS)  # a mask is inherited, from the start on
        monitor = subprocess.Popen(
            command, pass_fds=(beats, traces), stdin=subprocess.DEVNULL, start_new_session=True, cwd="/"
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(beats)
    try:
        yield heartbeat
    except BaseException as error:
        record_end(heartbeat.run_dir, rank, "error", error=_sentence(error), **heartbeat.where)
        heartbeat.leave(gone=False)
        raise
    heartbeat.leave(gone=True)
    if monitor is not None:
        monitor.kill()
        monitor.wait()
        faulthandler.unregister(TRACE_SIGNAL)
        os.close(traces)


def record_end(run_dir: Path | None, rank: int, why: str, **facts) -> None:
    """Leaves word of how a rank ended, for the history; never an error of its own."""
    if run_dir is None:
        return
    said = {"rank": rank, "host": socket.gethostname(), "time": time.time(), "why": why, **facts}
    with contextlib.suppress(OSError):
        (run_dir / ENDS).mkdir(exist_ok=True)
        (run_dir / ENDS / f"rank-{rank}.json").write_text(json.dumps(said) + "\n")


def _sentence(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())[:2000]


# ---- the monitor ----------------------------------------------------------------------------------------------------


class _Monitor:
    def __init__(self, pid: int, rank: int, world: int, timeout_s: float, patience_s: float, beats: int, traces: int):
        self.pid, self.rank, self.world, self.timeout_s, self.patience_s = pid, rank, world, timeout_s, patience_s
        self.tick = min(0.5, timeout_s / 20)
        self.memory, self.traces = mmap.mmap(beats, _SIZE, prot=mmap.PROT_READ), traces
        self.told: tuple | None = None
        self.silent, self.stopped, self.raised = 0.0, 0.0, False

    def run(self) -> None:
        before = time.monotonic()
        while True:
            time.sleep(self.tick)
            if os.getppid() != self.pid:  # a process whose parent ends gets another one
                return self._rank_is_gone()
            now = time.monotonic()
            self._count(min(now - before, 2 * self.tick + 0.5))  # if this process was held up, so was perhaps its rank
            before = now
            if self._is_too_long():
                self._report(self._raise_alarm())
                return None
            if self.silent > self.timeout_s / 2 and (alarm := self._alarm()).is_file():
                self._report(alarm)
                return None

    def _count(self, seconds: float) -> None:
        self.beat, self.mode, self.step, self.attempt = told = _FORMAT.unpack_from(self.memory, 0)
        self.silent = self.silent + seconds if told == self.told else 0.0
        self.stopped = self.stopped + seconds if self._state() in "Tt" else 0.0
        self.told = told

    def _is_too_long(self) -> bool:
        limit = self.patience_s if self.mode in (_STARTING, _PATIENT) else self.timeout_s
        return self.mode != _GONE and (self.silent > limit or self.stopped > self.timeout_s)

    def _state(self) -> str:
        """One letter of the kernel: R runs, S sleeps, D waits for a device, T is stopped; ? where the rank is gone."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, IndexError):
            return "?"

    def _text(self, where: slice) -> str:
        return os.fsdecode(self.memory[where].rstrip(b"\0"))

    def _run_dir(self) -> Path | None:
        return Path(self._text(_PLACE)) if self._text(_PLACE) else None

    def _alarm(self) -> Path:
        return (self._run_dir() or Path("/nowhere")) / STACKS / f"alarm-{self.attempt}"

    def _raise_alarm(self) -> Path:
        alarm = self._alarm()
        with contextlib.suppress(OSError):
            alarm.parent.mkdir(exist_ok=True)
            with alarm.open("x") as file:
                file.write(f"rank {self.rank}\n")
            self.raised = True
        return alarm

    def _report(self, alarm: Path) -> None:
        """Writes where the rank is, gives the other monitors time for the same, and ends it."""
        state = self._state()
        facts = {"step": self.step, "phase": self._text(_PHASE), "silent_s": round(self.silent, 1), "state": state}
        how = " It was stopped by a signal." if state in "Tt" else ""
        head = (
            f"rank {self.rank}, process {self.pid} on {socket.gethostname()}: silent for {self.silent:.1f} s in phase "
            f"{facts['phase']!r} after step {self.step}; process state {state}.{how}\n\n"
        )
        text = head + self._traces(state)
        print(f"watchdog: {head.strip()} Its stacks: {alarm.parent}", file=sys.stderr, flush=True)
        if self._run_dir() is None:
            print(text, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            alarm.parent.mkdir(exist_ok=True)
            (alarm.parent / f"rank-{self.rank}.txt").write_text(text)
        record_end(self._run_dir(), self.rank, "stopped" if state in "Tt" else "hung", **facts)
        self._wait_for_others(alarm)
        self._send(signal.SIGKILL)

    def _wait_for_others(self, alarm: Path) -> None:
        """Until all ranks have written their stacks, or cannot be expected to: a dead rank ends the others at once."""
        over, deadline = alarm.with_suffix(".over"), time.monotonic() + min(30.0, self.timeout_s)
        while time.monotonic() < deadline and not over.exists():
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                since = alarm.stat().st_mtime
                written = [path for path in alarm.parent.glob("rank-*.txt") if path.stat().st_mtime >= since]
                if self.raised and len(written) >= self.world:
                    break
        with contextlib.suppress(OSError):
            over.touch()

    def _traces(self, state: str) -> str:
        """What faulthandler writes in the rank; a stopped one goes on for as long as that takes."""
        self._send(TRACE_SIGNAL)
        if state in "Tt":
            self._send(signal.SIGCONT)
        deadline = time.monotonic() + TRACE_S
        size = 0
        while time.monotonic() < deadline:
            time.sleep(0.1)
            before, size = size, os.fstat(self.traces).st_size
            if size and size == before:
                break
        if state in "Tt":
            self._send(signal.SIGSTOP)
        return os.pread(self.traces, size, 0).decode(errors="replace") or "It did not answer with its stacks.\n"

    def _send(self, number: int) -> None:
        if os.getppid() == self.pid:  # never a stranger who got the number
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def _rank_is_gone(self) -> None:
        _, mode, step, _ = _FORMAT.unpack_from(self.memory, 0)
        if mode not in (_LEAVING, _GONE):
            record_end(self._run_dir(), self.rank, "killed", step=step, phase=self._text(_PHASE))


if __name__ == "__main__":
    _Monitor(*json.loads(sys.argv[1])).run()
