"""Which checkpoints stay: the newest few, those at round steps, and never none."""

import shutil
from collections.abc import Collection
from pathlib import Path

from tandem.train.checkpoints.checkpoint import NAME, named, step_of


def clean(folder: Path) -> None:
    """Clears away what a crash left: half-written and half-deleted checkpoints; one half replaced comes back."""
    for path in folder.glob(".step-*"):
        name, _, what = path.name[1:].partition(".")
        if not NAME.fullmatch(name):
            continue
        if what == "replaced" and not (folder / name).exists():
            path.rename(folder / name)
        elif what in ("partial", "deleted", "replaced"):
            shutil.rmtree(path)


def prune(folder: Path, keep: int, keep_every: int, damaged: Collection[int] = ()) -> list[Path]:
    """Deletes what `superfluous` names, each out of sight first, so that half a deletion is no checkpoint."""
    steps = [step_of(path) for path in named(folder)]
    gone = [folder / f"step-{step:08d}" for step in superfluous(steps, keep, keep_every, damaged)]
    for path in gone:
        hidden = folder / f".{path.name}.deleted"
        shutil.rmtree(hidden, ignore_errors=True)
        path.rename(hidden)
        shutil.rmtree(hidden)
    return gone


def superfluous(steps: Collection[int], keep: int, keep_every: int, damaged: Collection[int] = ()) -> list[int]:
    """Steps whose checkpoints may go, ascending.

    The newest `keep` that are not damaged stay, and those at multiples of `keep_every`; damaged ones do not count.
    Nothing after the newest good one is touched, and nothing at all where there is no good one.
    """
    good = sorted(set(steps) - set(damaged))
    kept = set(good[-max(keep, 1) :]) | {step for step in good if keep_every and step % keep_every == 0}
    return [step for step in sorted(steps) if good and step < good[-1] and step not in kept]
