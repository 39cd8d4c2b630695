"""How benchmarks/gpu.py measures: one variant after the other, numerics first, and none that stops the next.

A `Variant` builds its work and hands back one step of it.  The first step is timed by itself (compilation, loading of
kernels), two more warm up, then steps are timed one by one until `ROUNDS` are done or the variant's time is up.
"""

import contextlib
import gc
import importlib
import json
import re
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

WARM, ROUNDS, LEAST = 2, 12, 3
VARIANT_SECONDS = 20.0  # of timed steps
FP32_LIMIT, BF16_LIMIT = 1e-4, 5e-2  # relative to the norm of the reference
GIB = 2**30


class Missing(Exception):
    """A package that a variant needs and that is not here; the text says how to get it."""


@dataclass(frozen=True)
class Place:
    """Where the variants run, in which type, and how large they are."""

    device: torch.device
    dtype: torch.dtype
    full: bool
    peak_tflops: float

    @property
    def limit(self) -> float:
        """Largest relative error that rounding explains."""
        return BF16_LIMIT if self.dtype is torch.bfloat16 else FP32_LIMIT


@dataclass(frozen=True)
class Work:
    """One step, what it computes, memory that a formula says it takes at its peak, and the size of its results, which
    any way to compute them needs."""

    step: Callable[[], None]
    flops: int = 0
    tokens: int = 0
    formula_bytes: int = 0
    result_bytes: int = 0


@dataclass(frozen=True)
class Variant:
    """One row of a table.  build: allocates and returns the work.  error: relative error against a reference at a small
    size, worked out once for all rows that compute alike, None where the row is no computation of its own.  needs:
    modules that must be importable, with how to get them.  ours: ratios are taken against the peers of the same case.
    slack: times the error that is let pass."""

    case: str
    name: str
    build: Callable[[], Work]
    error: Callable[[], float] | None = None
    needs: dict[str, str] = field(default_factory=dict)
    ours: bool = True
    slack: float = 1.0


@dataclass
class Result:
    """What was measured of a variant; `status` is "ok", or says in one line what was not."""

    case: str
    name: str
    ours: bool
    status: str = "ok"
    error: float | None = None
    first_s: float | None = None
    ms: float | None = None
    spread: float | None = None  # (slowest - fastest) / median
    tflop: float | None = None
    tflops: float | None = None
    mfu: float | None = None
    over_floor: float | None = None
    us_per_token: float | None = None
    peak_gib: float | None = None
    extra_gib: float | None = None  # above what lay there before the steps, results left out
    formula_gib: float | None = None

    @property
    def wrong(self) -> bool:
        return self.status not in ("ok", "out of memory", "no time left") and not self.status.startswith("not here")


@dataclass(frozen=True)
class Effort:
    """deadline, of time.monotonic: no variant begins after it.  rounds: timed steps at most.  profiles: folder of a
    trace and its summary for each variant of ours, None for no profile."""

    deadline: float
    rounds: int = ROUNDS
    profiles: Path | None = None


def run_all(variants: Iterable[Variant], place: Place, effort: Effort, out: Path) -> Iterator[Result]:
    """Measures every variant that begins in time; a JSON line each, as soon as it is."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "results.jsonl").open("a") as lines:
        for variant in variants:
            result = Result(variant.case, variant.name, variant.ours)
            if not alive(place.device):
                result.status = "device lost"
            elif time.monotonic() > effort.deadline:
                result.status = "no time left"
            else:
                _guarded(variant, result, place, effort, out)
            lines.write(json.dumps(asdict(result)) + "\n")
            lines.flush()
            print(f"  {variant.case:24}{variant.name:64}{_brief(result)}", flush=True)
            yield result


def _guarded(variant: Variant, result: Result, place: Place, effort: Effort, out: Path) -> None:
    """Fills the result in, whatever happens."""
    with _status_of_errors(variant, result, out):
        _measure(variant, result, place, effort)
    with _status_of_errors(variant, result, out):  # after the traceback, which holds tensors; fails on a lost device
        _release(place)


@contextlib.contextmanager
def _status_of_errors(variant: Variant, result: Result, out: Path) -> Iterator[None]:
    """Turns what is raised inside into the result's status, unless one before has said what was wrong."""
    status = "ok"
    try:
        yield
    except Missing as missing:
        status = f"not here: {missing}"
    except torch.OutOfMemoryError:
        status = "out of memory"
    except Exception as error:  # a row that cannot run must not cost the others
        log_error(f"{variant.case}: {variant.name}", out)
        status = one_line(error)
    if result.status == "ok":
        result.status = status


