"""Time of each phase of a step without a device sync inside it: CUDA events read later, or the host's clock."""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Collects phase times; `take` returns and clears the seconds of each phase that ended since the last call."""

    def __init__(self, device: torch.device, begins: Callable[[str], None] | None = None):
        """begins: told the name of every phase when it begins."""
        self._events = device.type == "cuda"
        self._begins = begins
        self._marks: deque = deque()

    @contextmanager
    def phase(self, name: str):
        if self._begins:
            self._begins(name)
        begin = self._now()
        try:
            yield
        finally:
            self._marks.append((name, begin, self._now()))

    def take(self) -> dict[str, float]:
        """Seconds spent in each phase, summed.

        Waits for nothing: on CUDA a phase that the device is still in (a step's update) is left for the next call.
        """
        seconds: dict[str, float] = defaultdict(float)
        while self._marks and (not self._events or self._marks[0][2].query()):
            name, begin, end = self._marks.popleft()
            seconds[name] += begin.elapsed_time(end) / 1e3 if self._events else end - begin
        return dict(seconds)

    def _now(self):
        if not self._events:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
