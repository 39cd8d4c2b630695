"""Bytes at any place of a shard: a local file, or an object that fsspec reads by range.

    open_range("corpus/a.tar").read(offset, size)      open_range("s3://bucket/a.tar").read(offset, size)

Nothing is downloaded whole and nothing is run: schemes such as `pipe:` are refused.
"""

import io
import os
import re
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

REMOTE = ("http", "https", "s3", "gs", "gcs", "az", "abfs", "abfss", "hdfs")
ATTEMPTS = 4  # at a remote read, with pauses of 0.5, 1 and 2 seconds
OPEN_FILES = 64
_PAUSE_S = 0.5

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_STAMPS = ("ETag", "etag", "LastModified", "Last-Modified", "last_modified", "mtime", "modificationTime")


def is_url(path: str) -> bool:
    """Whether this is an address (scheme:...) and not a path."""
    return _SCHEME.match(path) is not None


def check_path(path: str) -> None:
    """Raises ValueError for what is neither a path nor an address of a scheme in REMOTE, `pipe:` among others."""
    match = _SCHEME.match(path)
    if match is None:
        return
    if match[1].lower() not in REMOTE or not path[match.end() :].startswith("//"):
        raise ValueError(f"shard {path!r} is no path and no address that can be read by range: {', '.join(REMOTE)}")
    if "::" in path:
        raise ValueError(f"shard {path!r} chains file systems with '::'; name the object itself")


def base_name(path: str) -> str:
    """The last part of a path or address."""
    return os.path.basename(urlsplit(path).path if is_url(path) else path)


def shown(path: str) -> str:
    """A path or address for messages: without user, password and query, which may be secret."""
    if not is_url(path):
        return path
    parts = urlsplit(path)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


class RangeFile:
    """An open file to read from at any place, from several threads. `stamp` changes with a remote object's content.

    Closed with its last reference, so a cache may drop it while another thread reads.
    """

    path: str
    size: int
    close: Callable[[], object]
    stamp: str = ""

    def read(self, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`, or OSError."""
        if offset < 0 or size < 0 or offset + size > self.size:
            end = offset + size
            raise OSError(f"{shown(self.path)} has {self.size} bytes; asked for bytes {offset} to {end}")
        return self._read(offset, size) if size else b""

    def _read(self, offset: int, size: int) -> bytes:
        raise NotImplementedError

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class _LocalFile(RangeFile):
    def __init__(self, path: str):
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.close = weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size

    def _read(self, offset: int, size: int) -> bytes:
        data = os.pread(self._descriptor, size, offset)
        while len(data) < size:  # a signal, or more than one call may read
            more = os.pread(self._descriptor, size - len(data), offset + len(data))
            if not more:
                raise OSError(f"{self.path} ends at byte {offset + len(data)}; it had {self.size} bytes when opened")
            data += more
        return data


class _RemoteFile(RangeFile):
    def __init__(self, path: str):
        import fsspec

        self.path = path
        try:
            self._system, self._name = fsspec.core.url_to_fs(path)
        except ImportError as error:
            raise ValueError(f"shard {shown(path)} needs another package: {error}") from error
        info = self._tried(lambda: self._system.info(self._name))
        if info.get("type") == "directory" or info.get("size") is None or info.get("partial") is False:
            raise OSError(f"{shown(path)} cannot be read by range: its server gives no size or serves no ranges")
        self.size = info["size"]
        self.stamp = next((str(info[name]) for name in _STAMPS if info.get(name)), "")

    def close(self) -> None:
        """Connections belong to fsspec and are shared."""

    def _read(self, offset: int, size: int) -> bytes:
        end = offset + size
        return self._tried(lambda: self._whole(self._system.cat_file(self._name, start=offset, end=end), size))

    def _whole(self, data: bytes, size: int) -> bytes:
        if len(data) != size:
            raise OSError(f"its server sent {len(data)} bytes where {size} were asked for")
        return data

    def _tried(self, act):
        """act(), again after failures that may pass. Raises OSError."""
        for attempt in range(ATTEMPTS):
            try:
                return act()
            except (FileNotFoundError, PermissionError) as error:
                raise OSError(f"{shown(self.path)} cannot be read: {_short(error, self.path)}") from None
            except Exception as error:  # each file system has errors of its own
                problem = error
            if attempt + 1 < ATTEMPTS:
                time.sleep(_PAUSE_S * 2**attempt)
        sentence = f"{shown(self.path)} cannot be read after {ATTEMPTS} attempts: {_short(problem, self.path)}"
        raise OSError(sentence) from None


def _short(error: Exception, path: str) -> str:
    text = " ".join(str(error).split()).replace(path, shown(path))
    return f"{type(error).__name__} {text[:160]}".rstrip()


def open_range(path: str) -> RangeFile:
    """Open a local file or an address. Raises ValueError for a scheme not in REMOTE, OSError for what is not there."""
    path = str(path)
    check_path(path)
    return _RemoteFile(path) if is_url(path) else _LocalFile(path)


class RangeFiles:
    """Open files of the paths read last, `most` at a time, for several threads."""

    def __init__(self, most: int = OPEN_FILES):
        self._most, self._lock = most, threading.Lock()
        self._files: OrderedDict[str, RangeFile] = OrderedDict()

    def open(self, path: str) -> RangeFile:
        """The open file of a path. It stays usable for whoever holds it."""
        with self._lock:
            if path in self._files:
                self._files.move_to_end(path)
                return self._files[path]
        file = open_range(path)
        with self._lock:
            self._files[path] = file
            while len(self._files) > self._most:
                self._files.popitem(last=False)
        return file

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Exactly `size` bytes from `offset`, or OSError; after an error the next read opens the file again."""
        try:
            return self.open(path).read(offset, size)
        except OSError:
            with self._lock:
                self._files.pop(path, None)
            raise

    def close(self) -> None:
        with self._lock:
            self._files.clear()

    def __len__(self) -> int:
        return len(self._files)


class Section(io.RawIOBase):
    """Bytes `start` to `start + size` of a file as a file of its own. Counts `bytes_read`.

    While `keep` is set, what is read is kept; kept bytes are never read again.
    """

    def __init__(self, file: RangeFile, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0
        self.bytes_read, self.keep = 0, False
        self._kept: dict[int, bytes] = {}  # by first byte

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
        data = self._next(wanted) if wanted else b""
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _next(self, wanted: int) -> bytes:
        """At most `wanted` bytes from here on: kept ones, or fresh ones up to the next that are kept."""
        for first, data in self._kept.items():
            if first <= self._at < first + len(data):
                return data[self._at - first :][:wanted]
            if first > self._at:
                wanted = min(wanted, first - self._at)
        data = self._file.read(self._start + self._at, wanted)
        self.bytes_read += wanted
        if self.keep:
            self._kept[self._at] = data
        return data