def log_error(heading: str, out: Path) -> None:
    """Appends the exception that is being handled, with its traceback, to OUT/errors.log."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "errors.log").open("a") as log:
        log.write(f"{heading}\n{traceback.format_exc()}\n")


def one_line(error: Exception) -> str:
    """Its type, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def alive(device: torch.device) -> bool:
    """False after a fault that ends a CUDA context, as an illegal access or an assert in a kernel does: every call
    fails from then on."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            return False
    return True


def _measure(variant: Variant, result: Result, place: Place, effort: Effort) -> None:
    for module, advice in variant.needs.items():
        try:
            importlib.import_module(module)
        except (ImportError, OSError) as error:  # OSError: a library that it links to is not there
            raise Missing(f"{error}; {advice}") from error
    torch._dynamo.reset()  # graphs of the rows before
    if variant.error is not None:
        result.error = variant.error()
        _release(place)
        torch._dynamo.reset()  # graphs of the small widths: what is timed is compiled for its own
        limit = variant.slack * place.limit
        if not result.error < limit:
            result.status = f"wrong: off by {result.error:.0e} of the reference, rounding explains {limit:.0e}"
            return
    work = variant.build()
    before = _allocated(place.device)
    result.first_s = seconds(work.step, place.device)
    for _ in range(WARM if place.full else 0):
        work.step()
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
        torch.cuda.reset_peak_memory_stats(place.device)
    times, begin = [], time.monotonic()
    while len(times) < (effort.rounds if place.full else 1):
        times.append(seconds(work.step, place.device))
        if time.monotonic() - begin > VARIANT_SECONDS and len(times) >= LEAST:
            break
    _fill(result, work, times, place)
    if place.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(place.device)
        result.peak_gib, result.extra_gib = peak / GIB, (peak - before - work.result_bytes) / GIB
    if effort.profiles and variant.ours:
        _profile(work, variant, place, effort.profiles)


def _profile(work: Work, variant: Variant, place: Place, profiles: Path) -> None:
    from tandem.launch.profile_step import TRACE, record, report, write_floors

    folder = profiles / re.sub(r"\W+", "-", f"{variant.case} {variant.name}")
    folder.mkdir(parents=True, exist_ok=True)
    record(work.step, place.device, 2, folder)
    write_floors(folder, 2, {})
    (folder / "summary.md").write_text(report(folder / TRACE) + "\n")


def _fill(result: Result, work: Work, times: list[float], place: Place) -> None:
    median = statistics.median(times)
    result.ms, result.spread = 1e3 * median, (max(times) - min(times)) / median
    if work.flops:
        result.tflop, result.tflops = work.flops / 1e12, work.flops / median / 1e12
        result.mfu = result.tflops / place.peak_tflops
        result.over_floor = 1 / result.mfu
    if work.tokens:
        result.us_per_token = 1e6 * median / work.tokens
    if work.formula_bytes:
        result.formula_gib = work.formula_bytes / GIB


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Of one step, from an idle device to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _release(place: Place) -> None:
    """Gives memory back; a toy's is not worth the search for it."""
    if place.full:
        gc.collect()
    if place.device.type == "cuda":
        torch.cuda.empty_cache()


def _brief(result: Result) -> str:
    if result.status != "ok":
        return result.status
    rate = f"{result.tflops:9.1f} TFLOP/s" if result.tflops else ""
    return f"{result.ms:10.1f} ms{rate}, first step {result.first_s:.1f} s"


def relative(found: Iterable[torch.Tensor], wanted: Iterable[torch.Tensor]) -> float:
    """Norm of the difference over the norm of what is wanted, the worst of the tensors."""
    worst = 0.0
    for mine, right in zip(found, wanted, strict=True):
        right = right.detach().double().cpu()
        error = float((mine.detach().double().cpu() - right).norm() / right.norm())
        worst = max(worst, error) if error == error else float("nan")
        if error != error:
            break
    return worst
