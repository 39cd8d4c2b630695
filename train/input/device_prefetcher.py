"""Prepared steps on the device: the next one's copy runs on a stream of its own while this one is computed."""

from typing import Any

import torch

from tandem.parallel.comm.transfer import to_device
from tandem.train.input.prefetcher import Prefetcher, PreparedStep


class DevicePrefetcher:
    """Iterator over (prepared step, its batch on the device) of a prefetcher."""

    def __init__(self, prefetcher: Prefetcher, device: torch.device):
        self._prefetcher, self._device = prefetcher, device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[PreparedStep, Any] | None = None

    def __iter__(self):
        return self

    def __next__(self) -> tuple[PreparedStep, Any]:
        """As `Prefetcher.__next__`; on CUDA the copies of the step after, if it is ready, are under way on return."""
        ahead = self._ahead or self._copy_to_device(next(self._prefetcher))
        self._ahead = None
        if self._copies:
            torch.cuda.current_stream().wait_stream(self._copies)
            ready = self._prefetcher.poll()
            self._ahead = self._copy_to_device(ready) if ready else None
        return ahead

    def drain(self) -> None:
        """As `Prefetcher.drain`."""
        if self._ahead:
            self._ahead[0].release()
        self._ahead = None
        self._prefetcher.drain()

    def _copy_to_device(self, prepared: PreparedStep) -> tuple[PreparedStep, Any]:
        if self._copies is None:
            return prepared, to_device(prepared.batch, self._device)
        self._copies.wait_stream(torch.cuda.current_stream())  # memory of steps that are through may be written again
        with torch.cuda.stream(self._copies):
            return prepared, to_device(prepared.batch, self._device)
