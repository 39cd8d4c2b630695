"""The index beside a shard: what is in it and where, so that a whole run can be planned before a pixel is read.

`<shard>.idx` is built in one sequential pass over a plain tar in webdataset naming (KEY.json, KEY.0.png, KEY.1.jpg ...,
members of a sample adjacent, images ordered by number; other members are ignored):

    magic | u64 header length | JSON header | zeros to 64 bytes | SAMPLE records | IMAGE records

Nothing in it depends on the resolution, the row length or which roles are trained. Damaged samples are left out and
counted by reason.
"""

import glob
import io
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import braceexpand
import numpy as np

from data.image import MAX_PIXELS, ImageError, image_size
from data.text import SampleError, Tokenizer

SUFFIX = ".idx"
MAGIC = b"TANDMIDX"
VERSION = 1
MAX_MEMBER_BYTES = 1 << 31
UNLABELLED = "unlabelled"  # domain of a sample whose json names none

SAMPLE = np.dtype(
    [
        ("json_offset", "<u8"),
        ("json_size", "<u4"),
        ("text_tokens", "<i4"),  # [SOI] and [EOI] counted, visual tokens not
        ("first_image", "<i8"),
        ("images", "<i4"),
        ("domain", "<i4"),  # into the header's list
    ]
)
IMAGE = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("height", "<i4"),  # pixels as shown, EXIF orientation applied
        ("width", "<i4"),
        ("image_at", "<i4"),  # text tokens of the sample before this image's visual tokens
    ]
)

_IMAGE_MEMBER = re.compile(r"(\d{1,9})\.(png|jpe?g|webp|gif|bmp|tiff?)", re.IGNORECASE)
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class ShardIndex:
    """Header of one index. The record arrays are mapped when asked for and unmapped with the last reference."""

    shard: str
    shard_bytes: int
    tokenizer_sha256: str
    domains: tuple[str, ...]
    n_samples: int
    n_images: int
    records_at: int

    @property
    def samples(self) -> np.ndarray:
        return self._map(SAMPLE, self.records_at, self.n_samples)

    @property
    def images(self) -> np.ndarray:
        return self._map(IMAGE, self.records_at + self.n_samples * SAMPLE.itemsize, self.n_images)

    def _map(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self.shard + SUFFIX, dtype, "r", offset, (count,))


@dataclass
class IndexReport:
    """What indexing one shard found. `broken` is a sentence with the byte where a damaged tar ends, else None."""

    shard: str
    samples: int = 0
    images: int = 0
    skipped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> sentence about the first such sample
    broken: str | None = None

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        out = [f"{self.shard}: {self.samples} samples, {self.images} images"]
        out += [f"  skipped {n}: {reason} (first: {self.examples[reason]})" for reason, n in self.skipped.items()]
        return out + ([f"  {self.broken}"] if self.broken else [])


# ---------------------------------------------------------------------------------------------------------------------
# Building


def build_index(shard: str | Path, tokenizer: Tokenizer) -> IndexReport:
    """Write `<shard>.idx` in one pass over the shard. Raises ValueError if the file is not an uncompressed tar."""
    shard = str(shard)
    report = IndexReport(shard)
    samples, images, domains = [], [], {}
    with open(shard, "rb") as file:
        for key, members in _grouped(_members(file, report), report):
            try:
                text_tokens, domain, json_member, found = _read_sample(file, key, members, tokenizer)
            except SampleError as error:
                _skip(report, error.reason, str(error))
                continue
            domain_id = domains.setdefault(domain, len(domains))
            samples.append((json_member.offset_data, json_member.size, text_tokens, len(images), len(found), domain_id))
            images += found
        shard_bytes = os.fstat(file.fileno()).st_size
    report.samples, report.images = len(samples), len(images)
    header = {
        "version": VERSION,
        "shard_bytes": shard_bytes,
        "tokenizer_sha256": tokenizer.sha256,
        "domains": list(domains),
        "samples": len(samples),
        "images": len(images),
    }
    _write(shard + SUFFIX, header, np.array(samples, SAMPLE), np.array(images, IMAGE))
    return report


