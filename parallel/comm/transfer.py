"""Host to device without stopping either: through pinned memory, in stream order."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def host_to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """A tensor of `array` on `device`; on CUDA the copy is asynchronous, on the CPU there is none."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if torch.device(device).type != "cuda":
        return tensor
    if not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def to_device(value: Any, device: torch.device) -> Any:
    """The same structure (dataclasses, lists, tuples, dicts) with its tensors on `device`.

    On CUDA from pinned memory (see `pinned`) without waiting; on the CPU the value itself.
    """
    if device.type == "cpu":
        return value
    return _mapped(value, lambda tensor: tensor.to(device, non_blocking=True), {})


def pinned(value: Any) -> Any:
    """The same structure with its tensors in pinned memory; one that is there already stays where it is."""
    return _mapped(value, lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory(), {})


def _mapped(value: Any, change: Callable[[torch.Tensor], torch.Tensor], changed: dict[int, torch.Tensor]) -> Any:
    """changed: by id, so that a tensor that is found twice stays one."""
    if isinstance(value, torch.Tensor):
        if id(value) not in changed:
            changed[id(value)] = change(value)
        return changed[id(value)]
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(part, change, changed) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(part, change, changed) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **{name: _mapped(part, change, changed) for name, part in parts.items()})
    return value


def pin(buffer: np.ndarray) -> None:
    """Pins host memory in place, so that copies from it are asynchronous.  Raises RuntimeError where CUDA refuses."""
    _checked(torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0))


def unpin(buffer: np.ndarray) -> None:
    """Undoes `pin`, before the memory goes."""
    _checked(torch.cuda.cudart().cudaHostUnregister(buffer.ctypes.data))


def _checked(status) -> None:
    torch.cuda.check_error(int(status))
