"""Profiles a workload and says where its time goes, each kind of work beside the least that it could take.

    python benchmarks/profile_workload.py tower                a pack of images through the vision tower, with AdamW
    python benchmarks/profile_workload.py moe --tokens 32768   rows of tokens through four MoE layers and back

Writes OUT/trace.json.gz, which Perfetto and chrome://tracing open, OUT/floors.json and OUT/summary.md.  Floors are
FLOPs at the rate of one large matrix product, and bytes at that of one large copy, both measured here.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks.workloads import language
from benchmarks.workloads import tower as tower_work
from tandem.launch.profile_step import record, synchronize, write_floors, write_report
from tandem.parallel.kernels import attention
from tandem.train.models.encoders.vit import ViTConfig


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PROFILED)
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", default="none", help="none, selective, offload or full")
    parser.add_argument("--tokens", type=int, default=32768, help="of moe, in sequences of 8,192; a toy has 256")
    parser.add_argument("--steps", type=int, default=3, help="profiled after some that warm up")
    parser.add_argument("--out", type=Path, help="folder; runs/profile/<what> if left out")
    options = parser.parse_args(argv)
    out = options.out or Path("runs/profile") / options.what
    out.mkdir(parents=True, exist_ok=True)
    try:
        PROFILED[options.what](options, out)
        write_report(out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def tower(options: argparse.Namespace, out: Path) -> None:
    device, dtype = place(options)
    full = options.size == "full"
    config = ViTConfig() if full else ViTConfig(width=64, depth=2, heads=2)
    pack = tower_work.draw_pack(32768) if full else tower_work.draw_pack(256, seed=0, smallest=16, largest=100)
    attention.choose("auto", device, dtype)
    built = tower_work.build_tower(config, pack, device, dtype, options.recompute)
    record(built.step, device, options.steps, out)
    write_floors(out, options.steps, tower_work.floors(config, pack, *rates(device, dtype), dtype.itemsize))


def moe(options: argparse.Namespace, out: Path) -> None:
    device, dtype = place(options)
    config, tokens, sequence = language.SLICE, options.tokens, language.SEQUENCE
    if options.size == "toy":
        small = {"width": 128, "heads": 4, "kv_heads": 2, "head_width": 32, "num_experts": 8, "top_k": 2}
        config, tokens, sequence = dataclasses.replace(config, layers=2, expert_width=64, **small), 256, 128
    if tokens % sequence:
        raise ValueError(f"--tokens {tokens}: must be a multiple of {sequence}")
    attention.choose("auto", device, dtype)
    with language.World(device) as world:
        built = language.build_language(config, world, dtype, tokens, sequence, options.recompute)
        record(built.step, device, options.steps, out)
    write_floors(out, options.steps, language.floors(config, tokens, sequence, *rates(device, dtype), dtype.itemsize))


PROFILED: dict[str, Callable[[argparse.Namespace, Path], None]] = {"tower": tower, "moe": moe}


def place(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """bf16 on CUDA, fp32 on a CPU.  Raises ValueError for a device that is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; --device cpu --size toy runs anywhere")
    if options.device == "cuda":
        return torch.device("cuda", 0), torch.bfloat16
    return torch.device("cpu"), torch.float32


def rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of one large matrix product, and bytes/s, read and written, of one large copy."""
    size, copied = (8192, 2**30) if device.type == "cuda" else (512, 2**24)
    x = torch.randn(size, size, device=device, dtype=torch.float32).to(dtype)
    source = torch.empty(copied, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    product = shortest(lambda: torch.mm(x, x), device)
    copy = shortest(lambda: target.copy_(source), device)
    return 2 * size**3 / product, 2 * copied / copy


def shortest(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    """Seconds of the fastest of some calls."""
    best = float("inf")
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


if __name__ == "__main__":
    main()