def _members(file: io.BufferedReader, report: IndexReport) -> Iterator[tarfile.TarInfo]:
    """Members in order. A damaged or truncated tar ends early, with report.broken set; the last member may be cut."""
    total = os.fstat(file.fileno()).st_size
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 (the caller closes the file)
    except tarfile.TarError as error:
        raise ValueError(f"{report.shard} is not an uncompressed tar file: {error}") from error
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, ValueError, OSError):
            member = None
        if member is None:
            break
        tar.members.clear()  # tarfile would keep every header
        if member.offset_data + member.size > total:
            needed = member.offset_data + member.size
            report.broken = f"truncated: the file ends at byte {total}, inside {member.name}, which reaches to {needed}"
            yield member
            return
        yield member
    file.seek(tar.offset)
    end = file.read(_BLOCK)
    if len(end) < _BLOCK:
        report.broken = f"truncated: the file ends at byte {total} without tar's end mark"
    elif any(end):
        report.broken = f"damaged: no readable tar header at byte {tar.offset}; what follows is left out"


def _grouped(
    members: Iterable[tarfile.TarInfo], report: IndexReport
) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """(key, {rest of the name: member}) of adjacent members; samples with unusable names are skipped and counted."""
    key, group, reason, seen = None, {}, None, set()
    for member in members:
        if member.isdir():
            continue
        folder, _, base = member.name.rpartition("/")
        stem, _, rest = base.partition(".")
        new_key = f"{folder}/{stem}"
        if new_key != key:
            yield from _finish(key, group, reason, report)
            key, group, reason = new_key, {}, None
            if key in seen:
                reason = "members not adjacent"
            seen.add(key)
        if member.name.startswith("/") or ".." in folder.split("/") or not stem or base.startswith(".."):
            reason = "unsafe name"
        elif not member.isreg():
            reason = "not a plain file"
        elif member.size > MAX_MEMBER_BYTES:
            reason = "member too large"
        elif rest in group:
            reason = "member twice"
        group[rest] = member
    if report.broken is None:
        yield from _finish(key, group, reason, report)
    elif key is not None:
        _skip(report, "cut off by the end of the shard", f"sample {key}")


def _finish(key, group, reason, report) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    if reason is not None:
        _skip(report, reason, f"sample {key}")
    elif key is not None:
        yield key, group


def _skip(report: IndexReport, reason: str, sentence: str) -> None:
    report.skipped[reason] += 1
    report.examples.setdefault(reason, sentence)


def _read_sample(file: io.BufferedReader, key: str, members: dict[str, tarfile.TarInfo], tokenizer: Tokenizer):
    """(text tokens, domain, json member, IMAGE records) of one sample. Raises SampleError."""
    name = f"sample {key.removeprefix('/')}"
    json_member = members.get("json")
    if json_member is None:
        raise SampleError("no json", f"{name} has no .json member")
    file.seek(json_member.offset_data)
    content = parse_sample(file.read(json_member.size), name)

    numbered = {}
    for rest, member in members.items():
        match = _IMAGE_MEMBER.fullmatch(rest)
        if match and int(match[1]) in numbered:
            raise SampleError("two images share a number", f"{name} has two images numbered {match[1]}")
        if match:
            numbered[int(match[1])] = member
    encoded = tokenizer.encode_sample(content["turns"], (), len(numbered), name)

    found = []
    for (_, member), image_at in zip(sorted(numbered.items()), encoded.image_at_I, strict=True):
        try:
            height, width = image_size(_Section(file, member.offset_data, member.size), MAX_PIXELS)
        except ImageError as error:
            raise SampleError("unreadable image", f"{name}, {member.name}: {error}") from error
        found.append((member.offset_data, member.size, height, width, int(image_at)))
    return len(encoded.tokens_T), content.get("domain", UNLABELLED), json_member, found


