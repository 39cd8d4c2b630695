"""What a checkpoint costs the training loop on this machine, and how fast bytes are summed, written and verified.

    python benchmarks/checkpoint.py            four gloo ranks, about four minutes on two cores

Peers in the same run, the same tensors of the same ranks: torch's distributed checkpoint (DCP) and Megatron-core's
dist_checkpointing, each synchronous and asynchronous.  Rounds go around all of them and no save at all.  For each: how
long the loop waits for the call, how much longer the steps after it take while something writes, and how long a save
takes until its files are complete and flushed where the loop does nothing but wait.  Floor: copying the same bytes from
memory to memory.
"""

import argparse
import functools
import hashlib
import shutil
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.hybrid_step import LAYOUT, settings, skewed_step
from benchmarks.hybrid_step import SIZES as STEPS_OF_SIZE
from benchmarks.processes import InRanks, in_ranks
from tandem.train.config.checks import check_config

ROUNDS = {"docs": 7, "toy": 1}
STEPS = 3  # timed after each save
INTERVAL = 500  # checkpoint.every at full scale
SUMS = {"crc32": zlib.crc32, "sha256": hashlib.sha256, "blake2b": hashlib.blake2b}


def main(argv: list[str] | None = None, in_ranks: InRanks = in_ranks) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    options = results.parse(parser, argv)
    step, rounds = STEPS_OF_SIZE[options.size], ROUNDS[options.size]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = {"sums_gb_per_s": checksums(256 if options.size == "docs" else 1)}
        measured |= in_ranks(step.ranks, "benchmarks.checkpoint", "saves_of_ranks", options.size, folder)
    size = {"ranks": step.ranks, "rounds": rounds, "steps": STEPS, "interval": INTERVAL}
    results.report("checkpoint", options, size, measured, table, ["megatron-core", "deepspeed"])


def checksums(megabytes: int) -> dict[str, float]:
    """GB/s of one core; a checksum must not be slower than the disk."""
    data = bytes(megabytes << 20)
    rates = {}
    for name, function in SUMS.items():
        begin = time.perf_counter()
        function(data)
        rates[name] = len(data) / 1e9 / (time.perf_counter() - begin)
    return rates


def saves_of_ranks(size: str, folder: str) -> dict:
    """One rank: rounds of a save and the steps after it, for every way of saving in turn."""
    import torch
    import torch.distributed as dist

    from benchmarks.checkpoint_ways import START_INTERPRETERS, ways_to_save
    from tandem.parallel.hybrid_step import hybrid_step
    from tandem.parallel.runtime.phases import PhaseTimer
    from tandem.train.build import build_engines
    from tandem.train.input.rows import step_input
    from tandem.train.objectives.language import train_forward, train_loss

    warnings.simplefilter("ignore")
    config, device = settings(STEPS_OF_SIZE[size]), torch.device("cpu")
    layout = check_config(config, dist.get_world_size())
    engines = build_engines(
        config, layout, device, forward=train_forward, loss=functools.partial(train_loss, domains=1)
    )
    batch = step_input(skewed_step(STEPS_OF_SIZE[size], config, engines.grid, True), engines.grid, config.vision)
    timer, ways = PhaseTimer(device), ways_to_save(engines, Path(folder))
    if size == "toy":
        ways = {name: way for name, way in ways.items() if name not in START_INTERPRETERS}

    def step() -> None:
        hybrid_step(engines, batch, report_shape=(2, 1), clip_norm=1.0, replay=False, stop=False, timer=timer)

    times = {name: {"waits_s": [], "steps_s": [], "durable_s": []} for name in ways}
    for turn in range(ROUNDS[size] + 1):
        for name, way in ways.items():
            seconds = torch.tensor(one_round(way, step, turn, Path(folder) / name))
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)  # the slowest rank holds all up
            if turn:  # the first round warms up
                for of_name, value in zip(times[name].values(), seconds.tolist(), strict=True):
                    of_name.append(value)
    for way in ways.values():
        way.close()
    return {**bytes_and_floor(engines), **storage(Path(folder), engines), "ways": times}


