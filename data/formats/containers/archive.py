"""Compressed tars (.tar.gz, .tar.zst) of samples in any format that shards are read in; members stay as they are."""

import os
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from tandem.data.formats.containers.base import Container, Found
from tandem.data.formats.containers.lines import opened
from tandem.data.media.turns import SampleError
from tandem.data.shards.tars import MAX_BYTES, printable

_LIMIT = MAX_BYTES["other"]


class ArchiveContainer(Container):
    name = "archive"
    endings = (".tar.gz", ".tgz", ".tar.zst")
    whole = True

    def units(self, path: str, most: int) -> Iterator[dict]:
        yield {"first": 0, "weight": os.path.getsize(path)}

    def records(self, path: str, unit: dict, start: int) -> Iterator[Found]:
        """Records {"key": ..., "members": [(rest of the name, bytes), ...]}."""
        key: str | None = None
        members: list[tuple[str, bytes]] = []
        problem: SampleError | None = None
        ordinal = 0
        for name, data in _members(path):
            folder, _, base = name.rpartition("/")
            stem, _, rest = base.partition(".")
            here = f"{folder}/{stem}" if folder else stem
            if here != key:
                if key is not None and ordinal >= start:
                    yield ordinal, problem or {"key": key, "members": members}
                ordinal += key is not None
                key, members, problem = here, [], None
            if isinstance(data, SampleError):
                problem = problem or data
            elif name.startswith("/") or ".." in folder.split("/"):
                problem = problem or SampleError("unsafe name", f"{printable(name)} would lie outside its folder")
            else:
                members.append((rest, data))
        if key is not None and ordinal >= start:
            yield ordinal, problem or {"key": key, "members": members}


def _members(path: str) -> Iterator[tuple[str, bytes | SampleError]]:
    """Names and contents of the files, or why one cannot be used."""
    try:
        with opened(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for info in tar:
                base = info.name.rpartition("/")[2]
                if info.isdir() or base.startswith("."):
                    continue
                if not info.isreg() or info.issparse():
                    yield info.name, SampleError("not a plain file", f"{printable(info.name)} is not a plain file")
                elif info.size > _LIMIT:
                    yield info.name, SampleError("member too large", f"{printable(info.name)} has {info.size} bytes")
                else:
                    yield info.name, cast(IO[bytes], tar.extractfile(info)).read()
                tar.members.clear()  # type: ignore[attr-defined]  # not in typeshed; tarfile would keep every header
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole compressed tar: {error}") from error


CONTAINER = ArchiveContainer()
