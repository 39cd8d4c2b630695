"""Runs Megatron-core's real parallel code on CPU and gloo: every stand-in it needs without CUDA.

`install()` adds an import hook for `megatron.core.*` alone.  Each of its modules then sees `torch` through a facade
that sends "cuda" allocations to the CPU and turns streams, events and device syncs into no-ops; a few modules get a
named repair right after they are executed.  No other module of the process is touched, apart from
`Tensor.cuda` and `Tensor.record_stream`, which become no-ops.  Held to megatron-core 0.16: a repair whose target is
gone fails at import instead of silently doing nothing.
"""

import contextlib
import functools
import importlib.abc
import importlib.machinery
import sys
import types

import torch

PACKAGE = "megatron.core"
CPU = torch.device("cpu")


class _InOrder:
    """Stand-in for `torch.cuda.Stream` and `Event`: the CPU is one queue that is always in order."""

    device = CPU

    def __init__(self, *args, **kwargs):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        return None

    def __eq__(self, other):
        return isinstance(other, _InOrder)

    __hash__ = object.__hash__

    def record_event(self, event=None):
        return event or _InOrder()

    def query(self):
        return True

    def elapsed_time(self, other):
        return 0.0

    def _nothing(self, *args, **kwargs):
        return None

    wait_stream = wait_event = synchronize = record = wait = _nothing


class _Facade(types.ModuleType):
    """A module that answers from its own names first and from `real` otherwise."""

    def __init__(self, real, **overrides):
        super().__init__(real.__name__)
        self.__dict__["_real"] = real
        self.__dict__.update(overrides)

    def __getattr__(self, name):
        return getattr(self._real, name)


def _nothing(*args, **kwargs):
    return None


_STREAM = _InOrder()
_CUDA = _Facade(
    torch.cuda,
    Stream=_InOrder,
    Event=_InOrder,
    stream=lambda stream: contextlib.nullcontext(),
    current_stream=lambda *args, **kwargs: _STREAM,
    default_stream=lambda *args, **kwargs: _STREAM,
    current_device=lambda: CPU,
    device_count=lambda: 1,
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    is_current_stream_capturing=lambda: False,
    get_rng_state=lambda *args, **kwargs: torch.get_rng_state(),
    set_rng_state=lambda state, *args, **kwargs: torch.set_rng_state(state),
    manual_seed=torch.default_generator.manual_seed,
    nvtx=types.SimpleNamespace(
        range_push=_nothing, range_pop=_nothing, range=lambda *args, **kwargs: contextlib.nullcontext()
    ),
)


def _on_cpu(factory):
    """A tensor factory that reads device="cuda" as the CPU and never pins memory."""

    @functools.wraps(factory)
    def wrapped(*args, **kwargs):
        device = kwargs.get("device")
        if device is not None and str(device).startswith("cuda"):
            kwargs["device"] = CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return wrapped


_FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "empty_like", "zeros_like")
_TORCH = _Facade(torch, cuda=_CUDA, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


def _cuda_type_strings(function):
    """Inside `function`, `Tensor.type()` answers 'torch.cuda.X', which Megatron's type checks compare with."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        real = torch.Tensor.type

        def cuda_type(self, *type_args, **type_kwargs):
            name = real(self, *type_args, **type_kwargs)
            is_cpu_name = isinstance(name, str) and not name.startswith("torch.cuda")
            return name.replace("torch.", "torch.cuda.", 1) if is_cpu_name else name

        torch.Tensor.type = cuda_type  # type: ignore[method-assign]  # a stand-in
        try:
            return function(*args, **kwargs)
        finally:
            torch.Tensor.type = real  # type: ignore[method-assign]

    return wrapped


def _repair_random(module):
    _require(module, "_get_cuda_rng_state", "_set_cuda_rng_state")
    module._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _repair_moe_utils(module):
    _require(module, "maybe_move_tensor_to_cpu")
    real = module.maybe_move_tensor_to_cpu

    def move(tensor, as_numpy=False, record_stream=False):
        tensor = real(tensor, as_numpy, False)  # tests `is_cuda`, so a CPU tensor never became numpy
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module.maybe_move_tensor_to_cpu = move


def _repair_mappings(module):
    """gloo gathers and scatters equal sizes only; expert tensor parallelism needs unequal ones."""
    _require(module, "_gather_along_first_dim", "_reduce_scatter_along_first_dim")

    def all_gather(outputs, tensor, group):
        largest = max(output.shape[0] for output in outputs)
        padded = tensor.new_zeros(largest, *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        wholes = [torch.empty_like(padded) for _ in outputs]
        torch.distributed.all_gather(wholes, padded, group=group)
        for output, whole in zip(outputs, wholes, strict=True):
            output.copy_(whole[: output.shape[0]])

    def reduce_scatter(output, inputs, group):
        total = torch.cat(inputs)
        torch.distributed.all_reduce(total, group=group)
        output.copy_(total.split([part.shape[0] for part in inputs])[group.rank()])

    distributed = _Facade(torch.distributed, all_gather=all_gather, reduce_scatter=reduce_scatter)
    module.torch = _Facade(_TORCH, distributed=distributed)


def _repair_distributed_optimizer(module):
    cls = module.DistributedOptimizer
    _require(cls, "_build_model_and_main_param_groups")
    build = cls._build_model_and_main_param_groups.__func__
    cls._build_model_and_main_param_groups = classmethod(_cuda_type_strings(build))


def _repair_p2p(module):
    """gloo reads a sent tensor after `isend` returned, while the schedule already swaps its `.data`: send an alias."""
    _require(module, "_p2p_ops")
    real = module._p2p_ops

    def alias(tensor):
        return None if tensor is None else tensor.detach()

    def p2p_ops(*, tensor_send_prev, tensor_send_next, **kwargs):
        return real(tensor_send_prev=alias(tensor_send_prev), tensor_send_next=alias(tensor_send_next), **kwargs)

    module._p2p_ops = p2p_ops


def _repair_jit(module):
    _require(module, "disable_jit_fuser")
    module.disable_jit_fuser()  # its torch.compile wants a C++ toolchain


_REPAIRS = {
    f"{PACKAGE}.jit": _repair_jit,
    f"{PACKAGE}.tensor_parallel.mappings": _repair_mappings,
    f"{PACKAGE}.tensor_parallel.random": _repair_random,
    f"{PACKAGE}.transformer.moe.moe_utils": _repair_moe_utils,
    f"{PACKAGE}.pipeline_parallel.p2p_communication": _repair_p2p,
    f"{PACKAGE}.optimizer.distrib_optimizer": _repair_distributed_optimizer,
}


def _require(owner, *names):
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise ImportError(
            f"the CPU backend repairs {owner.__name__}.{missing[0]}, which this megatron-core does not have; "
            "it is written for megatron-core 0.16.1"
        )


class _MegatronFinder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != PACKAGE and not name.startswith(PACKAGE + "."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            if module.__dict__.get("torch") is torch:
                module.torch = _TORCH
            if name in _REPAIRS:
                _REPAIRS[name](module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # of this one import
        return spec


def install() -> None:
    """Prepares this process for Megatron-core without CUDA.  A no-op where CUDA is present or on a second call.

    Raises RuntimeError if `megatron.core` was imported before.
    """
    if torch.cuda.is_available() or any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
        return
    if PACKAGE in sys.modules:
        raise RuntimeError("parallel.runtime.cpu_backend.install() must run before the first import of megatron.core")
    sys.meta_path.insert(0, _MegatronFinder())
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]  # a stand-in
    torch.Tensor.record_stream = _nothing  # type: ignore[method-assign]  # a stand-in
