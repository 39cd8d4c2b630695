"""Import data into indexed shards: LLaVA, ShareGPT, OpenAI messages, parquet, OBELICS, MMC4, text, folders, tar.gz.

    python launch/import_data.py llava.json --images coco --out shards/llava --tokenizer tokenizer.json
    python launch/import_data.py 'data/*.parquet' --out shards/vqa --tokenizer tokenizer.json --workers 8

A SOURCE is a file (.json, .jsonl, .csv, .tsv, .parquet, .tar.gz, .tgz, and .gz or .zst of lines), a folder of such
files, or a folder of images or videos with captions, classes or neither. Its format is told; --format names it where
the first records mislead. Records that cannot be used are left out and counted by reason.

After an interruption, run the same command again: it goes on, and the result is the same to the byte. With a tokenizer
the shards are indexed as they are written, and OUT/data.catalog names them all for data.sources.*.shards.
"""

import argparse
import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.data.curation.runners import in_processes, on_ray
from tandem.data.formats.in_place import AUTO
from tandem.data.formats.records import formats
from tandem.data.importing.journal import Journal
from tandem.data.importing.pipeline import (
    ImportSettings,
    Plan,
    begin_import,
    find_sources,
    import_units,
    plan_import,
)
from tandem.data.shards.catalog import gather_catalog, write_catalog
from tandem.data.shards.tars import printable
from tandem.launch.index_shards import add_set_option, tokenizer_settings

_WATCH_S = 0.5
_AT_HAND = 64  # units behind the last finished one that may be at work
CATALOG = "data.catalog"


def run_import(sources: list[str], settings: ImportSettings, out: Path, run, console: Console) -> dict:
    """The import with its progress; the summary. Raises ValueError."""
    journal, decided, summary = begin_import(sources, settings, out)
    if summary is None:
        plan = plan_import(sources, settings, out)
        for line in plan.lines:
            console.print(line, markup=False, soft_wrap=True)
        with contextlib.closing(import_units(plan, settings, out, run)) as done:
            _watched(done, plan, journal, console)
        summary = journal.finish(decided, len(plan.units))
    if not summary["samples"]:
        first = next(((reason, each["examples"][0]) for reason, each in summary["left_out"].items()), None)
        why = f"; the most frequent reason: {first[0]} ({first[1]})" if first else ""
        raise ValueError(f"no record of {', '.join(sources)} could be imported{why}")
    if settings.tokenizer is not None:
        shards, sha256 = [str(out / name) for name in summary["shards"]], summary["settings"]["tokenizer"]
        write_catalog(out / CATALOG, gather_catalog(shards, sha256))
    return summary


def _watched(done: Iterator[int], plan: Plan, journal: Journal, console: Console) -> None:
    """Waits for all units, with a bar and the time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    finished: list[float] = []  # weights, in the order of the units
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        total = sum(unit["weight"] for unit in plan.units)
        task, ended = bar.add_task("importing", total=max(total, 1)), threading.Event()

        def watch() -> None:
            while not ended.wait(_WATCH_S):
                at_hand = plan.units[len(finished) : len(finished) + _AT_HAND]
                shares = [journal.seen_progress(unit["number"]) * unit["weight"] for unit in at_hand]
                bar.update(task, completed=int(sum(finished) + sum(shares)))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            for number in done:
                finished.append(plan.units[number]["weight"])
            bar.update(task, completed=max(total, 1))
        finally:
            ended.set()
            watcher.join()


def report(summary: dict, out: Path, indexed: bool) -> list[Table | str]:
    """What was imported and what was left out and why, as tables and lines for a console."""
    kept, left = summary["samples"], summary["left_out"]
    table = Table(Column("outcome", no_wrap=True), Column("records", justify="right"), "for example")
    table.add_row("imported", f"{kept:,}", "")
    for reason, each in left.items():
        table.add_row(Text(f"left out: {reason}"), f"{each['records']:,}", Text(printable(each["examples"][0])))
    media = [f"{summary[name]:,} {name}" for name in ("images", "videos") if summary[name]]
    line = f"{out}: {', '.join([f'{kept:,} samples', *media])}, {summary['bytes'] / 1e6:,.1f} MB"
    if indexed:
        return [table, line, f"train on them with data.sources.main.shards=[{out / CATALOG}]"]
    return [table, line, f"index them next: python launch/index_shards.py {out} --tokenizer FILE"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", metavar="SOURCE", help="files or folders; * is understood")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; empty, or of the same command before")
    parser.add_argument("--format", default=AUTO, help=f"of the records: {AUTO} or one of {', '.join(formats())}")
    parser.add_argument("--images", metavar="DIR", action="append", default=[], help="folder of images and videos")
    parser.add_argument("--tokenizer", help="tokenizer.json or folder that training will use; indexes the shards")
    add_set_option(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="what the user says to a captioned picture, with <image>")
    parser.add_argument("--domain", help="name of this kind of data, by which losses are reported")
    parser.add_argument("--shard-mb", type=int, default=512, help="most MiB of a shard")
    parser.add_argument("--shard-samples", type=int, default=10_000, help="most samples of a shard")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one shard each at a time)")
    parser.add_argument("--ray", action="store_true", help="workers are actors on the Ray cluster of RAY_ADDRESS")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    given = parser.parse_args(argv)
    console = Console()
    try:
        if given.workers < 1:
            raise ValueError(f"--workers is {given.workers}; it must be at least 1")
        settings = ImportSettings(
            format=given.format,
            images=tuple(given.images),
            prompt=given.prompt,
            domain=given.domain,
            tokenizer=given.tokenizer and tokenizer_settings(given.tokenizer, given.set),
            shard_bytes=given.shard_mb << 20,
            shard_samples=given.shard_samples,
        )
        run = functools.partial(on_ray if given.ray else in_processes, workers=given.workers)
        out = given.out.resolve()
        summary = run_import(find_sources(given.sources), settings, out, run, console)
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; run it again to go on\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    for each in report(summary, given.out, given.tokenizer is not None):
        console.print(each, markup=False, soft_wrap=isinstance(each, str))
    return 0


if __name__ == "__main__":
    sys.exit(main())
