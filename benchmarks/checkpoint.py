"""What a checkpoint costs the training loop on this machine, and how fast bytes are summed, written and verified.

    python benchmarks/checkpoint.py            # four gloo ranks, about two minutes on two cores

Peers in the same run, the same tensors of the same ranks: torch's distributed checkpoint (DCP), synchronous and
asynchronous, and Megatron-core's dist_checkpointing.  Rounds go around the four and no save at all.  For each: how long
the loop waits for the call, and how much longer the steps after it take while a thread writes.  Floor: copying the same
bytes from memory to memory.
"""

import argparse
import functools
import hashlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.hybrid_step import LAYOUT, RANKS, ROOT, one_thread, settings, skewed_step, torchrun

ROUNDS = 7
STEPS = 3  # timed after each save
INTERVAL = 500  # checkpoint.every at full scale
NONE, OURS, SYNC, ASYNC, MEGATRON = "no save", "tandem", "DCP", "DCP async", "Megatron"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where to write; a temporary folder if not given")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        checksums()
        command = torchrun("benchmarks/checkpoint.py", "--worker", "--folder", folder)
        subprocess.run(command, cwd=ROOT, check=True, env=one_thread())


def checksums(megabytes: int = 256) -> None:
    """Rates of one core; a checksum must not be slower than the disk."""
    data = bytes(megabytes << 20)
    rates = {}
    for name, function in (("crc32", zlib.crc32), ("sha256", hashlib.sha256), ("blake2b", hashlib.blake2b)):
        begin = time.perf_counter()
        function(data)
        rates[name] = len(data) / 1e9 / (time.perf_counter() - begin)
    print("one core sums  " + "   ".join(f"{name} {rate:.2f} GB/s" for name, rate in rates.items()))


def worker(folder: Path) -> None:
    """One rank: rounds of a save and the steps after it, for every way of saving in turn."""
    import torch
    import torch.distributed as dist

    from parallel.hybrid_step import hybrid_step
    from parallel.phases import PhaseTimer
    from train.build import build_engines, start_world, train_forward, train_loss
    from train.rows import step_input

    warnings.simplefilter("ignore")
    config, device = settings(), torch.device("cpu")
    start_world(device)
    layout = config.check(dist.get_world_size())
    engines = build_engines(
        config, layout, device, forward=train_forward, loss=functools.partial(train_loss, domains=1)
    )
    batch, timer = step_input(skewed_step(config, engines.grid, True), engines.grid), PhaseTimer(device)
    ways, chunks = ways_to_save(engines, folder)

    def step() -> float:
        begin = time.perf_counter()
        hybrid_step(engines, batch, report_shape=(2, 1), clip_norm=1.0, replay=False, stop=False, timer=timer)
        return time.perf_counter() - begin

    waited, after = {name: [] for name in ways}, {name: [] for name in ways}
    for turn in range(ROUNDS + 1):
        for name, (save, wait) in ways.items():
            dist.barrier()
            begin = time.perf_counter()
            save(turn)
            seconds = torch.tensor([time.perf_counter() - begin, sum(step() for _ in range(STEPS))])
            wait()
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # the slowest rank holds all up
            if turn:  # the first round warms up
                waited[name].append(float(seconds[0]))
                after[name].append(float(seconds[1]))
    size = sum(chunk.tensor_N.numel() for chunk in chunks) * 4
    total = torch.tensor([size])
    dist.all_reduce(total)
    begin = time.perf_counter()
    copies = [chunk.tensor_N.clone() for chunk in chunks]
    copied = time.perf_counter() - begin
    del copies
    rates = rates_of_storage(folder, engines, size)
    if engines.grid.rank == 0:
        print_costs(waited, after, int(total), copied, rates)
    dist.barrier()
    dist.destroy_process_group()


