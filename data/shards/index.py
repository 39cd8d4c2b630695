"""The index beside a shard: what is in it and where, so that a whole run can be planned before a pixel is read.

`<shard>.index` holds three tables of fixed-size records, a sample's media and a video's events following each other:

    magic | u64 header length | JSON header | zeros to 64 bytes | SAMPLE records | MEDIA records | EVENT records

Nothing in it depends on the resolution, the row length or which roles are trained. Its format says how the members of
a sample are a conversation (data/formats/in_place). data/shards/indexing.py builds it.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tandem.data.shards.storage import base_name, is_url, shown

SUFFIX = ".index"
MAGIC = b"TANDMIDX"
VERSION = 3
IMAGE, VIDEO = 0, 1  # MEDIA.kind
ALIGN = 64

SAMPLE = np.dtype(
    [
        ("text_offset", "<u8"),  # of the json or txt member, or of a line of a jsonl member
        ("text_size", "<u4"),
        ("text_crc", "<u4"),  # zlib.crc32 of these bytes; of media, below, of the member
        ("text_tokens", "<i4"),  # base text: [SOI] and [EOI] of images counted, visual tokens, frames and events not
        ("first_media", "<u4"),
        ("media", "<u2"),
        ("plain", "<u2"),  # 1 where the text is no JSON
        ("group", "<u4"),  # into the header's list of (domain, entity)
    ]
)
MEDIA = np.dtype(
    [
        ("offset", "<u8"),
        ("size", "<u4"),
        ("crc", "<u4"),
        ("height", "<i4"),  # pixels as shown: EXIF orientation or a video's rotation applied
        ("width", "<i4"),
        ("at", "<i4"),  # base text tokens of the sample before this medium's content
        ("duration_ms", "<u4"),  # of a video, as are the fields below
        ("fps", "<f4"),
        ("first_event", "<u4"),  # events reach to the next medium's first
        ("kind", "u1"),
        ("audio", "u1"),
        ("_", "<u2"),
    ]
)
EVENT = np.dtype([("time_ms", "<u4"), ("tokens", "<u4")])


@dataclass(frozen=True, slots=True)
class Group:
    """Samples of one domain and one entity (None: they name none)."""

    domain: str
    entity: str | None
    samples: int


@dataclass(frozen=True)
class ShardIndex:
    """Header of one index. Groups are read and record arrays are mapped when asked for, and not kept."""

    shard: str  # path or address of the tar
    path: str  # of the index
    shard_bytes: int
    stamp: str  # of a remote shard: what its store said of its version
    tokenizer_sha256: str
    n_samples: int
    n_media: int
    n_events: int
    skipped: dict[str, int]  # reason -> samples left out
    broken: str | None  # a sentence with the byte where a damaged tar ends
    format: str  # of data/formats/in_place
    prompt: str | None  # the user's turn of a pair, None for the placeholder alone
    untrained: int  # samples without a turn of the assistant
    found: dict[str, int]  # members by the ends of their names
    looks_like: str | None  # the format that most of the first samples fit
    digest: str  # of the format, the prompt and the records
    records_at: int

    @property
    def groups(self) -> tuple[Group, ...]:
        header, _ = read_framed(self.path, MAGIC, VERSION, "a shard index", _again(self.shard))
        return _groups(header)

    @property
    def samples(self) -> np.ndarray:
        return self._map(SAMPLE, 0, self.n_samples)

    @property
    def media(self) -> np.ndarray:
        return self._map(MEDIA, self.n_samples * SAMPLE.itemsize, self.n_media)

    @property
    def events(self) -> np.ndarray:
        return self._map(EVENT, self.n_samples * SAMPLE.itemsize + self.n_media * MEDIA.itemsize, self.n_events)

    def _map(self, dtype: np.dtype, offset: int, count: int) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype)
        return np.memmap(self.path, dtype, "r", self.records_at + offset, (count,))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load_index(shard: str | Path, tokenizer_sha256: str, path: str | Path | None = None) -> ShardIndex:
    """Read the index of a shard, `<shard>.index` where no path is given.

    Raises ValueError if it is absent, damaged, older than the shard, of another shard, or made with another tokenizer.
    A remote shard itself is not looked at: the checksum of every member read tells whether it changed.
    """
    index, _ = load_header(shard, tokenizer_sha256, path)
    with open(index.path, "rb") as file:
        file.seek(index.records_at)
        seen = hashlib.file_digest(file, lambda: _new_digest(index.format, index.prompt)).hexdigest()
    if seen != index.digest:
        raise ValueError(f"{index.path} is damaged: its records do not have their checksum; {_again(index.shard)}")
    return index


def load_header(
    shard: str | Path, tokenizer_sha256: str, path: str | Path | None = None
) -> tuple[ShardIndex, tuple[Group, ...]]:
    """As `load_index`, with the groups, and with the records left unread and unchecked."""
    shard, path = str(shard), str(path or f"{shard}{SUFFIX}")
    again = _again(shard)
    if not is_url(shard) and not os.path.isfile(shard):
        raise ValueError(f"shard {shard} does not exist")
    if is_url(path):
        raise ValueError(f"shard {shown(shard)} is remote, so its index needs a file here; {again}")
    if not os.path.isfile(path):
        raise ValueError(f"{shown(shard)} has no index{'' if path == shard + SUFFIX else f' {path}'}; {again}")
    header, records_at = read_framed(path, MAGIC, VERSION, "a shard index", again)
    try:
        n_samples, n_media, n_events = header["samples"], header["media"], header["events"]
        whole = records_at + n_samples * SAMPLE.itemsize + n_media * MEDIA.itemsize + n_events * EVENT.itemsize
        index = ShardIndex(
            shard=shard,
            path=path,
            n_samples=n_samples,
            n_media=n_media,
            n_events=n_events,
            records_at=records_at,
            **{name: header[name] for name in _HEADER_FIELDS},
        )
        name, groups = header["shard"], _groups(header)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} has a damaged header; {again}") from error
    size = os.path.getsize(path)
    if size != whole:
        raise ValueError(f"{path} is damaged: {size} bytes where its header promises {whole}; {again}")
    if name != base_name(shard):
        raise ValueError(f"{path} is the index of {name!r}, not of {shown(shard)}; {again}")
    _check_shard(index, again)
    if index.tokenizer_sha256 != tokenizer_sha256:
        seen = f"sha256 {index.tokenizer_sha256[:12]}..., not {tokenizer_sha256[:12]}..."
        raise ValueError(f"the index of {shown(shard)} was made with another tokenizer ({seen}); {again}")
    return index, groups


_HEADER_FIELDS = (
    "shard_bytes",
    "stamp",
    "tokenizer_sha256",
    "skipped",
    "broken",
    "format",
    "prompt",
    "untrained",
    "found",
    "looks_like",
    "digest",
)


def _groups(header: dict) -> tuple[Group, ...]:
    return tuple(Group(*group) for group in header["groups"])


def _check_shard(index: ShardIndex, again: str) -> None:
    if is_url(index.shard):
        return
    stat = os.stat(index.shard)
    if stat.st_size != index.shard_bytes:
        seen = f"the shard has {stat.st_size} bytes, the index was made for {index.shard_bytes}"
        raise ValueError(f"the index of {index.shard} belongs to another file ({seen}); {again}")
    if os.stat(index.path).st_mtime_ns < stat.st_mtime_ns:
        raise ValueError(f"the index of {index.shard} is older than the shard; {again}")


def _again(shard: str) -> str:
    more = " --index-dir DIR --catalog FILE" if is_url(shard) else ""
    return f"run python launch/index_shards.py {shown(shard)} --tokenizer FILE{more}"


def _new_digest(format: str, prompt: str | None):
    """Of turns it is that of the records alone: streams of before there were other formats go on."""
    first = b"" if (format, prompt) == ("turns", None) else json.dumps([format, prompt]).encode()
    return hashlib.blake2b(first, digest_size=8)


# ---------------------------------------------------------------------------------------------------------------------
# Writing; and the frame of both indexes and catalogs: magic | u64 header length | JSON header | zeros to 64 | arrays


def write_index(path: str, header: dict, samples: np.ndarray, media: np.ndarray, events: np.ndarray) -> None:
    """Write an index; `header` says all but the counts and the checksums. The file appears whole or not at all."""
    digest = _new_digest(header["format"], header["prompt"])
    for records in (samples, media, events):
        digest.update(records)
    counts = {"samples": len(samples), "media": len(media), "events": len(events)}
    header = header | counts | {"version": VERSION, "digest": digest.hexdigest()}
    write_framed(path, MAGIC, header, (samples, media, events))


def write_framed(path: str, magic: bytes, header: dict, arrays: Iterable[np.ndarray]) -> None:
    """Write a header, which gets a checksum, and arrays behind it. The file appears whole or not at all."""
    text = json.dumps(header | {"check": _check(header)}).encode()
    head = magic + len(text).to_bytes(8, "little") + text
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(head + bytes(-len(head) % ALIGN))
            for array in arrays:
                file.write(np.ascontiguousarray(array).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_framed(path: str, magic: bytes, version: int, what: str, again: str) -> tuple[dict, int]:
    """(header, byte where the arrays begin). Raises ValueError, saying `what` the file is not and to do `again`."""
    with open(path, "rb") as file:
        if file.read(len(magic)) != magic:
            raise ValueError(f"{path} is not {what}; {again}")
        length = int.from_bytes(file.read(8), "little")
        text = file.read(min(length, os.fstat(file.fileno()).st_size))
    try:
        header = json.loads(text)
        if header["version"] != version:
            raise ValueError(f"{path} has version {header['version']}, this code reads version {version}; {again}")
        check = header.pop("check")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header; {again}") from error
    if check != _check(header):
        raise ValueError(f"{path} has a damaged header: it does not have its checksum; {again}")
    return header, -(-(len(magic) + 8 + length) // ALIGN) * ALIGN


def _check(header: dict) -> int:
    return zlib.crc32(json.dumps(header, sort_keys=True).encode())
