"""Processes that read and decode for the trainer, into memory that they share with it (data/reading/slots.py).

    trainer: WorkerPool, a thread for each worker     -- job -->      worker: JobRunner
                                                      <-- done --

A worker is a fresh interpreter (never a fork of the trainer and its threads) that ends when the trainer does, however
that happens. Messages are JSON and raw arrays over a socket.
"""

import json
import mmap
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem.data.media.text import Tokenizer
from tandem.data.reading.jobs import Done, Job, JobRunner
from tandem.data.reading.slots import Lease
from tandem.data.vision import VisionSpec

JOB_SECONDS = 1800  # a worker that takes longer over one job counts as dead
IN_FLIGHT = 2  # jobs sent to a worker and not yet answered, so that it need not wait for the trainer's threads
# Of the package: a checkout, or where packages are installed.
ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "tandem.py").is_file())


# ---------------------------------------------------------------------------------------------------------------------
# The trainer's side


@dataclass
class _Task:
    """A job on its way. `lease` keeps its memory from being given to another batch."""

    message: bytes
    name: str
    lease: Lease
    future: Future
    deaths: int = 0


class WorkerPool:
    """Workers and their threads. A dead worker is replaced and its work done once more; after that it is an error."""

    def __init__(self, workers: int, settings: dict):
        self._lock = threading.Lock()
        self._closed = False
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._workers = [_Worker(settings) for _ in range(workers)]
        self._threads = [
            threading.Thread(target=_serve, args=(self._tasks, worker, workers), name="tandem-read", daemon=True)
            for worker in self._workers
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        return [worker.pid for worker in self._workers]

    def submit(self, job: Job, name: str, lease: Lease) -> Future:
        """A future of Done; RuntimeError in it where the job cannot be done. `name` says what the job reads."""
        task = _Task(job.pack(), name, lease, Future())
        with self._lock:
            if self._closed:
                raise RuntimeError("the reader is closed")
            self._tasks.put(task)
        return task.future

    def close(self) -> None:
        """End the workers; work still under way fails."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for worker in self._workers:
            worker.stop()
        while True:
            try:
                task = self._tasks.get_nowait()
            except queue.Empty:
                break
            if task is not None:
                task.future.set_exception(RuntimeError("the reader was closed"))
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


class _Worker:
    """The process behind one thread; `start` makes it, or makes it anew."""

    def __init__(self, settings: dict):
        self._settings = json.dumps(settings | {"parent": os.getpid()}).encode()
        self._lock = threading.Lock()
        self._stopped = False
        self.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Raises RuntimeError after `stop`, OSError where the system has no room for a process."""
        with self._lock:
            if self._stopped:
                raise RuntimeError("the reader was closed")
            self._socket, theirs = socket.socketpair()
            path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)]))
            alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-X", "faulthandler", "-m", __name__, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=os.environ | alone | {"PYTHONPATH": path},
                )
        self.send(self._settings)

    def send(self, message: bytes) -> None:
        """What goes wrong here is told by `receive`."""
        with suppress(OSError):
            _send(self._socket, message)

    def receive(self) -> bytes:
        """The next reply. Raises ConnectionError if the process died, TimeoutError if it hangs."""
        ready, until = select.poll(), time.monotonic() + JOB_SECONDS
        if self._socket.fileno() < 0:
            raise ConnectionError("there is no process")
        ready.register(self._socket, select.POLLIN)
        while not ready.poll(1000):  # a fork of the trainer may hold the other end open, so look at the process as well
            if self._process.poll() is not None:
                raise ConnectionError("the process is gone")
            if time.monotonic() > until:
                raise TimeoutError(f"no answer in {JOB_SECONDS} s")
        return _receive(self._socket)

    def end(self) -> str:
        """Make sure that the process is gone; says how it ended."""
        self._process.kill()
        code = self._process.wait()
        self._socket.close()
        return f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def stop(self) -> None:
        """End the process for good."""
        with self._lock:
            self._stopped = True
            self._process.kill()
            self._process.wait()


