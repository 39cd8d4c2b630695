"""Sources to units: which files there are, in which format, and how they are cut; then workers import the units.

The list of units follows from the sources and settings alone, and each unit's shards from the unit: neither the number
of workers nor an interruption changes a byte of the result.
"""

import glob
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tandem.data.formats.containers import container_of, find_container
from tandem.data.formats.in_place import AUTO
from tandem.data.formats.records import find_format, formats, likely_format
from tandem.data.importing.journal import FOLDER, Journal
from tandem.data.importing.media import DOWNLOAD, URL, is_url
from tandem.data.importing.unit import UnitTask, first_records, tokenizer_of
from tandem.data.media.turns import SampleError, placeholders

LOOKED_AT = 32  # records that decide a file's format
_DATA_FILES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".tar.gz", ".tgz", ".json")
Runner = Callable[[Callable, Sequence], Iterator]  # (task, items) -> results in the order of the items


@dataclass(frozen=True)
class ImportSettings:
    """What decides the result besides the sources. tokenizer: its settings as JSON, None for no indexes. shard_bytes,
    shard_samples: most of a shard. Raises ValueError.
    """

    format: str = AUTO
    images: tuple[str, ...] = ()
    prompt: str | None = None
    domain: str | None = None
    tokenizer: str | None = None
    shard_bytes: int = 512 << 20
    shard_samples: int = 10_000

    def __post_init__(self):
        if self.format != AUTO:
            find_format(self.format)
        if self.prompt is not None and len(placeholders(self.prompt)) != 1:
            raise ValueError(f"--prompt is {self.prompt!r}; it needs one placeholder, <image> or <video>")
        for folder in self.images:
            if not os.path.isdir(folder):
                raise ValueError(f"--images {folder} is no folder")
        for name, value in (("--shard-mb", self.shard_bytes >> 20), ("--shard-samples", self.shard_samples)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class Plan:
    """Units in order, and a line about each source."""

    units: list[dict]
    lines: list[str]


def find_sources(names: Sequence[str]) -> list[str]:
    """Files and folders that the names stand for; a folder of data files gives these. Raises ValueError."""
    found = []
    for name in names:
        if URL.match(name):
            raise ValueError(
                f"SOURCE {name} is a URL; download it first, for example by huggingface-cli download or wget, "
                "and name the file"
            )
        matching = [name] if os.path.exists(name) else sorted(glob.glob(name))
        if not matching:
            raise ValueError(f"SOURCE {name} does not exist")
        for path in matching:
            found += _data_files(path) if os.path.isdir(path) else [path]
    return found


def _data_files(folder: str) -> list[str]:
    """The files to import of a folder: its data files where it holds no media, else itself."""
    below = [os.path.join(where, name) for where, _, names in sorted(os.walk(folder)) for name in sorted(names)]
    media = any(name.lower().endswith((".jpg", ".jpeg", ".png", ".webp", ".mp4", ".webm", ".mkv")) for name in below)
    if media:
        return [folder]
    for ending in _DATA_FILES:
        if found := [name for name in below if name.lower().endswith(ending)]:
            return found
    return [folder]


def fingerprint(sources: Sequence[str], settings: ImportSettings) -> dict:
    """What the result depends on, as JSON."""
    seen = []
    for path in sources:
        stat = os.stat(path)
        seen.append([os.path.abspath(path), 0 if os.path.isdir(path) else stat.st_size, stat.st_mtime_ns])
    tokenizer = settings.tokenizer and tokenizer_of(settings.tokenizer).sha256
    return {
        "sources": seen,
        "format": settings.format,
        "images": [os.path.abspath(folder) for folder in settings.images],
        "prompt": settings.prompt,
        "domain": settings.domain,
        "tokenizer": tokenizer,
        "shard_bytes": settings.shard_bytes,
        "shard_samples": settings.shard_samples,
    }


def plan_import(sources: Sequence[str], settings: ImportSettings, out: Path) -> Plan:
    """Cut all sources into units and choose their formats. Raises ValueError, in one sentence, for what cannot be."""
    units: list[dict] = []
    lines: list[str] = []
    for number, source in enumerate(sources):
        given = container_of(source)
        container, path, folder = given.prepare(source, out / FOLDER, number)
        kind = find_container(container)
        mine = list(kind.units(path, settings.shard_samples))
        if not mine:
            raise ValueError(f"{source} holds no record")
        format = None if kind.whole else _format(source, container, path, mine[0], settings)
        folders = [os.path.abspath(each) for each in (*settings.images, folder or os.path.dirname(path) or ".")]
        ends = [unit["first"] for unit in mine[1:]] + [None]
        for unit, end in zip(mine, ends, strict=True):
            count = settings.shard_samples if end is None else end - unit["first"]
            more = {"number": len(units), "file": number, "source": source, "path": os.path.abspath(path)}
            more |= {"container": container, "format": format, "folders": folders, "count": count}
            units.append(unit | more)
        said = "samples of a compressed tar" if kind.whole else f"format {format}"
        lines.append(f"{source}: {said} ({given.name})")
    return Plan(units, lines)


def _format(source: str, container: str, path: str, unit: dict, settings: ImportSettings) -> str:
    """The format of a file's records, whose first media must be files. Raises ValueError."""
    first = list(first_records(container, path, unit, LOOKED_AT))
    format = likely_format(first) if settings.format == AUTO else find_format(settings.format)
    if format is None:
        keys = ", ".join(sorted({key for record in first if isinstance(record, dict) for key in record})[:12])
        known = "; ".join(f"{each.name}: {each.what}" for each in formats().values())
        raise ValueError(f"{source} has records of no known format, with the keys {keys or 'none'}; known are {known}")
    media = []
    for record in filter(lambda each: isinstance(each, dict), first):
        try:
            media += format.conversation(record, settings.prompt).media
        except (SampleError, KeyError, TypeError, AttributeError):
            continue
    if media and all(map(is_url, media)) and not settings.images:
        raise ValueError(f"{source} names its images by URLs, such as {media[0].source}, and not by files; {DOWNLOAD}")
    return format.name


def import_units(plan: Plan, settings: ImportSettings, out: Path, run: Runner) -> Generator[int, None, None]:
    """Import all units; yields the number of each as it is done. Raises ValueError."""
    task = UnitTask(str(out), settings.shard_bytes, settings.prompt, settings.domain, settings.tokenizer)
    for number, _ in enumerate(run(task, plan.units)):
        yield number


def begin_import(sources: Sequence[str], settings: ImportSettings, out: Path) -> tuple[Journal, dict, dict | None]:
    """(journal, what the result depends on, the summary of an import that is complete already). Raises ValueError."""
    journal, decided = Journal(out), fingerprint(sources, settings)
    return journal, decided, journal.begin(decided)
