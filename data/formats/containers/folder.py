"""Folders of images or videos.

    FOLDER/a.jpg  FOLDER/a.txt              captions beside the files, or in a .json with "caption"
    FOLDER/metadata.csv or .jsonl           a table with the column file_name, and caption, text or label
    FOLDER/cat/1.jpg                        the class is "cat", or its name in FOLDER/classes.txt ("cat tabby cat")
    FOLDER/1.jpg                            images alone

The listing is written as lines of JSON, so that a folder of any size takes little memory.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from tandem.data.formats.containers.base import Container, not_utf8
from tandem.data.media.turns import KIND_OF_SUFFIX

_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
_CLASSES = "classes.txt"


class FolderContainer(Container):
    name = "folder"

    def matches(self, path: str, head: bytes) -> bool:
        return os.path.isdir(path)

    def prepare(self, path: str, folder: Path, number: int) -> tuple[str, str, str | None]:
        table = next((os.path.join(path, name) for name in _TABLES if os.path.isfile(os.path.join(path, name))), None)
        if table is not None and table.endswith(".jsonl"):
            return "lines", table, path
        if table is not None:
            from tandem.data.formats.containers.table import CONTAINER as TABLE

            return TABLE.prepare(table, folder, number)
        captioned = any(beside for _, _, beside in _files(path))
        names = _class_names(os.path.join(path, _CLASSES))
        out, count = folder / f"folder-{number:04}.jsonl", 0
        with open(out, "w", encoding="utf-8") as lines:
            for relative, kind, beside in _files(path):
                record: dict[str, str | None] = {kind: relative}
                if captioned:
                    record |= {"beside": os.path.join(path, beside)} if beside else {"caption": None}
                elif os.sep in relative:
                    label = relative.split(os.sep)[0]
                    record["label"] = names.get(label, label)
                lines.write(json.dumps(record) + "\n")
                count += 1
        if not count:
            raise ValueError(f"folder {path} holds no image and no video, and no file that can be imported")
        return "lines", str(out), path


def _files(root: str) -> Iterator[tuple[str, str, str | None]]:
    """(path below the folder, kind, file with its caption or None) of images and videos, in order."""
    for folder, below, names in os.walk(root):
        below.sort()
        beside = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith((".txt", ".json"))}
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            kind = KIND_OF_SUFFIX.get(ending.lower())
            if kind is not None and not name.startswith("."):
                here = os.path.relpath(folder, root)
                said = beside.get(stem)
                yield os.path.normpath(os.path.join(here, name)), kind, said and os.path.join(here, said)


def _class_names(path: str) -> dict[str, str]:
    """Name of each class: the rest of the line that begins with its folder. Raises ValueError."""
    if not os.path.isfile(path):
        return {}
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(not_utf8(path, error.start)) from error
    parts = [line.split(maxsplit=1) for line in lines if line.strip()]
    return {part[0]: part[-1].strip() for part in parts}


CONTAINER = FolderContainer()
