"""Finds what would make the host wait for a CUDA device, in a run without one.

    with ForbidSyncs():
        loss = model(x); loss.backward()

An operation whose result or whose output's shape the host has to know waits for all work before it.  On a CPU such an
operation is just as visible: in the dispatcher (`.item()`, `nonzero`, an index that is a mask) or, where a CPU tensor
is read without it, among the functions that were called (`.tolist()`, `.cpu()`, `.numpy()`).
"""

import traceback
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = str(Path(__file__).resolve().parents[1])
WAITING_OPS = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero", "nonzero_numpy", "argwhere",
    "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount",
}  # fmt: skip
READS = {"tolist", "numpy", "cpu", "__array__"}
MACHINERY = ("tests/syncs.py", "torch/_dynamo/eval_frame.py", "torch/_compile.py")
MASKS = (torch.bool, torch.uint8)


class ForbidSyncs:
    """Raises AssertionError at its end with every waiting operation inside and the line that asked for it.

    allowed: ends of "file.py" or "file.py:function"; what one of these asks for, itself or through others, is left out
    (host tensors, which look like the device's in a run without one).
    """

    def __init__(self, allowed: tuple[str, ...] = ()):
        self.allowed = allowed
        self.found: list[str] = []

    def __enter__(self):
        self._modes = (_Dispatched(self), _Called(self))
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *exc):
        for mode in reversed(self._modes):
            mode.__exit__(*exc)
        if exc[0] is None and self.found:
            raise AssertionError("the host would wait for the device:\n  " + "\n  ".join(dict.fromkeys(self.found)))

    def note(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack(limit=80) if not frame.filename.endswith(MACHINERY)]
        places = [f"{frame.filename}:{frame.name}" for frame in frames]
        if any(place.endswith(end) or place.split(":")[0].endswith(end) for place in places for end in self.allowed):
            return
        ours = [frame for frame in frames if frame.filename.startswith(ROOT) and "/.venv/" not in frame.filename]
        near, last = (ours or frames)[-1], frames[-1]
        through = "" if last is near else f" (through {last.filename}:{last.lineno})"
        self.found.append(f"{what} at {near.filename}:{near.lineno} in {near.name}{through}")


class _Dispatched(TorchDispatchMode):
    def __init__(self, report: ForbidSyncs):
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in WAITING_OPS:
            self.report.note(name)
        elif name in ("index", "index_put", "index_put_") and any(_is_mask(index) for index in args[1]):
            self.report.note(f"{name} by a mask")
        elif name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.report.note("repeat_interleave without output_size")
        return func(*args, **kwargs)


class _Called(TorchFunctionMode):
    def __init__(self, report: ForbidSyncs):
        super().__init__()
        self.report = report

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        to_host = name == "to" and any(str(value) == "cpu" for value in (*args[1:], kwargs.get("device")))
        if name in READS or to_host:
            self.report.note(f".{name}()")
        return func(*args, **kwargs)


def _is_mask(index) -> bool:
    return torch.is_tensor(index) and index.dtype in MASKS
