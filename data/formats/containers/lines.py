"""JSON Lines: a JSON object per line, in .jsonl files, also compressed as .gz or .zst, and in such .json files.

A plain file is cut into units at line ends; a compressed file is one unit, read in order.
"""

import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import IO, cast

from tandem.data.formats.containers.base import Container, Found, not_utf8
from tandem.data.media.turns import SampleError

_BLOCK = 1 << 20
MAX_LINE_BYTES = 1 << 28
_PACKED = (".gz", ".zst", ".zstd")


class LinesContainer(Container):
    name = "lines"
    endings = (".jsonl", ".ndjson", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".jsonl.zstd")

    def matches(self, path: str, head: bytes) -> bool:
        return super().matches(path, head) or (path.lower().endswith(".json") and _first_is_object(head))

    def units(self, path: str, most: int) -> Iterator[dict]:
        size = os.path.getsize(path)
        if path.lower().endswith(_PACKED):
            yield {"first": 0, "start": 0, "end": None, "weight": size}
            return
        start = first = lines = at = 0
        with open(path, "rb") as file:
            while block := file.read(_BLOCK):
                found = -1
                while (found := block.find(b"\n", found + 1)) >= 0:
                    lines += 1
                    if lines == most:
                        end = at + found + 1
                        yield {"first": first, "start": start, "end": end, "weight": end - start}
                        start, first, lines = end, first + lines, 0
                at += len(block)
        if start < size:
            yield {"first": first, "start": start, "end": size, "weight": size - start}

    def records(self, path: str, unit: dict, start: int) -> Iterator[Found]:
        with opened(path) as file:
            if unit["start"]:
                file.seek(unit["start"])
            at, ordinal = unit["start"], unit["first"]
            while unit["end"] is None or at < unit["end"]:
                try:
                    line, length = _next_line(file)
                except (OSError, EOFError, ValueError) as error:
                    message = f"{path} cannot be read after byte {at} of its decompressed data: {error}"
                    raise ValueError(message) from error
                if not length:
                    break
                if ordinal >= start and (line is None or line.strip()):
                    yield ordinal, _too_long(length, at) if line is None else parse(line, at)
                at, ordinal = at + length, ordinal + 1


def _next_line(file: IO[bytes]) -> tuple[bytes | None, int]:
    """(the next line, its bytes): None for a line above MAX_LINE_BYTES, which is skipped to its end."""
    line = file.readline(MAX_LINE_BYTES + 1)
    length = len(line)
    if length <= MAX_LINE_BYTES:
        return line, length
    while line and not line.endswith(b"\n"):
        line = file.readline(_BLOCK)
        length += len(line)
    return None, length


def _too_long(length: int, at: int) -> SampleError:
    return SampleError("line too long", f"its line, at byte {at}, has {length} bytes; the limit is {MAX_LINE_BYTES}")


def parse(line: bytes, at: int) -> object:
    """Return the JSON value of the line at byte `at`, or a SampleError if it is not valid."""
    try:
        return json.loads(line.decode("utf-8-sig" if at == 0 else "utf-8"))
    except UnicodeDecodeError as error:
        return SampleError("not UTF-8", not_utf8("its line", at + error.start))
    except (ValueError, RecursionError) as error:
        return SampleError("bad json", f"its line, at byte {at}, is not JSON: {error}")


@contextmanager
def opened(path: str) -> Iterator[IO[bytes]]:
    """Open a file for reading, decompressing .gz and .zst. Raises ValueError if pyarrow is needed and not installed."""
    if path.lower().endswith((".gz", ".tgz")):
        with gzip.open(path) as packed:
            yield cast(IO[bytes], packed)
    elif path.lower().endswith(_PACKED):
        with pyarrow_for(path).input_stream(path, compression="zstd") as stream, io.BufferedReader(stream) as unpacked:
            yield unpacked
    else:
        with open(path, "rb") as file:
            yield file


def pyarrow_for(path: str) -> ModuleType:
    """Import pyarrow. Raises ValueError, naming the file that needs it, if it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow, which is not installed: pip install 'tandem[import]'") from error
    return pyarrow


def _first_is_object(head: bytes) -> bool:
    """Whether the first line is a complete JSON object, or is longer than `head` and may be one."""
    line, end, _ = head.removeprefix(b"\xef\xbb\xbf").lstrip().partition(b"\n")
    if not line.startswith(b"{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return not end


CONTAINER = LinesContainer()
