"""Host to device without stopping either: through pinned memory, in stream order."""

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


def pin(buffer: np.ndarray) -> None:
    """Pins host memory in place, so that copies from it are asynchronous.  Raises RuntimeError where CUDA refuses."""
    _checked(torch.cuda.cudart().cudaHostRegister(buffer.ctypes.data, buffer.nbytes, 0))


def unpin(buffer: np.ndarray) -> None:
    """Undoes `pin`, before the memory goes."""
    _checked(torch.cuda.cudart().cudaHostUnregister(buffer.ctypes.data))


def _checked(status) -> None:
    torch.cuda.check_error(int(status))
