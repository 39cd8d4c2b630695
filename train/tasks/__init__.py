"""Kinds of training, one module each.  `task: mim` in a recipe names `train/tasks/mim.py`, whose `TASK` says everything
that the program asks of a task.

language       rows of tokens and images through encoder, adapter and LLM (stage0, stage1, stage2)
mim            the encoder alone: features of a teacher at masked patches
contrastive    the encoder alone: images against captions
omni           the encoder alone: frames, sound and captions of videos

A module that is added here is a task without an edit elsewhere; see docs/extending.md.
"""

from tandem.data.registry import Registry
from tandem.train.tasks.base import Task

TASKS: Registry[Task] = Registry(__name__, __path__, "TASK", "task")
names, find = TASKS.names, TASKS.find
