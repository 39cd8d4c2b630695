"""Processes that benchmarks start: ranks under torchrun, and one fresh process per measurement.

torchrun starts this file itself, with the function to call:

    torchrun --nproc-per-node 4 benchmarks/processes.py FILE benchmarks.hybrid_step step_of_ranks docs
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Protocol

ROOT = Path(__file__).resolve().parents[1]


class InRanks(Protocol):
    """Calls `module.function(*arguments)` on every rank of a new gloo world and returns rank 0's value."""

    def __call__(self, ranks: int, module: str, function: str, *arguments: str) -> dict: ...


def in_ranks(ranks: int, module: str, function: str, *arguments: str) -> dict:
    """An `InRanks` with torchrun; the value travels as JSON.  Raises RuntimeError with the ranks' messages."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "value.json"
        command = torchrun(ranks, "benchmarks/processes.py", str(path), module, function, *arguments)
        done = subprocess.run(command, cwd=ROOT, env=one_thread(), stderr=subprocess.PIPE, text=True)
        if done.returncode:
            raise RuntimeError(f"{module}.{function} failed:\n{done.stderr[-6000:]}")
        return json.loads(path.read_text())


def call(module: str, function: str, *arguments: str) -> dict:
    return getattr(importlib.import_module(module), function)(*arguments)


def torchrun(ranks: int, *arguments: str) -> list[str]:
    """Command line of `ranks` ranks on this machine."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return launcher + list(arguments)


def one_thread() -> dict[str, str]:
    """Environment of processes that use one core each and print no warnings."""
    quiet = {"PYTHONWARNINGS": "ignore", "KINETO_LOG_LEVEL": "99"}  # torch's profiler announces itself otherwise
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **quiet}


def alone(*arguments: str) -> dict:
    """The JSON in the last line that a Python program prints, run with these arguments in a process of its own."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=one_thread())
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """One rank."""
    sys.path.insert(0, str(ROOT))  # before this folder, whose data.py is not the package
    import torch.distributed as dist

    out, *what = sys.argv[1:]
    dist.init_process_group("gloo")
    value = call(*what)
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(value))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
if __name__ == "__mp_main__":  # a process that a rank starts, such as Megatron-core's for saving
    sys.path.insert(0, str(ROOT))
    import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
