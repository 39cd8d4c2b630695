"""One JSON list of records, as LLaVA's files are. The file is read in blocks, and never whole."""

import codecs
import json
import os
from collections.abc import Iterator

from tandem.data.formats.containers.base import Container, Found, not_utf8

_BLOCK = 1 << 20  # bytes
_LONGEST = 1 << 28  # characters of a record
_SPACE = " \t\r\n"
_CUT = 16  # characters before the end of a block in which an error may come from the end itself
_DECODER = json.JSONDecoder()


class ArrayContainer(Container):
    name = "array"
    endings = (".json",)

    def matches(self, path: str, head: bytes) -> bool:
        return super().matches(path, head) and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"")

    def units(self, path: str, most: int) -> Iterator[dict]:
        start = first = count = 0
        at = end = 0
        for _, at, end in _Scan(path, None, os.path.getsize(path)):
            if count == 0:
                start = at
            count += 1
            if count == most:
                yield {"first": first, "start": start, "end": end, "weight": end - start}
                first, count = first + count, 0
        if count:
            yield {"first": first, "start": start, "end": end, "weight": end - start}

    def records(self, path: str, unit: dict, start: int) -> Iterator[Found]:
        for ordinal, (record, _, _) in enumerate(_Scan(path, unit["start"], unit["end"]), unit["first"]):
            if ordinal >= start:
                yield ordinal, record


class _Scan:
    """Iterates over (record, first byte, byte behind it) of a list, or of the part of one between two bytes."""

    def __init__(self, path: str, start: int | None, end: int):
        self._path, self._opening, self._end = path, start is None, end
        self._at = start or 0  # byte of the file at which the text left begins
        self._text, self._pos = "", 0  # what was read and not yet used: text[pos:]
        self._ended = False

    def __iter__(self) -> Iterator[tuple[object, int, int]]:
        with open(self._path, "rb") as file:
            file.seek(self._at)
            self._file, self._read = file, self._at
            self._decoder = codecs.getincrementaldecoder("utf-8")()
            if self._opening:
                self._open_list()
            while self._next_character() not in ("", "]"):
                if self._text[self._pos] == ",":
                    self._skip(1)
                    continue
                at, record = self._at, self._record()
                yield record, at, self._at
            if self._opening and self._next_character() != "]":
                raise ValueError(f"{self._path} ends at byte {self._at} within its list; is it downloaded whole?")

    def _open_list(self) -> None:
        if self._next_character() == "\ufeff":
            self._skip(1)
        if self._next_character() != "[":
            raise ValueError(f"{self._path} does not begin with a list of records")
        self._skip(1)

    def _record(self) -> object:
        while True:
            try:
                record, end = _DECODER.raw_decode(self._text, self._pos)
            except (json.JSONDecodeError, RecursionError) as error:
                open_end = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos > len(self._text) - _CUT
                )
                if open_end and len(self._text) - self._pos < _LONGEST and self._more():
                    continue
                place = f"the record that begins at byte {self._at}"
                raise ValueError(f"{self._path} is damaged or cut in {place}: {error}") from error
            self._skip(end - self._pos)
            return record

    def _next_character(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            space = self._pos
            while space < len(self._text) and self._text[space] in _SPACE:
                space += 1
            self._skip(space - self._pos)
            if self._pos < len(self._text):
                return self._text[self._pos]
            if not self._more():
                return ""

    def _skip(self, characters: int) -> None:
        self._at += len(self._text[self._pos : self._pos + characters].encode())
        self._pos += characters

    def _more(self) -> bool:
        """Read on; False at the end. A record of several blocks is read in ever larger ones."""
        left = self._text[self._pos :]
        data = self._file.read(min(max(_BLOCK, len(left)), self._end - self._read))
        if not data:
            return False
        try:
            self._text, self._pos = left + self._decoder.decode(data), 0
        except UnicodeDecodeError as error:
            at = self._read + error.start
            raise ValueError(not_utf8(self._path, at)) from error
        self._read += len(data)
        return True


CONTAINER = ArrayContainer()
