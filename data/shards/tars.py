"""The samples of an uncompressed tar in webdataset naming, local or remote, one at a time and in order.

    KEY.json  KEY.0.png  KEY.1.mp4  KEY.jpg  KEY.txt  ...     members of a sample adjacent, media ordered by number

Nothing in the tar is trusted: names, sizes and order are checked here, and a damaged or truncated tar ends where it
stops being readable, with the byte. A sample that breaks a rule comes with the reason and is not to be used. Names that
begin with a dot (macOS's "._NAME" among them) are passed over. Tars behind the end mark of the first are read too.
"""

import io
import re
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from tandem.data.media.turns import SampleError
from tandem.data.shards.storage import RangeFile, Section, is_url, shown

MAX_BYTES = {  # of a member, by kind
    "json": 1 << 26,
    "text": 1 << 26,
    "lines": 1 << 28,
    "image": 1 << 28,
    "video": 1 << 31,
    "other": 1 << 31,
}
MAX_HEADER_BYTES = 1 << 20  # of one member, long names included

_MEDIUM = re.compile(r"(?:(\d{1,9})\.)?(?:(png|jpe?g|webp|gif|bmp|tiff?)|(mp4|mkv|webm|mov|avi))", re.IGNORECASE)
_TEXTS = {"json": "json", "txt": "text", "jsonl": "lines"}
_BLOCK = tarfile.BLOCKSIZE
_READ_AHEAD = {False: 1 << 20, True: 1 << 23}  # bytes, by whether the shard is remote
_CHUNK = 1 << 23
_WHOLE = 1 << 26  # bytes up to which a member is kept in memory between its checksum and its use as a file


@dataclass
class Member:
    """The file `name`, KEY.rest, of the tar. `kind` is a key of MAX_BYTES; media may have a number."""

    name: str
    rest: str
    kind: str
    number: int | None
    offset: int
    size: int
    file: RangeFile
    passing: io.BufferedReader  # the pass over the tar, which reads ahead
    taken: Any = None  # what the `take` of TarSamples made of it

    def read(self) -> bytes:
        self.passing.seek(self.offset)
        return self.passing.read(self.size)

    def checksum(self) -> tuple[int, BinaryIO]:
        """(crc32, the member as a file). A large one is not kept: the file reads the parts it needs again."""
        if self.size <= _WHOLE:
            data = self.read()
            return zlib.crc32(data), io.BytesIO(data)
        self.passing.seek(self.offset)
        crc = 0
        for start in range(0, self.size, _CHUNK):
            crc = zlib.crc32(self.passing.read(min(_CHUNK, self.size - start)), crc)
        return crc, io.BufferedReader(Section(self.file, self.offset, self.size), 1 << 17)


