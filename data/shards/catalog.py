"""The shards of one source, known without opening them: how many samples each has, of which domains and entities.

    shard k:  name, bytes, samples, its rows    row x of a shard:  domain, entity, samples of both

A catalog is gathered from the headers of the shards' indexes, or mapped from one file in which that was stored:

    magic | u64 header length | JSON header | zeros to 64 bytes | arrays, each padded to 64 bytes

Nothing in it grows with the number of samples, and of a mapped one only the parts in use are in memory.

Shapes: K shards, X rows (shard, domain, entity), E entities.
"""

import glob
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import braceexpand
import numpy as np

from tandem.data.shards.index import ALIGN, SUFFIX, ShardIndex, load_header, load_index, read_framed, write_framed
from tandem.data.shards.storage import base_name, check_path, is_url, shown

CATALOG_SUFFIX = ".catalog"
CATALOG_MAGIC = b"TANDMCAT"
CATALOG_VERSION = 2

_AGAIN = "write it again with python launch/index_shards.py SHARDS --tokenizer FILE --catalog FILE"
_IMPORT = "import other data by python launch/import_data.py {} --out DIR"
_ARRAYS = {  # those of shards first; K of each, K + 1 where an array says where something starts
    "samples": "<i8",
    "shard_bytes": "<i8",
    "index_digest": "<u8",
    "shard_check": "<u4",
    "group_start": "<i8",
    "name_start": "<i8",
    "index_start": "<i8",
    "name": "u1",
    "index": "u1",
    "group_domain": "<i4",
    "group_entity": "<i4",
    "group_samples": "<i8",
    "group_base": "<i8",
    "entity_samples": "<i8",
}
_CHECKED_ON_OPENING = (
    "samples",
    "shard_bytes",
    "index_digest",
    "shard_check",
    "group_start",
    "name_start",
    "index_start",
)


class Catalog:
    """One source. `group_*` are rows of all shards, those of shard k at group_start_K1[k] to [k + 1], in the order of
    the groups of its index; `group_base_X` counts the samples of the same entity in earlier rows.
    """

    def __init__(self, header: dict, arrays: dict[str, np.ndarray], folder: str = ""):
        """header: tokenizer_sha256, formats, domains, digest. Names of shards that are no full paths are below
        `folder`."""
        self.tokenizer_sha256: str = header["tokenizer_sha256"]
        self.formats: tuple[str, ...] = tuple(header["formats"])  # of the shards, each once
        self.domains: tuple[str, ...] = tuple(header["domains"])
        self.digest: int = header["digest"]  # 63 bits of what fixes the order of samples; where shards lie does not
        self._arrays, self._folder = arrays, folder
        self.samples_K: np.ndarray = arrays["samples"]
        self.shard_bytes_K: np.ndarray = arrays["shard_bytes"]
        self.group_start_K1: np.ndarray = arrays["group_start"]
        self.group_domain_X: np.ndarray = arrays["group_domain"]
        self.group_entity_X: np.ndarray = arrays["group_entity"]  # -1: none
        self.group_samples_X: np.ndarray = arrays["group_samples"]
        self.group_base_X: np.ndarray = arrays["group_base"]
        self.entity_samples_E: np.ndarray = arrays["entity_samples"]
        self.n_shards, self.n_entities = len(self.samples_K), len(self.entity_samples_E)
        self.n_samples = int(self.samples_K.sum())

    def shard(self, k: int) -> str:
        """Path or address of a shard."""
        shard = self._placed(self._text("name", k))
        check_path(shard)
        return shard

    def index_path(self, k: int) -> str:
        """Path of a shard's index."""
        return self._placed(self._text("index", k)) or self.shard(k) + SUFFIX

    def index(self, k: int) -> ShardIndex:
        """The index of a shard, read and checked. Raises ValueError, also where the catalog does not fit to it."""
        shard = self.shard(k)
        if "shard_check" in self._arrays and self._arrays["shard_check"][k] != _shard_checks(self._arrays, k, k + 1)[0]:
            raise ValueError(f"the catalog's entry of shard {shown(shard)} is damaged; {_AGAIN}")
        index = load_index(shard, self.tokenizer_sha256, self.index_path(k))
        if int(index.digest, 16) != self._arrays["index_digest"][k]:
            raise ValueError(f"{index.path} changed since it entered the catalog; {_AGAIN}")
        return index

    def _text(self, name: str, k: int) -> str:
        start, end = self._arrays[f"{name}_start"][k : k + 2]
        return os.fsdecode(self._arrays[name][start:end].tobytes())

    def _placed(self, name: str) -> str:
        return name if not name or is_url(name) else os.path.join(self._folder, name)


