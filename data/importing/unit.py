"""Work of one import worker: the records of a unit are written as parts, each a shard of limited size with its index.

    record  --format-->  turns and media  --read, check-->  KEY.json KEY.0.jpg KEY.1.jpg ...  -->  tar

The parts depend on the unit and the settings alone, so a part that was left half-written by a killed process is written
again with equal bytes.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tandem.data.formats.containers import find_container
from tandem.data.formats.records import Conversation, find_format, format_of
from tandem.data.importing.journal import Journal, Part, Tally
from tandem.data.importing.media import MediaFiles
from tandem.data.importing.tar_writer import TarWriter
from tandem.data.media.text import Tokenizer
from tandem.data.media.turns import SampleError, placeholders
from tandem.data.shards.tars import MAX_BYTES, printable

_PROGRESS_S = 0.5
Members = list[tuple[str, bytes]]


@dataclass(frozen=True)
class UnitTask:
    """Import one unit: a dict made by `pipeline.plan_import`.

    tokenizer: settings, as JSON, of the tokenizer that indexes the shards; None for no index.
    """

    out: str
    shard_bytes: int
    prompt: str | None
    domain: str | None
    tokenizer: str | None

    def __call__(self, unit: dict) -> int:
        """Write the missing parts and return the total number of parts. Raises ValueError for a damaged file."""
        journal = Journal(self.out)
        parts = journal.parts(unit["number"])
        if parts and parts[-1].last:
            return len(parts)
        run = _UnitRun(self, unit, journal, len(parts), parts[-1].next if parts else unit["first"])
        try:
            return run.finish()
        finally:
            run.drop()

    @cached_property
    def opened_tokenizer(self) -> Tokenizer | None:
        return None if self.tokenizer is None else tokenizer_of(self.tokenizer)


def tokenizer_of(settings: str) -> Tokenizer:
    """The tokenizer with these settings, as JSON."""
    return Tokenizer.of(json.loads(settings))


class _UnitRun:
    """Writes the parts of one unit, from the record with ordinal `start` on."""

    def __init__(self, task: UnitTask, unit: dict, journal: Journal, number: int, start: int):
        self._task, self._unit, self._journal, self._number = task, unit, journal, number
        self._start, self._next, self._tally = start, start, Tally()
        self._files = MediaFiles(unit["folders"])
        self._container = find_container(unit["container"])
        self._format = find_format(unit["format"]) if unit["format"] else None
        self._writer: TarWriter | None = None
        self._noted = time.monotonic()

    def finish(self) -> int:
        for ordinal, record in self._container.records(self._unit["path"], self._unit, self._start):
            try:
                members, tally = self._sample(ordinal, record)
            except SampleError as error:
                name = f"record {ordinal} of {printable(self._unit['source'])}"
                self._tally.leave_out(error.reason, f"{name}: {error}")
            else:
                if self._writer and self._writer.size + TarWriter.needed(members) > self._task.shard_bytes:
                    self._close(last=False)
                self._writer = self._writer or TarWriter(Path(self._task.out) / self._shard, self._journal.folder)
                self._writer.add(members)
                self._tally.add(tally)
            self._next = ordinal + 1
            self._note(ordinal)
        self._close(last=True)
        return self._number

    def drop(self) -> None:
        if self._writer:
            self._writer.drop()

    @property
    def _shard(self) -> str:
        return f"shard-{self._unit['number']:05}-{self._number:03}.tar"

    def _close(self, last: bool) -> None:
        """Finish the part: close its tar, index it, and record it in the journal, in this order."""
        shard = None
        if self._writer:
            self._writer.close()
            shard, self._tally.bytes = self._shard, self._writer.path.stat().st_size
            self._writer = None
            if (tokenizer := self._task.opened_tokenizer) is not None:
                self._index(Path(self._task.out) / shard, tokenizer)
        self._journal.record(self._unit["number"], self._number, Part(shard, self._next, last, self._tally))
        self._number, self._tally = self._number + 1, Tally()

    def _index(self, path: Path, tokenizer: Tokenizer) -> None:
        from tandem.data.shards.indexing import build_index

        report = build_index(path, tokenizer)
        left = Tally(report.samples, report.images, report.videos, self._tally.bytes)
        left.left_out, left.examples = self._tally.left_out, self._tally.examples
        for reason, n in report.skipped.items():
            left.left_out[reason] += n
            left.examples.setdefault(reason, []).append(f"{path.name}: {report.examples[reason]}")
        self._tally = left

    def _sample(self, ordinal: int, record: Any) -> tuple[Members, Tally]:
        """Return the sample's members and its counts. Raises SampleError."""
        if isinstance(record, SampleError):
            raise record
        if self._format is None:
            members = [(f"{record['key']}.{rest}" if rest else record["key"], data) for rest, data in record["members"]]
            return members, Tally(samples=1)
        if not isinstance(record, dict):
            raise SampleError("no object", f"it is a {type(record).__name__}, not an object")
        if not self._format.fits(record) and (other := format_of(record)):
            sentence = f"it is of format {other.name}, but the file's is {self._format.name}"
            raise SampleError(f"of format {other.name}, not {self._format.name}", sentence)
        try:
            conversation = self._format.conversation(record, self._task.prompt)
        except (KeyError, TypeError, AttributeError) as error:
            raise SampleError("bad record", f"it is not {self._format.what} ({error!r})") from error
        return self._conversation(ordinal, conversation)

    def _conversation(self, ordinal: int, conversation: Conversation) -> tuple[Members, Tally]:
        kinds = [medium.kind for medium in conversation.media]
        _check_placeholders([kind for turn in conversation.turns for kind in placeholders(turn["text"])], kinds)
        key = f"{self._unit['file']:04}-{ordinal:09}"
        media = [self._files.read(medium) for medium in conversation.media]
        content = {"turns": conversation.turns, **conversation.more}
        if self._task.domain is not None:
            content["domain"] = self._task.domain
        try:
            text = json.dumps(content, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise SampleError("bad text", "it has a text with a lone surrogate, which is no character") from error
        if len(text) > MAX_BYTES["json"]:
            raise SampleError("text too long", f"its text has {len(text)} bytes; the limit is {MAX_BYTES['json']}")
        members = [(f"{key}.json", text)]
        members += [(f"{key}.{number}.{ending}", data) for number, (ending, data) in enumerate(media)]
        return members, Tally(1, kinds.count("image"), kinds.count("video"))

    def _note(self, ordinal: int) -> None:
        if time.monotonic() - self._noted > _PROGRESS_S and self._unit["count"]:
            self._noted = time.monotonic()
            self._journal.progress(self._unit["number"], (ordinal + 1 - self._unit["first"]) / self._unit["count"])


def _check_placeholders(found: list[str], kinds: list[str]) -> None:
    """Raise SampleError unless placeholders and media have the same kinds in the same order."""
    if found == kinds:
        return
    for kind in ("image", "video"):
        placed, listed = found.count(kind), kinds.count(kind)
        sentence = (
            f"the text has {placed} <{kind}> placeholder{'s' * (placed != 1)} and "
            f"the record lists {listed} {kind}{'s' * (listed != 1)}"
        )
        if placed < listed:
            raise SampleError(f"no placeholder for {kind}", f"{sentence}; each needs its placeholder")
        if placed > listed:
            raise SampleError(f"no {kind} for placeholder", f"{sentence}; write \\<{kind}> for the text <{kind}>")
    order = f"the text has <{'>, <'.join(found)}>, the record lists {', '.join(kinds)}"
    raise SampleError("media in another order", order)


def first_records(container: str, path: str, unit: dict, most: int) -> Iterator[Any]:
    """Yield the readable ones among the first `most` records of a unit."""
    for _, (_, record) in zip(range(most), find_container(container).records(path, unit, unit["first"]), strict=False):
        if not isinstance(record, SampleError):
            yield record
