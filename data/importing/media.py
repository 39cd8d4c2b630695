"""Bytes of the media in a record: files, data URLs, or bytes in the record itself. Image headers are checked."""

import base64
import binascii
import io
import os
import re
from collections.abc import Sequence
from urllib.parse import unquote, urlsplit

from tandem.data.formats.records import Medium
from tandem.data.media.image import MAX_PIXELS, ImageError, image_size
from tandem.data.media.turns import SampleError
from tandem.data.shards.tars import MAX_BYTES

URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DATA = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
_STARTS = {  # of files, and how their names end
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG": "png",
    b"GIF8": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"\x1a\x45\xdf\xa3": "mkv",
}
_RIFF = {b"WEBP": "webp", b"AVI ": "avi"}
DOWNLOAD = "download the files first, for example with img2dataset, and name their folder by --images"


class MediaFiles:
    """Reads media. folders: searched in order for relative paths."""

    def __init__(self, folders: Sequence[str]):
        self._folders = folders

    def read(self, medium: Medium) -> tuple[str, bytes]:
        """(ending of a name, bytes) of a medium. Raises SampleError."""
        data = self._bytes(medium)
        if medium.kind == "image":
            try:
                image_size(io.BytesIO(data), MAX_PIXELS)
            except ImageError as error:
                raise SampleError("unreadable image", f"{_shown(medium.source)}: {error}") from error
        elif len(data) > MAX_BYTES["video"]:
            raise SampleError("video too large", f"{_shown(medium.source)} has {len(data)} bytes")
        return _ending(data, medium.kind), data

    def _bytes(self, medium: Medium) -> bytes:
        source = medium.source
        if isinstance(source, dict):
            source = next((source[key] for key in ("bytes", "path", "url") if source.get(key)), None)
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str) or not source:
            raise SampleError(f"no {medium.kind}", f"it has neither the bytes nor the name of its {medium.kind}")
        if match := _DATA.match(source):
            try:
                return base64.b64decode(source[match.end() :], validate=True)
            except binascii.Error as error:
                raise SampleError(f"unreadable {medium.kind}", f"its data URL is damaged: {error}") from error
        return self._file(source, medium.kind)

    def _file(self, name: str, kind: str) -> bytes:
        url = URL.match(name) and not name.lower().startswith("file://")
        path = os.path.basename(unquote(urlsplit(name).path)) if url else name.removeprefix("file://")
        for folder in self._folders:
            try:
                with open(os.path.join(folder, path), "rb") as file:
                    return file.read()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                continue
            except (OSError, ValueError) as error:
                raise SampleError(f"unreadable {kind}", f"{_shown(name)} cannot be read: {error}") from error
        if url:
            raise SampleError(f"{kind} is a URL", f"{_shown(name)} is a URL; {DOWNLOAD}")
        folders = ", ".join(self._folders)
        raise SampleError(f"{kind} file not found", f"{_shown(name)} is not in {folders}; name its folder by --images")


def is_url(medium: Medium) -> bool:
    """Whether a medium is named by an address and not by a file."""
    source = medium.source
    if isinstance(source, dict):
        source = None if source.get("bytes") else source.get("path") or source.get("url")
    return isinstance(source, str) and bool(URL.match(source)) and not source.lower().startswith("file://")


def _ending(data: bytes, kind: str) -> str:
    if data[:4] == b"RIFF":
        return _RIFF.get(data[8:12], "avi")
    ending = next((ending for start, ending in _STARTS.items() if data.startswith(start)), None)
    return ending or ("jpg" if kind == "image" else "mp4")


def _shown(source: object) -> str:
    text = source if isinstance(source, str) else "its data"
    return text if len(text) <= 120 else text[:117] + "..."
