"""Real gloo worlds for tests: `run_world(fn, 4, ...)` runs `fn` on 4 processes and returns what each rank returned.

Ranks are forked from a server that has torch, Megatron-core and DeepSpeed in memory (`preload.py`), so a world of four
starts in about a second.  They meet at a store that this process holds on a port the kernel chose.  The first rank that
raises ends the world with its traceback; a timeout names the ranks that had not returned; nothing outlives the call,
not even when the test process itself is killed.  `run_torchrun` is the slow, real launcher for end-to-end tests.
"""

import contextlib
import datetime
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

REPO = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"
EXIT_GRACE_S = 20.0  # for ranks that have returned and only have to leave the process group


def run_world(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Runs `fn(*args)` on `world_size` gloo ranks and returns their results, by rank.

    `fn` is a top-level function of an importable module; arguments and results travel by plain pickle (tensors by
    value).  Inside, the default process group is initialised, RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
    MASTER_PORT are set, and torch runs on one thread.

    Raises RuntimeError with the traceback of the first rank that fails, TimeoutError naming the ranks still running.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with _import_path(), contextlib.ExitStack() as cleanup:
        multiprocessing.forkserver.ensure_running()
        store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        payload = pickle.dumps((fn, args))
        ranks: dict[Connection, int] = {}
        processes = []
        cleanup.callback(_end, processes)
        for rank in range(world_size):
            here, there = context.Pipe()
            cleanup.callback(here.close)
            environment = {**os.environ, **_rank_environment(rank, world_size, store.port)}
            process = context.Process(target=_rank_main, args=(there, environment, payload, timeout), daemon=True)
            process.start()
            there.close()
            processes.append(process)
            ranks[here] = rank
        results = _collect(ranks, processes, timeout)
        for process in processes:
            process.join(EXIT_GRACE_S)
        return results


def run_torchrun(
    nproc: int,
    args: Sequence[str],
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    cwd: str | Path = REPO,
) -> subprocess.CompletedProcess:
    """Runs `torchrun --nproc-per-node nproc *args` from the repository root, or `cwd`, on a free port.

    `env` is added to this process's environment.  Returns the completed process, its output as text, whatever its exit
    status; raises TimeoutError with the output so far, after ending the launcher and every process below it.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--local-addr={HOST}"]
    command += [f"--nproc-per-node={nproc}", *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(env or {})}
    launcher = subprocess.Popen(
        command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        stdout, stderr = launcher.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _kill_tree(launcher.pid)
        stdout, stderr = launcher.communicate()
        message = f"{' '.join(args)} on {nproc} ranks did not end within {timeout} s"
        raise TimeoutError(f"{message}\n{stdout[-4000:]}\n{stderr[-4000:]}") from None
    finally:
        if launcher.poll() is None:
            _kill_tree(launcher.pid)
            launcher.wait()
    return subprocess.CompletedProcess(command, launcher.returncode, stdout, stderr)


def _collect(ranks: Mapping[Connection, int], processes: Sequence, timeout: float) -> list[Any]:
    """Waits for one message a rank: ("result", value) or ("error", traceback)."""
    deadline = time.monotonic() + timeout
    waiting, results = dict(ranks), {}
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            running = ", ".join(str(rank) for rank in sorted(waiting.values()))
            raise TimeoutError(f"after {timeout} s these ranks of {len(ranks)} had not returned: {running}")
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                kind, value = pickle.loads(connection.recv_bytes())
            except EOFError:
                processes[rank].join(EXIT_GRACE_S)
                kind, value = "error", f"the process died, exit code {processes[rank].exitcode}"
            if kind == "error":
                raise RuntimeError(f"rank {rank} of {len(ranks)} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(connection: Connection, environment: Mapping[str, str], payload: bytes, timeout: float) -> None:
    """The body of one rank."""
    with contextlib.suppress(PermissionError):
        os.setpgid(0, 0)  # so that `_end` reaches what this rank starts, such as loader workers
    threading.Thread(target=_die_with, args=(connection,), daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(0.95 * timeout)  # a hang shows where, just before it is ended
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    try:
        store = dist.TCPStore(HOST, int(environment["MASTER_PORT"]), is_master=False)
        patience = datetime.timedelta(seconds=2 * timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=patience)
        fn, args = pickle.loads(payload)
        message = pickle.dumps(("result", fn(*args)))
    except BaseException:
        connection.send_bytes(pickle.dumps(("error", traceback.format_exc())))
        raise SystemExit(1) from None
    connection.send_bytes(message)
    dist.barrier()  # no rank closes its sockets while another still reads from them
    dist.destroy_process_group()


def _die_with(connection: Connection) -> None:
    """Ends this rank and its children when the test process is gone: nothing is ever sent this way but the end."""
    with contextlib.suppress(EOFError, OSError):
        connection.poll(None)
    os.killpg(os.getpgid(0), signal.SIGKILL)


def _end(processes: Sequence) -> None:
    for process in processes:
        if process.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.is_alive():
            process.kill()
        process.join()


def _kill_tree(pid: int) -> None:
    """torchrun starts its workers in sessions of their own, so one signal to a process group does not reach them."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        for process in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def _rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }


@contextlib.contextmanager
def _import_path():
    """The fork server resolves its preloads by PYTHONPATH alone, and skips silently what it does not find."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
