"""Files that hold records, one module each: `CONTAINER` cuts a file into units and reads the records of a unit.

    lines     a record a line, also .gz and .zst        parquet   rows
    array     one JSON list                             archive   tar.gz of samples
    table     .csv and .tsv                             folder    images or videos, with captions or classes

Folders and tables are first written as lines, see `Container.prepare`.
"""

import os

from tandem.data.formats.containers.base import Container
from tandem.data.registry import Registry

__all__ = ["Container", "container_of", "find_container"]
CONTAINERS: Registry[Container] = Registry(__name__, __path__, "CONTAINER", "container")
find_container = CONTAINERS.find


def container_of(path: str) -> Container:
    """The container of a file or folder, by its name and first bytes. Raises ValueError for another file."""
    head = b""
    if os.path.isfile(path):
        with open(path, "rb") as file:
            head = file.read(1 << 16)
    found = next((each for each in CONTAINERS.all().values() if each.matches(path, head)), None)
    if found is None:
        known = ", ".join(ending for each in CONTAINERS.all().values() for ending in each.endings)
        raise ValueError(f"{path} is no file that can be imported; known are folders and {known}")
    return found
