"""Speed and memory of our kernels and models on one GPU, beside their peers in the same run; no network, random data.

    python benchmarks/gpu.py --plan                        what there is, and how long it takes
    python benchmarks/gpu.py                               everything, about half an hour
    python benchmarks/gpu.py --case tower --case moe       some of it
    python benchmarks/gpu.py --device cpu --size toy       every path at toy size in a few seconds, figures of no worth

    tower           27 x 1280 vision tower, packs of 32k and 16k patches, with AdamW; Hugging Face's Qwen3-VL tower
    moe             four MoE layers, 4k, 8k and 32k tokens; Hugging Face's Qwen3-MoE, Megatron-core, Transformer Engine
    cross-entropy   32,768 tokens over 155,136 words; all logits at once
    long-row        one sequence of 131,072 tokens through the MoE layers, beside 32,768 tokens
    attention       attention alone, by backend
    recompute       tower and MoE layers, by what is kept for the backward
    memory          one step of the full-size encoder, and of a stage of the full-size LLM, beside the formula

Numerics first: a row that is off from a plain fp64 reference by more than rounding is not timed, and the exit code is
1.  A row that lacks a package says which; one that runs out of memory says so; the others go on.  Rows are written to
OUT/results.jsonl as they are measured, the table and a picture at the end.
"""

import argparse
import contextlib
import importlib.metadata
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from benchmarks import gpu_measure, gpu_report
from benchmarks.gpu_measure import Place, Result, Variant
from train.flops import device_peak_tflops

LLM = "pip install megatron-core deepspeed; docs/performance.md says how without a network"


@dataclass(frozen=True)
class Case:
    """rows: its variants, given where they run and a context for a world of one.  seconds: estimate on one H200, most
    of it compilation."""

    seconds: int
    rows: Callable[[Place, contextlib.ExitStack], Iterator[Variant]]


def tower(place: Place, _) -> Iterator[Variant]:
    from benchmarks import gpu_tower

    return gpu_tower.variants(place)


def moe(place: Place, stack) -> Iterator[Variant]:
    from benchmarks import gpu_moe

    return gpu_moe.variants(place, world(place, stack))


def long_row(place: Place, stack) -> Iterator[Variant]:
    from benchmarks import gpu_moe

    return gpu_moe.long_row(place, world(place, stack))


def cross_entropy(place: Place, _) -> Iterator[Variant]:
    from benchmarks import gpu_kernels

    return gpu_kernels.cross_entropy(place)


def attention(place: Place, _) -> Iterator[Variant]:
    from benchmarks import gpu_kernels

    return gpu_kernels.attention_table(place)


def recompute(place: Place, stack) -> Iterator[Variant]:
    from benchmarks import gpu_tower

    yield from gpu_tower.recompute_table(place)
    from benchmarks import gpu_moe  # needs Megatron-core, the tower does not

    yield from gpu_moe.recompute_table(place, world(place, stack))


def memory(place: Place, stack) -> Iterator[Variant]:
    from benchmarks import gpu_memory

    return gpu_memory.variants(place, world(place, stack))


CASES = {
    "tower": Case(420, tower),
    "moe": Case(300, moe),
    "cross-entropy": Case(40, cross_entropy),
    "long-row": Case(90, long_row),
    "attention": Case(180, attention),
    "recompute": Case(300, recompute),
    "memory": Case(150, memory),
}


def world(place: Place, stack: contextlib.ExitStack):
    """A world of one, which stands until the stack is left; built once."""
    from train.slices.language import World

    if not hasattr(stack, "world"):
        stack.world = stack.enter_context(World(place.device))
    return stack.world


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all if left out")
    parser.add_argument("--plan", action="store_true", help="print the cases with their estimated time and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full", help="toy: to see that everything runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for results.jsonl and the picture")
    options = parser.parse_args(argv)
    chosen = options.case or list(CASES)
    if options.plan:
        print_plan(chosen)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --size toy runs everything at toy size")
    place = here(options)
    introduce(place)
    results: list[Result] = []
    try:
        measure(chosen, place, options, results)
    finally:  # a lost device also fails to end its world
        gpu_report.print_table(results)
        if place.full:
            gpu_report.print_lines(results)
        gpu_report.draw(results, options.out / "gpu.png")
    if wrong := [r for r in results if r.wrong]:
        sys.exit("\n".join(["error:", *(f"  {r.case}, {r.name}: {r.status}" for r in wrong)]))


def measure(chosen: list[str], place: Place, options: argparse.Namespace, results: list[Result]) -> None:
    """Appends to `results` as they come; a case that cannot go on leaves one that says why, and the next begins."""
    deadline = time.monotonic() + options.seconds
    with contextlib.ExitStack() as stack:
        for name in chosen:
            print(f"{name}, about {CASES[name].seconds} s on an H200" if place.full else name, flush=True)
            try:
                for result in gpu_measure.run_all(CASES[name].rows(place, stack), place, deadline, options.out):
                    results.append(result)
            except ModuleNotFoundError as error:
                print(f"  not here: {error}; {LLM}")
            except Exception as error:
                gpu_measure.log_error(name, options.out)
                results.append(Result(name, "rows not measured", True, status=gpu_measure.one_line(error)))
                print(f"  {results[-1].status}")


def here(options: argparse.Namespace) -> Place:
    """One GPU in bf16, or the CPU in fp32."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    warnings.filterwarnings("ignore", category=UserWarning)  # of libraries, about themselves
    return Place(device, dtype, options.size == "full", device_peak_tflops(device))


def introduce(place: Place) -> None:
    """What is measured on, and which packages are here."""
    name = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else "CPU"
    print(f"{name}, {place.dtype}, MFU against {place.peak_tflops:.3g} TFLOP/s, Python {sys.version.split()[0]}")
    versions = [f"torch {torch.__version__}"]
    for package in ("megatron-core", "transformer-engine", "flash-attn-4", "transformers", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    print(", ".join(versions))


def print_plan(chosen: list[str]) -> None:
    for name in chosen:
        print(f"  {name:16}{CASES[name].seconds:>5} s")
    print(f"  {'in all':16}{sum(CASES[name].seconds for name in chosen):>5} s; estimates for one H200")


if __name__ == "__main__":
    main()
