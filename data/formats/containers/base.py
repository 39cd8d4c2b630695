"""What a container is: a file, cut into units that workers read on their own, and the records of a unit.

A unit is a JSON value with "first", the ordinal of its first record in the file, and "weight", its share of the work.
Cutting depends on the file and on the number of records a unit may have, and on nothing else.
"""

from collections.abc import Iterator
from pathlib import Path

Found = tuple[int, object]  # ordinal in the file; a record, or a SampleError where one cannot be read


class Container:
    """name: of the module.  endings: of its files.  whole: whether records are samples of shards, with members."""

    name: str
    endings: tuple[str, ...] = ()
    whole = False

    def matches(self, path: str, head: bytes) -> bool:
        """Whether the file at `path`, whose first bytes are `head`, is of this kind; a folder has no first bytes."""
        return path.lower().endswith(self.endings) if self.endings else False

    def prepare(self, path: str, folder: Path, number: int) -> tuple[str, str, str | None]:
        """(container, path, folder of its media or None) to read in the place of `path`. Raises ValueError.

        What has to be written for that goes into `folder`, under names that hold `number`.
        """
        return self.name, path, None

    def units(self, path: str, most: int) -> Iterator[dict]:
        """The units of a file, of at most `most` records where that can be told. Raises ValueError."""
        raise NotImplementedError

    def records(self, path: str, unit: dict, start: int) -> Iterator[Found]:
        """The records of a unit from ordinal `start` on. Raises ValueError for a damaged file."""
        raise NotImplementedError


def not_utf8(what: str, at: int) -> str:
    """The sentence about a text that is in another encoding, seen at a byte."""
    return f"{what} is not UTF-8 at byte {at}; convert it, for example with iconv"
