"""Visual rows between ranks of a balance group: out to the LLM's first stage, and their gradients home, by chunk.

    encode 0 | encode 1    | encode 2    |            combine 0 |  backward 0   |  backward 1   | backward 2
             | 0 travels   | 1 travels   | 2 travels            | 1 travels     | 2 travels     |

One explicit all-to-all-v a chunk each way, outside autograd, so that every rank takes part whatever it holds; (visual
tokens x width) elements move in either direction and no more.  A chunk travels while the next one is computed: NCCL
works on a stream of its own, gloo in its threads.  At most two chunks' buffers exist besides the leaves.  On either
side a row is read once and written once more than it travels: into the order of its receivers, and into its place.

Legend: C chunks, G ranks of the group, V rows of one chunk that this rank encoded, U rows of this rank's leaves.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tandem.parallel.plan.routes import Routes


@dataclass(frozen=True)
class DispatchPlan:
    """A step's `Routes` as the exchange takes them: what the device indexes with, and on the host the counts.

    send_CV: rows of each chunk's output in the order of its send buffer; leaf_CU: leaf row of each row received of it.
    at_MU: places of each micro-batch's leaf rows in the embedding output.
    """

    send_CV: list[torch.Tensor]
    leaf_CU: list[torch.Tensor]
    send_counts_CG: list[list[int]]
    receive_counts_CG: list[list[int]]
    at_MU: list[torch.Tensor]

    @staticmethod
    def of(routes: Routes) -> "DispatchPlan":
        """On the host; `transfer.to_device` takes it further."""
        sent_C, received_C = routes.send_counts_CG.sum(axis=1), routes.receive_counts_CG.sum(axis=1)
        return DispatchPlan(
            send_CV=list(torch.from_numpy(routes.send_V).split(sent_C.tolist())),
            leaf_CU=list(torch.from_numpy(routes.leaf_U).split(received_C.tolist())),
            send_counts_CG=routes.send_counts_CG.tolist(),
            receive_counts_CG=routes.receive_counts_CG.tolist(),
            at_MU=list(torch.from_numpy(routes.at_U).split(routes.leaf_rows_M)),
        )

    @property
    def leaf_rows(self) -> int:
        return sum(len(leaf_U) for leaf_U in self.leaf_CU)


class Exchange:
    """All-to-all of embedding rows in one balance group; counts the elements that left this rank."""

    def __init__(self, group: dist.ProcessGroup | None):
        self.group = group
        self.elements_dispatched = 0
        self.elements_combined = 0

    def dispatch(self, dispatch_plan: DispatchPlan) -> "Dispatch":
        """The way out of a step's rows."""
        return Dispatch(self, dispatch_plan)

    def combine(
        self, grad_UD: torch.Tensor, dispatch_plan: DispatchPlan
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of chunk 0, 1, ... the rows of its output that were sent [V] and their gradients [V, D].

        A chunk's gradients set off when those of the chunk before are asked for, the first at once.  Collective: every
        rank takes all of them.
        """
        return self._returning(grad_UD, dispatch_plan, self._send_back(grad_UD, dispatch_plan, 0))

    def _returning(self, grad_UD, dispatch_plan, all_to_all):
        for chunk, place_V in enumerate(dispatch_plan.send_CV):
            here = all_to_all
            if chunk + 1 < len(dispatch_plan.send_CV):
                all_to_all = self._send_back(grad_UD, dispatch_plan, chunk + 1)
            yield place_V, here.arrived()

    def _send_back(self, grad_UD: torch.Tensor, dispatch_plan: DispatchPlan, chunk: int) -> "_AllToAll":
        send_UD = grad_UD.index_select(0, dispatch_plan.leaf_CU[chunk])
        self.elements_combined += send_UD.numel()
        return _AllToAll(
            send_UD, dispatch_plan.receive_counts_CG[chunk], dispatch_plan.send_counts_CG[chunk], self.group
        )


class Dispatch:
    """Rows on their way to the leaves: `send` for every chunk in order, then `leaves`."""

    def __init__(self, exchange: Exchange, dispatch_plan: DispatchPlan):
        self._exchange, self._dispatch_plan = exchange, dispatch_plan
        self._leaf_UD: torch.Tensor | None = None  # made by the first send, which knows its width
        self._all_to_all: _AllToAll | None = None
        self._arrived = self._sent = 0

    def send(self, output_ND: torch.Tensor) -> None:
        """Sends the rows of the next chunk, and puts those of the chunk before into their places (collective).

        output_ND: what the encoder made of the chunk; rows that the dispatch plan does not name stay.
        """
        dispatch_plan, exchange, chunk = self._dispatch_plan, self._exchange, self._sent
        send_VD = output_ND.index_select(0, dispatch_plan.send_CV[chunk])
        if self._leaf_UD is None:
            self._leaf_UD = send_VD.new_empty(dispatch_plan.leaf_rows, send_VD.shape[1])
        exchange.elements_dispatched += send_VD.numel()
        counts = dispatch_plan.send_counts_CG[chunk], dispatch_plan.receive_counts_CG[chunk]
        all_to_all = _AllToAll(send_VD, *counts, exchange.group)
        self._place()
        self._all_to_all, self._sent = all_to_all, chunk + 1

    def leaves(self) -> torch.Tensor:
        """The rows of this rank's leaves, [U, D], by micro-batch."""
        self._place()
        assert self._leaf_UD is not None, "every rank sends at least one chunk"
        return self._leaf_UD

    def _place(self) -> None:
        if self._all_to_all is not None and self._leaf_UD is not None:
            self._leaf_UD.index_copy_(0, self._dispatch_plan.leaf_CU[self._arrived], self._all_to_all.arrived())
            self._all_to_all, self._arrived = None, self._arrived + 1


class _AllToAll:
    """One all-to-all-v under way, and the buffers that must live until it has ended."""

    def __init__(self, send_VD: torch.Tensor, send_counts_G, receive_counts_G, group: dist.ProcessGroup | None):
        self._send_VD = send_VD
        self._got_UD = send_VD.new_empty(sum(receive_counts_G), send_VD.shape[1])
        counts = receive_counts_G, send_counts_G
        self._work = dist.all_to_all_single(self._got_UD, send_VD, *counts, group=group, async_op=True)

    def arrived(self) -> torch.Tensor:
        """What came; on CUDA the current stream waits for it, the host does not."""
        self._work.wait()
        return self._got_UD
