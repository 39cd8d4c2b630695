"""A tar whose bytes depend on its samples alone: no owner, no time."""

import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(tarfile.RECORDSIZE)


class TarWriter:
    """Writes samples one after another; the file appears under its name when it is closed whole."""

    def __init__(self, path: Path, folder: Path):
        """folder: on the same disk, for the file while it is written."""
        self.path, self.size = path, 0
        self._temporary = folder / f"{path.name}.{os.getpid()}.partial"
        self._file = open(self._temporary, "wb", buffering=1 << 20)  # noqa: SIM115 (closed by close or drop)

    @staticmethod
    def needed(members: Sequence[tuple[str, bytes]]) -> int:
        """Bytes that members take."""
        return sum(_BLOCK + -(-len(data) // _BLOCK) * _BLOCK for _, data in members)

    def add(self, members: Sequence[tuple[str, bytes]]) -> None:
        """One sample: (name, bytes) of each member."""
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            head = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            self._file.write(head)
            self._file.write(data)
            self._file.write(bytes(-len(data) % _BLOCK))
            self.size += len(head) + len(data) + -len(data) % _BLOCK

    def close(self) -> None:
        self._file.write(bytes(2 * _BLOCK))
        self._file.write(bytes(-(self.size + 2 * _BLOCK) % len(_END)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def drop(self) -> None:
        """Give up: nothing stays."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)