def open_catalog(patterns: Sequence[str], tokenizer_sha256: str) -> Catalog:
    """The catalog of the shards named by paths, braces and globs, or the one stored in a single .catalog file.

    Raises ValueError for what is missing, damaged, older than its shard or made with another tokenizer.
    """
    stored = [pattern for pattern in patterns if str(pattern).endswith(CATALOG_SUFFIX)]
    if not stored:
        return gather_catalog(expand_shards(patterns), tokenizer_sha256)
    if len(patterns) > 1:
        raise ValueError(f"{stored[0]} stands among {len(patterns)} names; a source has one catalog, or shards")
    catalog = _read_catalog(str(stored[0]))
    if catalog.tokenizer_sha256 != tokenizer_sha256:
        seen = f"sha256 {catalog.tokenizer_sha256[:12]}..., not {tokenizer_sha256[:12]}..."
        raise ValueError(f"catalog {stored[0]} was made with another tokenizer ({seen}); {_AGAIN}")
    return catalog


# ---------------------------------------------------------------------------------------------------------------------
# From the headers of indexes


def gather_catalog(
    shards: Sequence[str], tokenizer_sha256: str, index_paths: Sequence[str | None] | None = None
) -> Catalog:
    """The catalog of shards from the headers of their indexes (`<shard>.index` where no path is given).

    Raises ValueError, also for a shard without a usable sample.
    """
    index_paths = index_paths or [None] * len(shards)
    domains: dict[str, int] = {}
    entities: dict[str, int] = {}
    shard_rows, rows, names, formats = [], [], [], set()
    for shard, path in zip(shards, index_paths, strict=True):
        index, groups = load_header(shard, tokenizer_sha256, path)
        if index.n_samples == 0:
            held = ", ".join(f"{n} {ending}" for ending, n in index.found.items()) or "no member"
            like = f", which looks like format {index.looks_like}" if index.looks_like else ""
            raise ValueError(
                f"shard {shown(shard)} holds no usable sample of format {index.format}: it has {held}{like}"
            )
        formats.add(index.format)
        shard_rows.append((index.n_samples, index.shard_bytes, int(index.digest, 16), len(groups)))
        names.append((shard, "" if index.path == shard + SUFFIX else index.path))
        for group in groups:
            domain = domains.setdefault(group.domain, len(domains))
            entity = -1 if group.entity is None else entities.setdefault(group.entity, len(entities))
            rows.append((domain, entity, group.samples))
    samples_K, bytes_K, digest_K, groups_K = np.array(shard_rows, np.uint64).reshape(-1, 4).T.copy()
    domain_X, entity_X, samples_X = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    ordered = sorted(domains)
    rank_D = np.argsort(np.array([domains[name] for name in ordered], np.int64)).astype("<i4")
    base_X, samples_E = _ordinals(entity_X, samples_X, len(entities))
    arrays = {
        "samples": samples_K.astype("<i8"),
        "shard_bytes": bytes_K.astype("<i8"),
        "index_digest": digest_K,
        "group_start": np.concatenate([[0], np.cumsum(groups_K)]).astype("<i8"),
        "group_domain": rank_D[domain_X],
        "group_entity": entity_X.astype("<i4"),
        "group_samples": samples_X,
        "group_base": base_X,
        "entity_samples": samples_E,
        **_texts(names),
    }
    digest = _digest([base_name(shard) for shard in shards], ordered, arrays)
    header = {"tokenizer_sha256": tokenizer_sha256, "formats": sorted(formats), "domains": ordered, "digest": digest}
    return Catalog(header, arrays)


