"""Results of benchmarks as JSON files: the printed tables and those of README.md and docs/ are made from them.

    {"name": "experts", "command": "taskset -c 0 python benchmarks/experts.py", "date": "2026-01-01T00:00:00+00:00",
     "machine": {"processor", "cores", "memory_gib", "gpu"}, "versions": {"python", "torch", ...}, "commit": ...,
     "settings": {...}, "measured": {...}}

Each benchmark has a function `table` that formats its result.  `report` writes a result and prints the table of the
file's content, so that print, file and documentation hold the same numbers.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"  # of the results that the documentation shows
OTHERS = ROOT / "runs" / "benchmarks"  # of all other results
WHERE = ("--out", "--results")  # options that change no number
CODE = ("benchmarks/*.py", "data", "launch", "parallel", "recipes", "train")  # what a result may depend on


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """Options of a benchmark, `--size` and `--out` among them, and as `options.argv` the words that were given."""
    parser.add_argument("--size", choices=("docs", "toy"), default="docs", help="toy: to see that everything runs")
    parser.add_argument(
        "--out", type=Path, help="file of the result; benchmarks/results/NAME.json, for a toy runs/benchmarks/NAME.json"
    )
    options = parser.parse_args(argv)
    options.argv = sys.argv[1:] if argv is None else argv
    return options


def gather(
    name: str, argv: list[str], settings: dict, measured: dict, packages: Iterable[str] = (), gpu: str | None = None
) -> dict:
    """The result of a run with these words on the command line.

    packages: distributions whose versions are recorded beside those of Python and torch.  gpu: the device's name.
    """
    return {
        "name": name,
        "command": command(name, argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(gpu),
        "versions": versions(packages),
        "commit": commit(),
        "settings": settings,
        "measured": measured,
    }


def report(
    name: str,
    options: argparse.Namespace,
    settings: dict,
    measured: dict,
    table: Callable[[dict], str],
    packages: Iterable[str] = (),
    gpu: str | None = None,
) -> Path:
    """Writes the result of a run with these options and prints its table; returns the file's path."""
    path = options.out or (FOLDER if options.size == "docs" else OTHERS) / f"{name}.json"
    write(path, gather(name, options.argv, settings, measured, packages, gpu))
    print(table(read(path)))
    return path


def write(path: Path, result: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def script(name: str) -> str:
    """Module of the benchmark with results of this name; "encoder-full" is a result of "encoder"."""
    return name.partition("-")[0]


def command(name: str, argv: list[str]) -> str:
    """The command line without files of output, with the cores where the process was started on some only."""
    words = [word for word, before in zip(argv, ["", *argv], strict=False) if not {word, before} & set(WHERE)]
    cores = sorted(os.sched_getaffinity(0))
    pinned = f"taskset -c {','.join(map(str, cores))} " if len(cores) < os.cpu_count() else ""
    return pinned + shlex.join(["python", f"benchmarks/{script(name)}.py", *words])


def machine(gpu: str | None) -> dict:
    """Processor, cores that the process may use, memory, and the GPU if one was used."""
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "gpu": gpu,
    }


def processor() -> str:
    """Name of the processor as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of Python, torch and these packages, None for one that is not installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", *packages):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """Commit of the working tree, with "-dirty" where code differs from it; None outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", *CODE) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance(result: dict) -> str:
    """One line of Markdown: when, where, with what and how a result was measured."""
    place, version = result["machine"], result["versions"]
    cores = f"{place['cores']} core" + "s" * (place["cores"] != 1)
    parts = [place["gpu"], f"{place['processor']}, {cores}, {place['memory_gib']} GiB"]
    parts += [f"{package} {number}" for package, number in version.items() if number]
    parts += [f"commit {result['commit']}"] if result["commit"] else []
    return f"Measured on {result['date'][:10]} by `{result['command']}` ({', '.join(filter(None, parts))})."
