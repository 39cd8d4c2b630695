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
OUT/results.jsonl as they are measured, the table and a picture at the end.  With --results the table's numbers are also
written as a result that benchmarks/tables.py shows; several runs of some cases each on one machine add up in it:

    python benchmarks/gpu.py --case tower --results benchmarks/results/gpu.json
"""

import argparse
import contextlib
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from benchmarks import gpu_measure, gpu_report, results
from benchmarks.gpu_measure import Place, Result, Variant
from tandem.train.cost.flops import device_peak_tflops

PACKAGES = ("megatron-core", "transformer-engine", "flash-attn-4", "flash-attn", "transformers", "triton")
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
    "tower": Case(600, tower),
    "moe": Case(360, moe),
    "cross-entropy": Case(40, cross_entropy),
    "long-row": Case(90, long_row),
    "attention": Case(180, attention),
    "recompute": Case(300, recompute),
    "memory": Case(150, memory),
}


def world(place: Place, stack: contextlib.ExitStack):
    """A world of one, which stands until the stack is left; built once."""
    from benchmarks.workloads.language import World

    if not hasattr(stack, "world"):
        stack.world = stack.enter_context(World(place.device))
    return stack.world


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="may be given several times; all if left out")
    parser.add_argument("--rows", default="", help="regular expression: only rows in whose case or name it is found")
    parser.add_argument("--rounds", type=int, default=gpu_measure.ROUNDS, help="timed steps of a row at most")
    parser.add_argument("--profiles", type=Path, help="folder to write a profile of each of our rows to")
    parser.add_argument("--plan", action="store_true", help="print the cases with their estimated time and stop")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full", help="toy: to see that everything runs")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no row after this time")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for results.jsonl and the picture")
    parser.add_argument("--results", type=Path, help="file to write the table's numbers to as JSON")
    options = parser.parse_args(argv)
    chosen = options.case or list(CASES)
    if options.plan:
        print_plan(chosen)
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --size toy runs everything at toy size")
    place = here(options)
    introduce(place)
    rows: list[Result] = []
    try:
        measure(chosen, place, options, rows)
    finally:  # a lost device also fails to end its world
        result = results.gather("gpu", sys.argv[1:] if argv is None else argv, *facts(place, rows))
        if options.results:
            result = with_earlier_cases(options.results, result)
            results.write(options.results, result)
        print(f"\n{table(result)}")
        gpu_report.draw(rows, options.out / "gpu.png")
    if wrong := [r for r in rows if r.wrong]:
        sys.exit("\n".join(["error:", *(f"  {r.case}, {r.name}: {r.status}" for r in wrong)]))


def facts(place: Place, rows: list[Result]) -> tuple[dict, dict, tuple[str, ...], str | None]:
    """Settings, measured numbers, packages and GPU of a result."""
    size = "full" if place.full else "toy"
    settings = {"size": size, "dtype": str(place.dtype).removeprefix("torch."), "peak_tflops": place.peak_tflops}
    return settings, {"rows": [asdict(row) for row in rows]}, PACKAGES, name_of(place)


def with_earlier_cases(path: Path, result: dict) -> dict:
    """The result with the cases that only the file at `path` has, if machine, packages and settings are the same."""
    earlier = results.read(path) if path.is_file() else None
    same = ("machine", "versions", "commit", "settings")
    if earlier is None or any(earlier[key] != result[key] for key in same):
        return result
    new = {row["case"] for row in result["measured"]["rows"]}
    kept = [row for row in earlier["measured"]["rows"] if row["case"] not in new]
    command = " && ".join([earlier["command"], result["command"]] if kept else [result["command"]])
    return {**result, "command": command, "measured": {"rows": kept + result["measured"]["rows"]}}


def table(result: dict) -> str:
    """All rows by case, and at full size the targets."""
    rows, settings = [Result(**row) for row in result["measured"]["rows"]], result["settings"]
    device = result["machine"]["gpu"] or "CPU"
    head = f"{device}, {settings['dtype']}, MFU against {settings['peak_tflops']:.3g} TFLOP/s"
    parts = [head, gpu_report.rows_table(rows)]
    return "\n\n".join([*parts, gpu_report.targets_table(rows)] if settings["size"] == "full" else parts)


def measure(chosen: list[str], place: Place, options: argparse.Namespace, rows: list[Result]) -> None:
    """Appends to `rows` as they come; a case that cannot go on leaves one that says why, and the next begins."""
    effort = gpu_measure.Effort(time.monotonic() + options.seconds, options.rounds, options.profiles)
    with contextlib.ExitStack() as stack:
        for name in chosen:
            print(f"{name}, about {CASES[name].seconds} s on an H200" if place.full else name, flush=True)
            try:
                wanted = (
                    row for row in CASES[name].rows(place, stack) if re.search(options.rows, f"{row.case}: {row.name}")
                )
                for result in gpu_measure.run_all(wanted, place, effort, options.out):
                    rows.append(result)
            except ModuleNotFoundError as error:
                print(f"  not here: {error}; {LLM}")
            except Exception as error:
                gpu_measure.log_error(name, options.out)
                rows.append(Result(name, "rows not measured", True, status=gpu_measure.one_line(error)))
                print(f"  {rows[-1].status}")


def here(options: argparse.Namespace) -> Place:
    """One GPU in bf16, or the CPU in fp32."""
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    warnings.filterwarnings("ignore", category=UserWarning)  # of libraries, about themselves
    return Place(device, dtype, options.size == "full", device_peak_tflops(device))


def name_of(place: Place) -> str | None:
    return torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else None


def introduce(place: Place) -> None:
    """Prints the device and the packages that are here."""
    print(f"{name_of(place) or 'CPU'}, {place.dtype}, MFU against {place.peak_tflops:.3g} TFLOP/s")
    found = results.versions(PACKAGES).items()
    print(", ".join(f"{package} {version}" for package, version in found if version))


def print_plan(chosen: list[str]) -> None:
    for name in chosen:
        print(f"  {name:16}{CASES[name].seconds:>5} s")
    print(f"  {'in all':16}{sum(CASES[name].seconds for name in chosen):>5} s; estimates for one H200")


if __name__ == "__main__":
    main()