def _ordinals(entity_X: np.ndarray, samples_X: np.ndarray, n_entities: int) -> tuple[np.ndarray, np.ndarray]:
    """(samples of the same entity in earlier rows [X], samples of each entity [E]), int64."""
    order_X = np.flatnonzero(entity_X >= 0)
    order_X = order_X[np.argsort(entity_X[order_X], kind="stable")]
    before_X = np.cumsum(samples_X[order_X]) - samples_X[order_X]
    first_X = np.searchsorted(entity_X[order_X], entity_X[order_X])
    base_X, samples_E = np.zeros(len(entity_X), np.int64), np.zeros(n_entities, np.int64)
    base_X[order_X] = before_X - before_X[first_X]
    np.add.at(samples_E, entity_X[order_X], samples_X[order_X])
    return base_X, samples_E


def _texts(names: Iterable[tuple[str, str]]) -> dict[str, np.ndarray]:
    """Paths of shards and of their indexes ("" for `<shard>.index`) as arrays of bytes and of where each starts."""
    arrays = {}
    for array, column in zip(("name", "index"), zip(*names, strict=True), strict=True):
        raw = [os.fsencode(name) for name in column]
        arrays[f"{array}_start"] = np.cumsum([0, *map(len, raw)], dtype="<i8")
        arrays[array] = np.frombuffer(b"".join(raw), np.uint8)
    return arrays


