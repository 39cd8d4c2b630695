"""A ring of ranks: each hands a tensor to the rank on its right and gets one of the same shape from its left.

Whatever goes round visits every rank in turn and is home after as many passes as there are ranks.  All ranks pass the
same shapes in the same order, so that no rank ever waits for one that has nothing to say; a ring of one is silent.
"""

import torch
import torch.distributed as dist


class Ring:
    """The ranks of one process group in their order, the last beside the first."""

    def __init__(self, group: dist.ProcessGroup | None):
        """group: its ranks make the ring; None: a ring of one."""
        self._group = group
        self.size = 1 if group is None else group.size()
        self._rank = 0 if group is None else group.rank()

    def origin(self, passes: int) -> int:
        """The rank where what this rank holds after so many passes set out."""
        return (self._rank - passes) % self.size

    def pass_on(self, tensor: torch.Tensor) -> "Passage":
        """Starts to send a contiguous tensor right and to receive its like from the left; returns at once."""
        if self.size == 1:
            return Passage(tensor, tensor, [])
        received = torch.empty_like(tensor)
        right, left = (self._rank + 1) % self.size, (self._rank - 1) % self.size
        pair = [
            dist.P2POp(dist.isend, tensor, group=self._group, group_peer=right),
            dist.P2POp(dist.irecv, received, group=self._group, group_peer=left),
        ]
        return Passage(tensor, received, dist.batch_isend_irecv(pair))


class Passage:
    """One exchange under way; until `wait` has returned, what was sent must not change."""

    def __init__(self, sent: torch.Tensor, received: torch.Tensor, works: list[dist.Work]):
        self._sent, self._received, self._works = sent, received, works

    def wait(self) -> torch.Tensor:
        """What came from the left.  On CUDA the current stream waits, not the host."""
        for work in self._works:
            work.wait()
        return self._received
