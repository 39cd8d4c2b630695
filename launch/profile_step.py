"""Profiles a training run, or reads a profile, and says where the time goes.

    python launch/profile_step.py run +recipe=stage1 scale=toy train.steps=10
    python launch/profile_step.py summarise runs/profile/run/trace.json.gz

`run` profiles a whole run in one process, its start-up included, and writes OUT/trace.json.gz, which Perfetto and
chrome://tracing open, and OUT/summary.md.  `summarise` reads any Chrome trace, packed by gzip or not, and the floors
beside it where there are some, as benchmarks/profile_workload.py writes them.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.train.cost.trace_summary import longest, read_trace, summarise, table

WARM = 3
TRACE = "trace.json.gz"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "summarise"))
    parser.add_argument("rest", nargs="*", help="of run: settings as of launch/pretrain.py; of summarise: the trace")
    parser.add_argument("--out", type=Path, help="folder of a run's profile; runs/profile/run if left out")
    options = parser.parse_intermixed_args(argv)
    try:
        if options.what == "summarise":
            if len(options.rest) != 1:
                parser.error("summarise takes one trace")
            print(report(Path(options.rest[0])))
            return
        out = options.out or Path("runs/profile/run")
        out.mkdir(parents=True, exist_ok=True)
        run(options.rest, out)
        write_report(out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def write_report(out: Path) -> None:
    """Prints the report of the trace in `out` and writes it beside the trace."""
    text = report(out / TRACE)
    (out / "summary.md").write_text(text + "\n")
    print(text)
    print(f"written to {out}")


def report(trace: Path) -> str:
    """Both tables of a trace, with the floors that lie beside it."""
    beside = trace.parent / "floors.json"
    known: dict[str, Any] = json.loads(beside.read_text()) if beside.is_file() else {"steps": 1, "floors": {}}
    summary = summarise(read_trace(trace))
    return f"{table(summary, known['floors'], known['steps'])}\n\n{longest(summary, known['steps'])}"


def run(settings: list[str], out: Path) -> None:
    """Profiles a run of these settings, as launch/pretrain.py takes them."""
    from tandem.train.config.settings import composed, read_config
    from tandem.train.loop import run as train

    config = read_config(composed(settings))
    with profile(activities=activities()) as profiler:
        train(config)
    profiler.export_chrome_trace(str(out / TRACE))
    write_floors(out, config.train.steps, {})


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


def write_floors(out: Path, steps: int, floors: dict[str, float]) -> None:
    (out / "floors.json").write_text(json.dumps({"steps": steps, "floors": floors}, indent=1))


if __name__ == "__main__":
    main()
