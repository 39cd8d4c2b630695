"""Kinds of training, one module each.  `task: mim` in a recipe names `train/tasks/mim.py`, whose `TASK` says everything
that the program asks of a task.

language       rows of tokens and images through encoder, adapter and LLM (stage0, stage1, stage2)
mim            the encoder alone: features of a teacher at masked patches
contrastive    the encoder alone: images against captions
omni           the encoder alone: frames, sound and captions of videos

A module that is added here is a task without an edit elsewhere; see docs/extending.md.
"""

import difflib
import importlib
import importlib.util
import pkgutil
from functools import cache

from tandem.train.tasks.base import Task


def names() -> list[str]:
    """Of all tasks."""
    return sorted(name for name in _modules() if _task(name) is not None)


def find(name: str) -> Task:
    """The task of this name.  Raises ValueError, with the names there are, for any other."""
    task = _task(name) if name in _modules() else None
    if task is None:
        near = difflib.get_close_matches(str(name), names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"task={name}: must be one of {', '.join(names())}{hint}")
    return task


@cache
def _modules() -> frozenset[str]:
    return frozenset(module.name for module in pkgutil.iter_modules(__path__))


def _task(name: str) -> Task | None:
    return getattr(importlib.import_module(f"{__name__}.{name}"), "TASK", None)
