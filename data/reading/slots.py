"""Memory that the trainer and its workers share, one slot a batch, used again and again.

    take(size) -> Lease (array, address)  ..  workers write at the address  ..  release

A slot is a file that exists only as a descriptor of the trainer: workers open it through /proc, nothing is left behind
however a process ends, and the size of /dev/shm does not limit it.

Shapes: B bytes.
"""

import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SLOT_STEP = 2 << 20  # slots grow to multiples of this


@dataclass
class _Slot:
    number: int
    generation: int = 0  # counts the memories that this slot has had
    descriptor: int = -1
    map: mmap.mmap | None = None
    memory_B: np.ndarray | None = None  # all of the map


class Lease:
    """One batch's memory, uint8 [B]. It goes back with `release`, or when nobody refers to the array any more."""

    def __init__(self, slots: "Slots", slot: _Slot, size: int):
        assert slot.map is not None, "a slot is leased with its memory"
        self.array_B = np.frombuffer(slot.map, np.uint8, size)
        self.address = [slot.number, slot.generation, f"/proc/{os.getpid()}/fd/{slot.descriptor}", size]
        self.release = weakref.finalize(self.array_B, slots.give_back, slot)
        self.release.atexit = False


class Slots:
    """At most `count` pieces of shared memory; one grows where a batch needs more.

    on_new_buffer is called with each new memory (uint8 array), on_old_buffer before the memory is given up.
    """

    def __init__(
        self,
        count: int,
        on_new_buffer: Callable[[np.ndarray], None] | None = None,
        on_old_buffer: Callable[[np.ndarray], None] | None = None,
    ):
        self._on_new, self._on_old = on_new_buffer, on_old_buffer
        self._all = [_Slot(number) for number in range(count)]
        self._free = deque(reversed(self._all))  # appended to by finalizers, which must not wait for a lock

    def take(self, size: int) -> Lease:
        """Memory of at least `size` bytes, contents undefined. Raises RuntimeError if all slots are in use."""
        try:
            slot = self._free.pop()
        except IndexError:
            raise RuntimeError(
                f"all {len(self._all)} batches that the reader has memory for are in use: release() each when it is "
                f"on its way to the device, or give the reader more slots"
            ) from None
        if slot.map is None or len(slot.map) < size:
            try:
                self._drop(slot)
                self._allocate(slot, size)
            except BaseException:
                self.give_back(slot)
                raise
        return Lease(self, slot, size)

    def give_back(self, slot: _Slot) -> None:
        self._free.append(slot)

    def close(self) -> None:
        """Give up the memory. Arrays that somebody still holds stay readable."""
        for slot in self._all:
            self._drop(slot)

    def _allocate(self, slot: _Slot, size: int) -> None:
        capacity = -(-max(size + size // 4, 1) // SLOT_STEP) * SLOT_STEP
        descriptor = os.memfd_create(f"tandem-slot-{slot.number}", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, capacity)
            memory = mmap.mmap(descriptor, capacity)
            memory_B = np.frombuffer(memory, np.uint8)
            if self._on_new:
                self._on_new(memory_B)
        except BaseException:
            os.close(descriptor)
            raise
        slot.descriptor, slot.map, slot.memory_B = descriptor, memory, memory_B
        slot.generation += 1

    def _drop(self, slot: _Slot) -> None:
        if slot.map is None or slot.memory_B is None:
            return
        if self._on_old:
            self._on_old(slot.memory_B)
        slot.map = slot.memory_B = None  # unmapped with the last array that refers to it
        os.close(slot.descriptor)