def ways_to_save(engines, folder: Path):
    """{name: (save(turn), wait until it is on disk)}, and what is saved."""
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from train.saving import Saver

    saver = Saver(folder / "tandem", engines, recipe="stage1", optimizer="adamw", keep=1, keep_every=0)
    chunks = [*engines.encoder.state(), *engines.llm.state()]
    plain = {f"{engines.grid.rank}/{c.name}/{c.kind}": c.tensor_N for c in chunks}
    sharded = {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in plain.items()}
    futures = []

    def fresh(name: str, turn: int) -> str:
        """A new folder, and the old one gone, as keep=1 does it."""
        path = folder / f"{name}-{turn}"
        if dist.get_rank() == 0:
            shutil.rmtree(folder / f"{name}-{turn - 1}", ignore_errors=True)
            path.mkdir(exist_ok=True)
        return str(path)

    def megatron(turn: int) -> None:
        path = fresh("megatron", turn)
        dist.barrier()
        dist_checkpointing.save(sharded, path)

    def dcp_async(turn: int) -> None:
        path = fresh("async", turn)
        futures.append(dcp.async_save(plain, checkpoint_id=path, process_group=engines.grid.control))

    def nothing(*_) -> None:
        return None

    ways = {
        NONE: (nothing, nothing),
        OURS: (lambda turn: saver.save(turn, {}), saver.wait),
        SYNC: (lambda turn: dcp.save(plain, checkpoint_id=fresh("sync", turn)), nothing),
        ASYNC: (dcp_async, lambda: futures.pop().result()),
        MEGATRON: (megatron, nothing),
    }
    return ways, chunks


def rates_of_storage(folder: Path, engines, size: int) -> tuple[float, float]:
    """GB/s of this rank's writing with checksums and flushing, and of reading back and comparing, other ranks idle."""
    import torch.distributed as dist

    from train import checkpoint

    dist.barrier()
    if engines.grid.rank != 0:
        return 0.0, 0.0
    tensors = {c.name + c.kind: c.tensor_N for c in engines.llm.state()}
    repeated = {f"{copy}{key}": tensor for copy in range(-(-(64 << 20) // size)) for key, tensor in tensors.items()}
    begin = time.perf_counter()
    facts = checkpoint.write_file(folder / "rate.safetensors", repeated)
    written = time.perf_counter() - begin
    begin = time.perf_counter()
    assert checkpoint.crc32_of(folder / "rate.safetensors") == facts["crc32"]
    read = time.perf_counter() - begin
    return facts["bytes"] / 1e9 / written, facts["bytes"] / 1e9 / read


def print_costs(waited, after, total: int, copied: float, rates) -> None:
    base = statistics.median(after[NONE]) / STEPS
    print(f"{RANKS} gloo ranks, {' '.join(LAYOUT)}, {total / 1e6:.1f} MB a checkpoint, a step {1e3 * base:.0f} ms")
    print(f"  floor: a copy in memory {1e3 * copied:.1f} ms = {copied / base:.1%} of a step")
    print(
        f"  {'':10} {'loop waits':>11} {'of a step':>10}   {'steps after it':>16}   "
        f"{'cost a step, every ' + str(INTERVAL):>22}"
    )
    for name in waited:
        if name == NONE:
            continue
        wait = statistics.median(waited[name])
        slower = statistics.median(a - b for a, b in zip(after[name], after[NONE], strict=True))
        cost = (wait + max(slower, 0.0)) / INTERVAL / base
        print(f"  {name:10} {1e3 * wait:8.1f} ms {wait / base:10.1%}   {slower / base:+10.2f} steps  {cost:22.4%}")
    ours = statistics.median(waited[OURS])
    ratios = ", ".join(f"{name} {statistics.median(waited[name]) / ours:.0f}x" for name in (SYNC, ASYNC, MEGATRON))
    print(f"  the loop waits longer with {ratios}")
    print(f"  one rank writes with checksums and flush {rates[0]:.2f} GB/s, verifies {rates[1]:.2f} GB/s (page cache)")


if __name__ == "__main__":
    main()