@dataclass
class Sample:
    """One key and its members by the rest of their name. `problem` is why it cannot be used, if it cannot; the members
    may then be incomplete.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: SampleError | None = None
    numbered: dict[int, Member] = field(default_factory=dict)
    unnumbered: list[Member] = field(default_factory=list)  # media KEY.jpg

    @property
    def name(self) -> str:
        """For messages."""
        return f"sample {printable(self.key)}"

    @property
    def media(self) -> list[Member]:
        """The media in the order of their numbers, or the only one without a number."""
        if not self.numbered and len(self.unnumbered) == 1:
            return self.unnumbered
        return [self.numbered[number] for number in sorted(self.numbered)]

    def of_kind(self, *kinds: str) -> list[Member]:
        """The members of these kinds, in the order of the kinds, then of the tar."""
        return [member for kind in kinds for member in self.members.values() if member.kind == kind]

    def spoil(self, reason: str, sentence: str = "") -> None:
        """The first problem is the one that is told."""
        self.problem = self.problem or SampleError(reason, sentence or f"{self.name}: {reason}")


class TarSamples:
    """Iterates once over the samples of an open tar.

    `take` is called with every member of a sound sample while the pass is at it, so that what it reads is read once and
    in order; a SampleError that it raises becomes the sample's problem. Members can also be read later, while the file
    is open. `broken` is, after the iteration, None or a sentence with the byte where a damaged tar ends; the sample
    that the end cuts comes with a problem. Raises ValueError if the file is no uncompressed tar.
    """

    def __init__(self, file: RangeFile, take: Callable[[Member], object] | None = None):
        self.broken: str | None = None
        self._file, self._take = file, take
        self._passing: io.BufferedReader = io.BufferedReader(
            Section(file, 0, file.size), _READ_AHEAD[is_url(file.path)]
        )

    def __iter__(self) -> Iterator[Sample]:
        sample, seen = None, set()
        for info in self._infos():
            folder, _, base = info.name.rpartition("/")
            if info.isdir() or base.startswith("."):
                continue
            stem, _, rest = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if sample is None or key != sample.key:
                if sample is not None:
                    yield sample
                sample = Sample(key)
                if key in seen:
                    sentence = f"{sample.name} stands in two places; members of a sample must be adjacent"
                    sample.spoil("members not adjacent", sentence)
                seen.add(key)
            if info.name.startswith("/") or ".." in folder.split("/") or not stem:
                sample.spoil("unsafe name")
            elif not info.isreg() or info.issparse():
                sample.spoil("not a plain file")
            elif rest in sample.members:
                sample.spoil("member twice")
            elif sample.problem is None and self.broken is None:
                self._add(sample, rest, info)
        if sample is not None:
            if self.broken is not None:
                sample.problem = None
                sample.spoil("cut off by the end of the shard")
            yield sample

    def _add(self, sample: Sample, rest: str, info: tarfile.TarInfo) -> None:
        match = _MEDIUM.fullmatch(rest)
        kind, number = _TEXTS.get(rest.lower(), "other"), None
        if match is not None:
            kind, number = "image" if match[2] else "video", None if match[1] is None else int(match[1])
        member = Member(info.name, rest, kind, number, info.offset_data, info.size, self._file, self._passing)
        sample.members[rest] = member
        try:
            if number in sample.numbered:
                raise SampleError("two media share a number", f"there are two media numbered {number}")
            if info.size > MAX_BYTES[kind]:
                sentence = f"the member has {info.size} bytes; the limit is {MAX_BYTES[kind]}"
                raise SampleError("member too large", sentence)
            if number is not None:
                sample.numbered[number] = member
            elif match is not None:
                sample.unnumbered.append(member)
            if self._take is not None:
                member.taken = self._take(member)
        except SampleError as error:
            sample.spoil(error.reason, f"{sample.name}, {printable(info.name)}: {error}")

    def _infos(self) -> Iterator[tarfile.TarInfo]:
        """Headers in order, of all tars in the file. The last one may be that of a member which the end cuts; `broken`
        is set by then."""
        start: int | None = 0
        while start is not None and self.broken is None:
            start = yield from self._archive(start)

    def _archive(self, start: int) -> Generator[tarfile.TarInfo, None, int | None]:
        """Headers of the tar that begins at byte `start`. Returns where the next one begins, None where none does."""
        total = self._file.size
        self._passing.seek(start)
        try:
            headers = cast(BinaryIO, _Headers(self._passing))  # has what tarfile uses of a file
            tar = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 (the caller closes the file)
        except tarfile.TarError as error:
            if start:
                self._damaged_at(start)
                return None
            name = shown(self._file.path)
            hint = f"import other data by python launch/import_data.py {name} --out DIR"
            raise ValueError(f"{name} is not an uncompressed tar file ({error}); {hint}") from error
        while True:
            header = tar.offset
            try:
                info = tar.next()
            except (tarfile.TarError, ValueError, OverflowError, RecursionError):
                info = None
            if info is None:
                break
            tar.members.clear()  # type: ignore[attr-defined]  # not in typeshed; tarfile would keep every header
            if info.size < 0:
                self.broken = f"damaged: a negative size in the tar header at byte {header}; what follows is left out"
                return None
            end = tar.offset if info.issparse() else info.offset_data + info.size  # a sparse one is stored in fewer
            if end > total:
                reach = f"inside {printable(info.name)}, which reaches to {end}"
                self.broken = f"truncated: the file ends at byte {total}, {reach}"
                yield info
                return None
            yield info
        if start and tar.offset == start:
            self._damaged_at(start)
            return None
        return self._behind(tar.offset)

    def _behind(self, at: int) -> int | None:
        """Where another tar begins behind the end mark at byte `at`, None where only zeros follow."""
        self._passing.seek(at)
        block = self._passing.read(_BLOCK)
        if len(block) < _BLOCK:
            self.broken = f"truncated: the file ends at byte {self._file.size} without tar's end mark"
        elif any(block):
            self._damaged_at(at)
        else:
            while block := self._passing.read(_BLOCK):
                at += _BLOCK
                if any(block):
                    return at
        return None

    def _damaged_at(self, at: int) -> None:
        self.broken = f"damaged: no readable tar header at byte {at}; what follows is left out"


class _Headers:
    """The tar as tarfile sees it: it reads headers only, and none of absurd length."""

    def __init__(self, file: io.BufferedReader):
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._read(size)


def printable(name: str) -> str:
    """A name out of a tar, safe to print: control characters and bytes that are no text are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
