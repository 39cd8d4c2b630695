"""Whether code is compiled (`torch.compile`), decided once a process by `parallel.compile`, and functions over packed
rows that are compiled once for all their callers.

auto: on CUDA where Triton is importable; always: on any device (a CPU needs a C++ compiler); never: nowhere.

Shapes are bounded: callers bring rows in whole buckets, so that at most `most rows / BUCKET` different sizes exist,
and the graph takes any of them.  Buckets cost a chunk of 256 rows or more 127 at most, on average 64: 0.2% of 32,768.
Graphs differ by what does not depend on the data: widths, with or without autograd, with or without factors.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable, Iterable

import torch
from torch import nn

log = logging.getLogger(__name__)

MODES = ("auto", "always", "never")
BUCKET = 128  # rows
GRAPHS = 32  # at most of one function and one set of arguments: above the sum over the widths of a run

_mode = "auto"
_backend = "inductor"


def configure(mode: str, backend: str = "inductor") -> None:
    """Sets the process's mode; raises ValueError for one that does not exist.

    backend: of `torch.compile`; what was compiled with another one is forgotten.
    """
    global _mode, _backend
    if mode not in MODES:
        raise ValueError(f"parallel.compile={mode}: must be one of {', '.join(MODES)}")
    if backend != _backend:
        _compiled.cache_clear()
    _mode, _backend = mode, backend


def enabled(device: torch.device | str) -> bool:
    """Whether code that runs on `device` is compiled."""
    if _mode == "auto":
        return torch.device(device).type == "cuda" and importlib.util.find_spec("triton") is not None
    return _mode == "always"


def compilable(modules: Iterable[nn.Module]) -> bool:
    """False, said once, where modules inside these carry hooks, as ZeRO-3's gather their weights: no graph holds those.

    All of `modules` are alike; the first is looked at.
    """
    first = next(iter(modules), None)
    parts = [] if first is None else list(first.children())
    hooked = any(part._forward_pre_hooks or part._forward_hooks for part in parts)
    if hooked:
        _say_hooked(type(first).__name__)
    return not hooked


def bucket_of(rows: int) -> int:
    """The least multiple of BUCKET that holds these rows; at least the second, as one is a constant to the compiler."""
    return max(-(-rows // BUCKET), 2) * BUCKET


def by_rows(function: Callable) -> Callable:
    """`function` compiled, once a process.

    It takes a module, or a tuple of them, and tensors, of which those that have as many rows as the first (in the first
    dimension, or in the second of two) may have any number of whole buckets of rows, from two on, without a compilation
    of its own.  The graph is one over buckets: rows cut into them and joined again are the same to the compiler.
    """

    def call(modules: nn.Module | tuple[nn.Module, ...], first_N: torch.Tensor, *others: torch.Tensor | None):
        tensors = (first_N, *others)
        axes = [None if x is None else 0 if len(x) == len(first_N) else 1 for x in tensors]
        pairs = zip(tensors, axes, strict=True)
        cut = [None if x is None or axis is None else x.unflatten(axis, (-1, BUCKET)) for x, axis in pairs]
        for tensor, axis in zip(cut, axes, strict=True):
            if tensor is not None and axis is not None:
                torch._dynamo.mark_dynamic(tensor, axis)
        return compiled(_joining(function, tuple(axes)))(modules, *cut)

    return call


@functools.cache
def _joining(function: Callable, axes: tuple[int | None, ...]) -> Callable:
    """`function`, given tensors whose dimension `axes` is cut into buckets; None: not a tensor."""

    def joined(modules, *cut):
        tensors = (x if axis is None else x.flatten(axis, axis + 1) for x, axis in zip(cut, axes, strict=True))
        return function(modules, *tensors)

    # graphs are counted by code object, which all closures of one function would share
    joined.__code__ = joined.__code__.replace(co_name=function.__name__)
    return joined


def compiled(function: Callable) -> Callable:
    """`function` compiled, once a process, into a graph for every size but those that are marked dynamic.

    Of its own accord the compiler would take a second width for a reason to make all widths unknown, and slow.
    """
    # here and not once, because a thread of torch 2.13 (autograd's is one) has settings of its own
    if torch._dynamo.config.recompile_limit < GRAPHS:
        torch._dynamo.config.recompile_limit = GRAPHS
    return _compiled(function)


@functools.cache
def _compiled(function: Callable) -> Callable:
    return torch.compile(function, fullgraph=True, dynamic=False, backend=_backend)


@functools.cache
def _say_hooked(name: str) -> None:
    log.info("parallel.compile: %s is not compiled, its parts carry hooks (parallel.encoder.zero_stage=3)", name)