def parse_sample(data: bytes, name: str) -> dict:
    """A sample's json as {"turns": [...], "domain": str, ...}. Raises SampleError, calling the sample `name`."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad json", f"{name} has a json member that cannot be parsed: {error}") from error
    if not isinstance(content, dict) or "turns" not in content:
        raise SampleError("bad json", f'{name} has a json member that is not an object with "turns"')
    if not isinstance(content.get("domain", UNLABELLED), str):
        raise SampleError("bad json", f"{name} has a domain that is not a string")
    return content


class _Section(io.RawIOBase):
    """One member of the open shard as a file of its own, so that reading an image's header reads little else."""

    def __init__(self, file: io.BufferedReader, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        self._file.seek(self._start + self._at)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _write(path: str, header: dict, samples: np.ndarray, images: np.ndarray) -> None:
    text = json.dumps(header).encode()
    head = MAGIC + len(text).to_bytes(8, "little") + text
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(head + bytes(-len(head) % 64))
            file.write(samples.tobytes())
            file.write(images.tobytes())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_index(shard: str | Path, tokenizer_sha256: str) -> ShardIndex:
    """Read the index of a shard. Raises ValueError if it is absent, older than the shard, or made otherwise."""
    shard = str(shard)
    again = f"run python launch/index_shards.py {shard} --tokenizer FILE"
    if not os.path.isfile(shard):
        raise ValueError(f"shard {shard} does not exist")
    if not os.path.isfile(shard + SUFFIX):
        raise ValueError(f"{shard} has no index; {again}")
    header, records_at = _read_header(shard + SUFFIX, again)
    stat = os.stat(shard)
    if stat.st_size != header["shard_bytes"]:
        seen = f"the shard has {stat.st_size} bytes, the index was made for {header['shard_bytes']}"
        raise ValueError(f"the index of {shard} belongs to another file ({seen}); {again}")
    if stat.st_mtime_ns > os.stat(shard + SUFFIX).st_mtime_ns:
        raise ValueError(f"the index of {shard} is older than the shard; {again}")
    if header["tokenizer_sha256"] != tokenizer_sha256:
        seen = f"sha256 {header['tokenizer_sha256'][:12]}..., not {tokenizer_sha256[:12]}..."
        raise ValueError(f"the index of {shard} was made with another tokenizer ({seen}); {again}")
    return ShardIndex(
        shard=shard,
        shard_bytes=header["shard_bytes"],
        tokenizer_sha256=tokenizer_sha256,
        domains=tuple(header["domains"]),
        n_samples=header["samples"],
        n_images=header["images"],
        records_at=records_at,
    )


def _read_header(path: str, again: str) -> tuple[dict, int]:
    """(header, byte where the records begin), after checking that the file is whole."""
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError(f"{path} is not a shard index; {again}")
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        text = file.read(min(length, size))
    records_at = -(-(len(MAGIC) + 8 + length) // 64) * 64
    try:
        header = json.loads(text)
        if header["version"] != VERSION:
            raise ValueError(f"{path} has version {header['version']}, this code reads version {VERSION}; {again}")
        whole = records_at + header["samples"] * SAMPLE.itemsize + header["images"] * IMAGE.itemsize
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged header; {again}") from error
    if size != whole:
        raise ValueError(f"{path} is damaged: {size} bytes where its header promises {whole}; {again}")
    return header, records_at


def expand_shards(patterns: Iterable[str]) -> list[str]:
    """Files named by paths with {0000..0012} braces and * ? globs, in the order given, globs sorted.

    Raises ValueError for a pattern that matches nothing, a missing file, a file named twice, or a URL: an index needs
    a file that can be read at any place.
    """
    shards = []
    for pattern in patterns:
        pattern = str(pattern)
        if re.match(r"[a-z0-9+]+:", pattern, re.IGNORECASE):
            raise ValueError(f"shard {pattern!r} is a URL or pipe; copy it to a local or mounted file first")
        try:
            expanded = list(braceexpand.braceexpand(pattern))
        except braceexpand.UnbalancedBracesError as error:
            raise ValueError(f"shard pattern {pattern!r} has unbalanced braces") from error
        for path in expanded:
            shards += _matching(path, pattern)
    for path, times in Counter(shards).items():
        if times > 1:
            raise ValueError(f"shard {path} is named twice; its samples would be repeated")
    return shards


def _matching(path: str, pattern: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if not any(letter in path for letter in "*?["):
        raise ValueError(f"shard {path} (from {pattern!r}) does not exist")
    found = sorted(match for match in glob.glob(path) if os.path.isfile(match))
    if not found:
        raise ValueError(f"shard pattern {pattern!r} matches no file")
    return found
