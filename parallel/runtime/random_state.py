"""Every source of random numbers of this process, as tensors: Python, numpy, torch, the GPU, Megatron-core's trackers.

Weights and data draw from seeds of their own; these states are what a library might draw from in a step.
"""

import random

import numpy as np
import torch

_TRACKER = "megatron."


def capture() -> dict[str, torch.Tensor]:
    """The states, copied to the CPU."""
    _, words, gauss = random.getstate()
    _, key, place, has_gauss, cached = np.random.get_state()
    states = {
        "python": torch.tensor(words),
        "python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor([*np.asarray(key).tolist(), place, has_gauss]),
        "numpy_gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    trackers = _tracker().get_states()
    return states | {_TRACKER + name: state.cpu().clone() for name, state in trackers.items()}


def restore(states: dict[str, torch.Tensor]) -> None:
    """Goes on from what `capture` saw."""
    gauss = states["python_gauss"].tolist()
    random.setstate((3, tuple(states["python"].tolist()), gauss[0] if gauss else None))
    *key, place, has_gauss = states["numpy"].tolist()
    np.random.set_state(("MT19937", np.array(key, np.uint32), place, has_gauss, float(states["numpy_gauss"][0])))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    trackers = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    _tracker().set_states(trackers)


def _tracker():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker  # slow, and who only reads checkpoints needs none

    return get_cuda_rng_tracker()
