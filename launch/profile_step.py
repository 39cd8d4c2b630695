"""Profiles a piece of work and says where its time goes, each kind of work beside the least that it could take.

    python launch/profile_step.py tower                        a pack of images through the vision tower, with AdamW
    python launch/profile_step.py moe --tokens 32768           rows of tokens through four MoE layers and back
    python launch/profile_step.py run +recipe=stage1 scale=toy train.steps=10
    python launch/profile_step.py summarise runs/profile/tower/trace.json.gz

The first three write OUT/trace.json.gz, which Perfetto and chrome://tracing open, OUT/floors.json and OUT/summary.md.
Floors are FLOPs at the rate of one large matrix product, and bytes at that of one large copy, both measured here; `run`
profiles a whole training run in one process, its start-up included, and has none.  `summarise` reads any Chrome trace,
packed by gzip or not, and the floors beside it where there are some.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch.trace_summary import longest, read_trace, summarise, table

WARM = 3
TRACE = "trace.json.gz"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tower", "moe", "run", "summarise"))
    parser.add_argument("rest", nargs="*", help="of run: settings as of launch/pretrain.py; of summarise: the trace")
    parser.add_argument("--size", choices=("full", "toy"), default="full", help="of tower and moe")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recompute", default="none", help="none, selective, offload or full")
    parser.add_argument("--tokens", type=int, default=32768, help="of moe, in sequences of 8,192; a toy has 256")
    parser.add_argument("--steps", type=int, default=3, help="of tower and moe, profiled after some that warm up")
    parser.add_argument("--out", type=Path, help="folder; runs/profile/<what> if left out")
    options = parser.parse_intermixed_args(argv)
    try:
        if options.what == "summarise":
            if len(options.rest) != 1:
                parser.error("summarise takes one trace")
            print(report(Path(options.rest[0])))
            return
        out = options.out or Path("runs/profile") / options.what
        out.mkdir(parents=True, exist_ok=True)
        PROFILED[options.what](options, out)
        text = report(out / TRACE)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    (out / "summary.md").write_text(text + "\n")
    print(text)
    print(f"written to {out}")


def report(trace: Path) -> str:
    """Both tables of a trace, with the floors that lie beside it."""
    beside = trace.parent / "floors.json"
    known = json.loads(beside.read_text()) if beside.is_file() else {"steps": 1, "floors": {}}
    summary = summarise(read_trace(trace))
    return f"{table(summary, known['floors'], known['steps'])}\n\n{longest(summary, known['steps'])}"


# ---- what can be profiled --------------------------------------------------------------------------------------------


def tower(options: argparse.Namespace, out: Path) -> None:
    from parallel import attention
    from train.models.vit import ViTConfig
    from train.slices import tower as slices

    device, dtype = place(options)
    full = options.size == "full"
    config = ViTConfig() if full else ViTConfig(width=64, depth=2, heads=2)
    pack = slices.draw_pack(32768) if full else slices.draw_pack(256, seed=0, smallest=16, largest=100)
    attention.choose("auto", device, dtype)
    built = slices.build_tower(config, pack, device, dtype, options.recompute)
    record(built.step, device, options.steps, out)
    write_floors(out, options.steps, slices.floors(config, pack, *rates(device, dtype), dtype.itemsize))


def moe(options: argparse.Namespace, out: Path) -> None:
    import dataclasses

    from parallel import attention
    from train.slices import language as slices

    device, dtype = place(options)
    config, tokens, sequence = slices.SLICE, options.tokens, slices.SEQUENCE
    if options.size == "toy":
        small = {"width": 128, "heads": 4, "kv_heads": 2, "head_width": 32, "num_experts": 8, "top_k": 2}
        config, tokens, sequence = dataclasses.replace(config, layers=2, expert_width=64, **small), 256, 128
    if tokens % sequence:
        raise ValueError(f"--tokens {tokens}: must be a multiple of {sequence}")
    attention.choose("auto", device, dtype)
    with slices.World(device) as world:
        built = slices.build_language(config, world, dtype, tokens, sequence, options.recompute)
        record(built.step, device, options.steps, out)
    write_floors(out, options.steps, slices.floors(config, tokens, sequence, *rates(device, dtype), dtype.itemsize))


def run(options: argparse.Namespace, out: Path) -> None:
    from train.loop import run as train
    from train.settings import composed, read_config

    config = read_config(composed(options.rest))
    with profile(activities=activities()) as profiler:
        train(config)
    profiler.export_chrome_trace(str(out / TRACE))
    write_floors(out, config.train.steps, {})


PROFILED: dict[str, Callable[[argparse.Namespace, Path], None]] = {"tower": tower, "moe": moe, "run": run}


def place(options: argparse.Namespace) -> tuple[torch.device, torch.dtype]:
    """bf16 on CUDA, fp32 on a CPU.  Raises ValueError for a device that is not there."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device; --device cpu --size toy runs anywhere")
    if options.device == "cuda":
        return torch.device("cuda", 0), torch.bfloat16
    return torch.device("cpu"), torch.float32


def activities() -> list[ProfilerActivity]:
    kinds = [ProfilerActivity.CPU]
    return [*kinds, ProfilerActivity.CUDA] if torch.cuda.is_available() else kinds


def record(step: Callable[[], None], device: torch.device, steps: int, out: Path) -> None:
    """Profiles `steps` steps after WARM others."""
    for _ in range(WARM):
        step()
    synchronize(device)
    with profile(activities=activities()) as profiler:
        for _ in range(steps):
            step()
        synchronize(device)
    profiler.export_chrome_trace(str(out / TRACE))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- floors ----------------------------------------------------------------------------------------------------------


def write_floors(out: Path, steps: int, floors: dict[str, float]) -> None:
    (out / "floors.json").write_text(json.dumps({"steps": steps, "floors": floors}, indent=1))


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