def one_round(way, step: Callable[[], None], turn: int, folder: Path) -> list[float]:
    """Seconds that the loop waits for a save, of the steps after it, and of another save until it is on disk.

    Ranks meet between save and steps: where they share cores, no wait then holds the time slice of a rank that trains.
    """
    import torch.distributed as dist

    path = fresh(folder, 2 * turn)
    begin = time.perf_counter()
    way.save(2 * turn, path)
    saved = time.perf_counter()
    dist.barrier()
    for _ in range(STEPS):
        step()
        way.after_step()
    stepped = time.perf_counter()
    way.wait()
    path = fresh(folder, 2 * turn + 1)
    again = time.perf_counter()
    way.save(2 * turn + 1, path)
    way.wait()
    return [saved - begin, stepped - saved, time.perf_counter() - again]


def fresh(folder: Path, number: int) -> str:
    """A new folder, and the one before gone, outside of what is timed (collective)."""
    import torch.distributed as dist

    path = folder / str(number)
    if dist.get_rank() == 0:
        shutil.rmtree(folder / str(number - 1), ignore_errors=True)
        path.mkdir(parents=True)
    dist.barrier()
    return str(path)


def bytes_and_floor(engines) -> dict:
    """Bytes of all ranks, and seconds of a copy of this rank's in memory."""
    import torch
    import torch.distributed as dist

    tensors = [chunk.tensor_N for engine in (engines.encoder, engines.llm) for chunk in engine.state()]
    total = torch.tensor(sum(tensor.nbytes for tensor in tensors))
    dist.all_reduce(total)
    begin = time.perf_counter()
    copies = [tensor.clone() for tensor in tensors]
    copied = time.perf_counter() - begin
    del copies
    return {"bytes": int(total), "floor_s": copied}


def storage(folder: Path, engines) -> dict[str, float]:
    """GB/s of one rank's writing with checksums and flushing, and of reading back and comparing, other ranks idle."""
    import torch.distributed as dist

    from tandem.train.checkpoints import tensors as files

    dist.barrier()
    if engines.grid.rank != 0:
        return {}
    tensors = {chunk.name + chunk.kind: chunk.tensor_N for chunk in engines.llm.state()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    repeated = {f"{copy}{key}": tensor for copy in range(-(-(64 << 20) // size)) for key, tensor in tensors.items()}
    begin = time.perf_counter()
    facts = files.write_file(folder / "rate.safetensors", repeated)
    written = time.perf_counter()
    assert files.crc32_of(folder / "rate.safetensors") == facts["crc32"]
    read = time.perf_counter()
    gigabytes = facts["bytes"] / 1e9
    return {"write_gb_per_s": gigabytes / (written - begin), "verify_gb_per_s": gigabytes / (read - written)}


def table(result: dict) -> str:
    """A row per way of saving, against steps without a save."""
    measured, settings = result["measured"], result["settings"]
    ways = dict(measured["ways"])
    base_steps = ways.pop("no save")["steps_s"]
    base = statistics.median(base_steps) / settings["steps"]
    every = f"cost a step, every {settings['interval']}"
    sums = "   ".join(f"{name} {rate:.2f} GB/s" for name, rate in measured["sums_gb_per_s"].items())
    lines = [
        f"one core sums  {sums}",
        f"{settings['ranks']} gloo ranks on {result['machine']['cores']} cores, {LAYOUT}, "
        f"{measured['bytes'] / 1e6:.1f} MB a checkpoint, a step {1e3 * base:.0f} ms",
        f"  floor: a copy in memory {1e3 * measured['floor_s']:.1f} ms = {measured['floor_s'] / base:.1%} of a step",
        f"  {'':31}{'loop waits':>11}{'of a step':>11}{'over tandem':>13}{'steps after it':>16}{every:>25}"
        f"{'until durable':>15}",
    ]
    ours = statistics.median(ways["tandem"]["waits_s"])
    for name, times in ways.items():
        wait, durable = statistics.median(times["waits_s"]), statistics.median(times["durable_s"])
        slower = statistics.median(a - b for a, b in zip(times["steps_s"], base_steps, strict=True))
        cost = (wait + max(slower, 0.0)) / settings["interval"] / base
        lines.append(
            f"  {name:31}{1e3 * wait:>8.1f} ms{wait / base:>11.1%}{wait / ours:>12.1f}x{slower / base:>+10.2f} steps"
            f"{cost:>25.4%}{1e3 * durable:>12.0f} ms"
        )
    lines.append(
        f"  one rank writes with checksums and flush {measured['write_gb_per_s']:.2f} GB/s, verifies "
        f"{measured['verify_gb_per_s']:.2f} GB/s (page cache)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
