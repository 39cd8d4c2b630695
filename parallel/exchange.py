"""Visual rows between ranks of a balance group: out to the LLM's first stage, and their gradients home.

One explicit all-to-all-v each way, outside autograd, so that every rank takes part whatever it holds: (visual tokens x
width) elements move in either direction and no more.

Legend: V rows this rank encoded, U rows this rank received, D width.
"""

import torch
import torch.distributed as dist

from parallel.routes import Routes
from parallel.transfer import host_to_device


class Exchange:
    """All-to-all of embedding rows in one balance group; counts the elements that left this rank."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.elements_delivered = 0
        self.elements_returned = 0

    def deliver(self, rows_VD: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Sends every encoded row to its place; returns the rows of this rank's leaves, [U, D], by micro-batch."""
        send_VD = rows_VD.index_select(0, host_to_device(routes.send_V, rows_VD.device))
        got_UD = rows_VD.new_empty(sum(routes.receive_counts_G), rows_VD.shape[1])
        dist.all_to_all_single(got_UD, send_VD, routes.receive_counts_G, routes.send_counts_G, group=self.group)
        self.elements_delivered += send_VD.numel()
        return got_UD.index_select(0, host_to_device(routes.take_U, got_UD.device))

    def give_back(self, grad_UD: torch.Tensor, routes: Routes) -> torch.Tensor:
        """Sends the leaves' gradients home; returns the gradient of every row this rank encoded, [V, D]."""
        send_UD = torch.empty_like(grad_UD)
        send_UD[host_to_device(routes.take_U, grad_UD.device)] = grad_UD
        got_VD = grad_UD.new_empty(sum(routes.send_counts_G), grad_UD.shape[1])
        dist.all_to_all_single(got_VD, send_UD, routes.send_counts_G, routes.receive_counts_G, group=self.group)
        self.elements_returned += send_UD.numel()
        home_VD = torch.empty_like(got_VD)
        home_VD[host_to_device(routes.send_V, got_VD.device)] = got_VD
        return home_VD
