"""A folder that is made whole or not at all, and not again by the same arguments."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STAMP = "made.json"


@contextmanager
def made_once(out: Path, made: dict, what: str) -> Iterator[Path | None]:
    """A new folder to fill, which becomes `out` in the end; None where `out` is what `made` says already.

    Raises ValueError where `out` holds anything else, calling what it should be `what`.
    """
    if (out / STAMP).is_file():
        found = json.loads((out / STAMP).read_text())
        if found != made:
            raise ValueError(f"{out} was made with {found}, not {made}; choose another folder or delete it")
        yield None
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and not {what} made here; choose another folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    (partial / STAMP).write_text(json.dumps(made))
    partial.rename(out)