def _digest(base_names: list[str], domains: list[str], arrays: dict[str, np.ndarray]) -> int:
    """63 bits of names, sizes, counts, groups and records: what fixes the order of samples."""
    digest = hashlib.blake2b(json.dumps([base_names, domains]).encode(), digest_size=8)
    for name in ("samples", "shard_bytes", "index_digest", "group_start", "group_domain", "group_entity"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    digest.update(arrays["group_samples"].data)
    return int.from_bytes(digest.digest(), "little") >> 1


# ---------------------------------------------------------------------------------------------------------------------
# The file


def write_catalog(path: str | Path, catalog: Catalog) -> None:
    """Store a catalog. Shards below the file's folder are named relative to it, so that both can move together."""
    folder = os.path.dirname(os.path.abspath(path))
    names = [(catalog.shard(k), catalog.index_path(k)) for k in range(catalog.n_shards)]
    arrays = catalog._arrays | _texts(
        (_named(shard, folder), "" if index == shard + SUFFIX else _named(index, folder)) for shard, index in names
    )
    arrays = {name: np.asarray(arrays[name], dtype) for name, dtype in _ARRAYS.items() if name != "shard_check"}
    arrays = {name: arrays[name] if name in arrays else _shard_checks(arrays, 0, catalog.n_shards) for name in _ARRAYS}
    header = {
        "version": CATALOG_VERSION,
        "tokenizer_sha256": catalog.tokenizer_sha256,
        "formats": catalog.formats,
        "domains": catalog.domains,
        "digest": catalog.digest,
        "lengths": {name: len(array) for name, array in arrays.items()},
        "crc": {name: zlib.crc32(arrays[name].data) for name in _CHECKED_ON_OPENING},
    }
    write_framed(str(path), CATALOG_MAGIC, header, _padded(arrays.values()))


def _named(path: str, folder: str) -> str:
    if is_url(path):
        return path
    return os.path.abspath(path).removeprefix(folder.rstrip("/") + "/")


def _padded(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    for array in arrays:
        yield array
        yield np.zeros(-array.nbytes % ALIGN, np.uint8)


def _shard_checks(arrays: dict[str, np.ndarray], first: int, last: int) -> np.ndarray:
    """Checksums, uint32, of what the catalog says of shards `first` to `last` in arrays too large for one check."""
    rows = slice(*arrays["group_start"][[first, last]].tolist())
    columns = {name: arrays[name][rows] for name in ("group_domain", "group_entity", "group_samples", "group_base")}
    entity_X = columns["group_entity"]
    known_X = (entity_X >= 0) & (entity_X < len(arrays["entity_samples"]))
    columns["total"] = np.zeros(len(entity_X), np.int64)
    columns["total"][known_X] = arrays["entity_samples"][entity_X[known_X]]
    parts = [(np.ascontiguousarray(column), arrays["group_start"], rows.start) for column in columns.values()]
    parts += [(arrays[name], arrays[f"{name}_start"], 0) for name in ("name", "index")]
    crc_K = [0] * (last - first)
    for array, start_K1, before in parts:
        raw, itemsize = array.view(np.uint8).data, array.itemsize
        borders = ((start_K1[first : last + 1] - before) * itemsize).tolist()
        crc_K = [zlib.crc32(raw[begin:end], crc) for crc, begin, end in zip(crc_K, borders, borders[1:], strict=False)]
    return np.array(crc_K, np.uint32)


def _read_catalog(path: str) -> Catalog:
    if not os.path.isfile(path):
        raise ValueError(f"catalog {path} does not exist")
    header, at = read_framed(path, CATALOG_MAGIC, CATALOG_VERSION, "a catalog", _AGAIN)
    places = {}
    for name, dtype in _ARRAYS.items():
        length = header["lengths"][name]
        places[name] = (at, length)
        at += -(-length * np.dtype(dtype).itemsize // ALIGN) * ALIGN
    size = os.path.getsize(path)
    if size != at:
        raise ValueError(f"{path} is damaged: {size} bytes where its header promises {at}; {_AGAIN}")
    arrays = {
        name: np.memmap(path, _ARRAYS[name], "r", start, (length,)) if length else np.zeros(0, _ARRAYS[name])
        for name, (start, length) in places.items()
    }
    for name in _CHECKED_ON_OPENING:
        if zlib.crc32(arrays[name].data) != header["crc"][name]:
            raise ValueError(f"{path} is damaged: its {name} do not have their checksum; {_AGAIN}")
    return Catalog(header, arrays, os.path.dirname(os.path.abspath(path)))


# ---------------------------------------------------------------------------------------------------------------------
# Names of shards


def expand_shards(patterns: Iterable[str], urls: bool = False) -> list[str]:
    """Files named by paths with {0000..0012} braces and * ? globs, in the order given, globs sorted; of a folder its
    *.tar.

    Raises ValueError for a pattern that matches nothing, a missing file, a file named twice, and for an address unless
    `urls`; in addresses only braces are understood.
    """
    shards = []
    for pattern in patterns:
        pattern = str(pattern)
        check_path(pattern)
        if is_url(pattern) and not urls:
            hint = (
                "remote shards are named by a catalog: python launch/index_shards.py ... --index-dir DIR --catalog FILE"
            )
            raise ValueError(f"shard {shown(pattern)} is a URL; {hint}, then name that file")
        try:
            expanded = list(braceexpand.braceexpand(pattern))
        except ValueError as error:  # braceexpand's UnbalancedBracesError
            raise ValueError(f"shard pattern {pattern!r} has unbalanced braces") from error
        for path in expanded:
            shards += [path] if is_url(path) else _matching(path, pattern)
    for path, times in Counter(shards).items():
        if times > 1:
            raise ValueError(f"shard {shown(path)} is named twice; its samples would be repeated")
    return shards


def _matching(path: str, pattern: str) -> list[str]:
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(glob.glob(os.path.join(glob.escape(path), "*.tar")))
        if not found:
            raise ValueError(f"folder {path} holds no shard (*.tar); {_IMPORT.format(path)}")
        return found
    if not any(letter in path for letter in "*?["):
        raise ValueError(f"shard {path} (from {pattern!r}) does not exist")
    found = sorted(match for match in glob.glob(path) if os.path.isfile(match))
    if not found:
        raise ValueError(f"shard pattern {pattern!r} matches no file")
    return found
