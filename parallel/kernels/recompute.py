"""What is kept between forward and backward, in which memory, and what is made again instead.

    HostStore    saved tensors go to pinned host memory on a stream of their own while the next layers run, and come
                 back while the backward of the layers above runs
    recomputed   saved views of some tensors are dropped, and these computed once more when they are asked for
    kept_matmuls which operations' outputs `torch.utils.checkpoint` keeps, where the others are made again

Chen et al. 2016 (1604.06174) keep layer inputs; Korthikanti et al. 2022 (2205.05198) choose by operation.

Legend: N tokens, D width, H heads, K head width.
"""

import collections
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

LEAST_BYTES = 2**16  # smaller tensors stay on the device
IN_FLIGHT = 6  # tensors whose copies may be under way, each way


# ---- saved tensors in host memory ------------------------------------------------------------------------------------


class HostStore:
    """Host memory for what is saved inside `with store:`, one forward of a stack of layers.

    resident: tensors that stay on the device whoever saves them (weights, tables).  Memory is given back in the order
    of the compute stream, which waits for copies, and the host for nothing.  On a CPU copies go to other CPU memory.
    """

    def __init__(self, device: torch.device, resident: Iterable[torch.Tensor] = ()):
        self._resident = {tensor.untyped_storage().data_ptr() for tensor in resident}
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._saved: list[weakref.ref[_Held]] = []  # in order; autograd's graph holds them
        self._leaving: collections.deque[_Held] = collections.deque()
        self._hooks = saved_tensors_hooks(self.pack, self.unpack)

    def __enter__(self) -> "HostStore":
        self._hooks.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        self._hooks.__exit__(*raised)
        while self._leaving:
            self._leaving.popleft().leave()

    def pack(self, tensor: torch.Tensor) -> Any:
        """What stands for a tensor that is saved."""
        storage = tensor.untyped_storage()
        if storage.nbytes() < LEAST_BYTES or storage.data_ptr() in self._resident:
            return tensor
        held = next((held for held in self._leaving if held.address == storage.data_ptr()), None)
        if held is None:
            held = _Held(storage, len(self._saved), self._copies, tensor.device)
            self._saved.append(weakref.ref(held))
            self._leaving.append(held)
            if len(self._leaving) > IN_FLIGHT:
                self._leaving.popleft().leave()
        return _View.of(tensor, held)

    def unpack(self, packed: Any) -> torch.Tensor:
        """The tensor again; those that were saved before it begin to come back."""
        if not isinstance(packed, _View):
            return packed
        held = packed.base
        tensor = packed.on(held.arrived())
        for earlier in self._saved[max(held.place - IN_FLIGHT, 0) : held.place]:
            if (other := earlier()) is not None:
                other.come_back()
        return tensor


class _Held:
    """One storage, on the device, in host memory or both."""

    def __init__(self, storage: torch.UntypedStorage, place: int, copies: "torch.cuda.Stream | None", device):
        self.place, self.address = place, storage.data_ptr()
        self._copies = copies
        self._device: torch.Tensor | None = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        self._host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=copies is not None)
        self._done = self._copy(self._host, self._device)

    def leave(self) -> None:
        """Gives the device's memory back, once what is copied from it has been."""
        self._await()
        self._device, self.address = None, 0

    def come_back(self) -> None:
        """Begins the copy to the device."""
        if self._device is None:
            self._device = torch.empty_like(self._host, device=self._copies.device if self._copies else "cpu")
            self._done = self._copy(self._device, self._host)

    def __del__(self):
        self._await()  # memory that came back and was not asked for is written to no longer when it is given back

    def arrived(self) -> torch.Tensor:
        self.come_back()
        self._await()
        assert self._device is not None, "come_back makes it"
        return self._device

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> "torch.cuda.Event | None":
        """After what the compute stream does now: it made the source, or used the target's memory before."""
        if self._copies is None:
            target.copy_(source)
            return None
        self._copies.wait_stream(torch.cuda.current_stream(self._copies.device))
        with torch.cuda.stream(self._copies):
            target.copy_(source, non_blocking=True)
            return self._copies.record_event()

    def _await(self) -> None:
        if self._done is not None and self._copies is not None:
            torch.cuda.current_stream(self._copies.device).wait_event(self._done)


@dataclass(frozen=True, eq=False)
class _View:
    """How a saved tensor lies in `base`."""

    base: Any
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    @staticmethod
    def of(tensor: torch.Tensor, base: Any) -> "_View":
        return _View(base, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def on(self, memory: torch.Tensor) -> torch.Tensor:
        """The same view of another tensor's memory."""
        view = torch.empty(0, dtype=self.dtype, device=memory.device)
        return view.set_(memory.untyped_storage(), self.offset, self.size, self.stride)


# ---- saved tensors made again ----------------------------------------------------------------------------------------


class _Maker:
    """Makes tensors again when the first of their saved views is asked for, and forgets them after the last."""

    def __init__(self, make: Callable[..., tuple[torch.Tensor, ...]], arguments: tuple):
        self._make, self._arguments = make, arguments
        self.views = self._left = 0
        self._made: tuple[torch.Tensor, ...] = ()

    @torch.no_grad()
    def made(self, unpack) -> tuple[torch.Tensor, ...]:
        if not self._made:
            self._made = self._make(*map(unpack, self._arguments))
            self._left = self.views
        made, self._left = self._made, self._left - 1
        if not self._left:
            self._made = ()
        return made


def recomputed(
    made: tuple[torch.Tensor, ...], make: Callable[..., tuple[torch.Tensor, ...]], arguments: tuple, store: HostStore
):
    """Hooks for what saves views of `made`, which is make(*arguments): the views are dropped, and made again in the
    backward.  All else that is saved, and the arguments, go to `store`."""
    places = {tensor.untyped_storage().data_ptr(): place for place, tensor in enumerate(made)}
    maker = _Maker(make, tuple(store.pack(x) if isinstance(x, torch.Tensor) else x for x in arguments))

    def pack(tensor):
        place = places.get(tensor.untyped_storage().data_ptr())
        if place is None:
            return store.pack(tensor)
        maker.views += 1
        return _View.of(tensor, (maker, place))

    def unpack(packed):
        if isinstance(packed, _View) and isinstance(packed.base, tuple):
            maker, place = packed.base
            return packed.on(maker.made(store.unpack)[place])
        return store.unpack(packed)

    return saved_tensors_hooks(pack, unpack)


# ---- outputs of operations kept --------------------------------------------------------------------------------------

_aten = torch.ops.aten
# each with the place of its right factor among its arguments
MATMULS = {_aten.mm.default: 1, _aten.addmm.default: 2, _aten.bmm.default: 1, _aten._grouped_mm.default: 1}


def kept_matmuls(width: int, attention_ops: Iterable[Any]) -> Callable[[], tuple]:
    """`context_fn` of a checkpoint that keeps outputs of attention, and of matmuls into another width than `width`.

    What goes back to the residual's width is needed by the sum alone, which keeps nothing, or is as cheap to make again
    as any other matmul of its size; what is wider enters attention or a gate.
    """
    attention_ops = frozenset(attention_ops)

    def policy(ctx, op, *args, **kwargs):
        kept = op in attention_ops or (op in MATMULS and args[MATMULS[op]].shape[-1] != width)
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return partial(create_selective_checkpoint_contexts, policy)