def _serve(tasks: queue.SimpleQueue, worker: _Worker, workers: int) -> None:
    """Keep one worker busy until the queue ends. A second job is sent ahead only where every worker has one."""
    flight: deque[_Task] = deque()
    ended = False
    while flight or not ended:
        while not ended and len(flight) < IN_FLIGHT and (not flight or tasks.qsize() >= workers):
            try:
                task = tasks.get(block=not flight)
            except queue.Empty:
                break
            if task is None:
                ended = True
                break
            flight.append(task)
            worker.send(task.message)
        if not flight:
            break
        try:
            reply = worker.receive()
        except OSError as error:
            _revive(worker, flight, error)
            continue
        answer, task = json.loads(reply), flight.popleft()
        if "error" in answer:
            task.future.set_exception(RuntimeError(f"a data worker failed over {task.name}: {answer['error']}"))
        else:
            task.future.set_result(Done(answer["bytes_read"], [tuple(failure) for failure in answer["failures"]]))
        del task  # and with it the lease


def _revive(worker: _Worker, flight: deque[_Task], error: OSError) -> None:
    """Replace a dead worker. The job it was at is done once more; a second death over it is the job's error."""
    how = worker.end()
    if isinstance(error, TimeoutError):
        how = str(error)
    flight[0].deaths += 1
    if flight[0].deaths > 1:
        sentence = f"two data workers died over {flight[0].name} (the last one: {how})"
        flight.popleft().future.set_exception(RuntimeError(sentence))
    try:
        worker.start()
    except (OSError, RuntimeError) as refused:
        sentence = f"a data worker died ({how}) and cannot be replaced: {refused}"
        while flight:
            flight.popleft().future.set_exception(RuntimeError(sentence))
        return
    for task in flight:
        worker.send(task.message)


# ---------------------------------------------------------------------------------------------------------------------
# The worker's side


def main(descriptor: int) -> None:
    """Work until the trainer closes the socket or is gone."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the trainer decides when to stop
        signal.signal(ignored, signal.SIG_IGN)
    link = socket.socket(fileno=descriptor)
    settings = json.loads(_receive(link))
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(link, messages), daemon=True).start()
    threading.Thread(target=_watch, args=(settings["parent"],), daemon=True).start()

    tokenizer = Tokenizer.of(settings["tokenizer"])
    if tokenizer.sha256 != settings["tokenizer_sha256"]:
        raise ValueError(f"data.tokenizer={tokenizer.path} has changed since the run began")
    runner = JobRunner(tokenizer, settings["train_roles"], settings["max_pixels"], VisionSpec(**settings["vision"]))
    memories: dict[int, tuple[int, np.ndarray]] = {}
    while True:
        job = Job.unpack(messages.get())
        try:
            done = runner.run(job, _map(memories, *job.words["slot"]))
            answer = {"bytes_read": done.bytes_read, "failures": done.failures}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        _send(link, json.dumps(answer).encode())


def _listen(link: socket.socket, messages: queue.SimpleQueue) -> None:
    """Take messages off the socket as they come, so that the trainer never waits while sending."""
    try:
        while True:
            messages.put(_receive(link))
    finally:
        os._exit(0)


def _watch(parent: int) -> None:
    """End the process within a second of its parent's end, even where other processes hold the socket open."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(0)


def _map(memories: dict[int, tuple[int, np.ndarray]], number: int, generation: int, path: str, size: int) -> np.ndarray:
    """The memory of a slot; opened once for each memory that the slot has."""
    if number not in memories or memories[number][0] != generation:
        descriptor = os.open(path, os.O_RDWR)
        try:
            memory = mmap.mmap(descriptor, 0)
        finally:
            os.close(descriptor)
        memories[number] = (generation, np.frombuffer(memory, np.uint8))
    return memories[number][1][:size]


# ---------------------------------------------------------------------------------------------------------------------
# Messages: length, then bytes


def _send(link: socket.socket, message: bytes) -> None:
    link.sendall(len(message).to_bytes(8, "little") + message)


def _receive(link: socket.socket) -> bytes:
    return _exactly(link, int.from_bytes(_exactly(link, 8), "little"))


def _exactly(link: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = link.recv_into(view[at:])
        if not count:
            raise ConnectionError("the other side is gone")
        at += count
    return bytes(data)


if __name__ == "__main__":
    main(int(sys.argv[1]))
