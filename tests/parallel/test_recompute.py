"""What is kept for the backward, where, and what is made again.

Legend: N rows, D width.
"""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tandem.parallel.kernels import recompute
from tandem.parallel.kernels.recompute import HostStore, kept_matmuls, recomputed

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr(recompute, "LEAST_BYTES", 0)


def gradients(module: nn.Module, x_ND: torch.Tensor, context) -> list[torch.Tensor]:
    x_ND = x_ND.clone().requires_grad_()
    module.zero_grad()
    with context:
        y_ND = module(x_ND)
    y_ND.square().sum().backward()
    return [x_ND.grad, *(parameter.grad for parameter in module.parameters())]


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())))


def test_stored_tensors_give_the_same_gradients(stack):
    x_ND = torch.randn(5, 8)
    wanted = gradients(stack, x_ND, torch.enable_grad())
    found = gradients(stack, x_ND, HostStore(CPU, stack.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_nothing_stored_stays_on_the_device_after_the_forward(stack):
    """And of a forward under way no more than IN_FLIGHT tensors; weights are left where they are."""
    left = []

    class Watched(nn.Module):
        def forward(self, x_ND):
            left.append(weakref.ref(x_ND.untyped_storage()))
            alive.append(sum(storage() is not None for storage in left))
            return x_ND

    alive = []
    stack = nn.Sequential(*(part for layer in stack for part in (layer, Watched())))
    store = HostStore(CPU, stack.parameters())
    with store:
        y_ND = stack(torch.randn(5, 8))
    gc.collect()
    assert len(store._saved) > recompute.IN_FLIGHT and not store._leaving
    assert max(alive) <= recompute.IN_FLIGHT + 2
    assert all(held() is None or held()._device is None for held in store._saved)
    y_ND.sum().backward()
    assert all(held() is None for held in store._saved), "gone with the graph"


def test_views_of_one_tensor_are_stored_once():
    x_N = torch.randn(12, requires_grad=True)
    store = HostStore(CPU)
    with store:
        made_N = x_N * 1.0
        a, b = made_N.view(3, 4), made_N[2:10:2]
        loss = (a * a).sum() + (b * b).sum()
    assert len(store._saved) == 1
    loss.backward()
    wanted = 2 * x_N.detach()
    wanted[2:10:2] *= 2
    assert torch.equal(x_N.grad, wanted)


def test_what_was_stored_before_comes_back_ahead(stack):
    store = HostStore(CPU, stack.parameters())
    with store:
        y_ND = stack(torch.randn(5, 8, requires_grad=True))
    seen = []
    y_ND.register_hook(lambda gradient: seen.append(sum(held()._device is not None for held in store._saved)))
    first = next(held() for held in reversed(store._saved))
    first.come_back()
    store.unpack(recompute._View(first, torch.float32, torch.Size([5, 8]), (8, 1), 0))
    assert sum(held()._device is not None for held in store._saved) == recompute.IN_FLIGHT + 1


def test_tensors_that_are_made_again_are_not_kept():
    weight_DD = torch.randn(4, 4, requires_grad=True)
    x_ND = torch.randn(6, 4)
    calls = []

    def make(x_ND, weight_DD):
        calls.append(torch.is_grad_enabled())
        return x_ND @ weight_DD, 2 * (x_ND @ weight_DD)

    made_ND, twice_ND = make(x_ND, weight_DD)
    wanted_ND = 2 * made_ND.detach()
    wanted_ND[1:] += 3 * 8 * made_ND.detach()[1:]
    memory = [weakref.ref(made.untyped_storage()) for made in (made_ND, twice_ND)]
    with recomputed((made_ND, twice_ND), make, (x_ND, weight_DD), HostStore(CPU, [weight_DD])):
        loss = (made_ND * made_ND).sum() + 3 * (twice_ND[1:] * twice_ND[1:]).sum()
    del made_ND, twice_ND
    assert [storage() for storage in memory] == [None, None]
    loss.backward()
    torch.testing.assert_close(weight_DD.grad, x_ND.T @ wanted_ND)
    assert calls == [True, False], "made again once, without a graph"


class _Count(TorchDispatchMode):
    def __init__(self):
        self.ops = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.ops.append(op)
        return op(*args, **(kwargs or {}))


def test_matmuls_into_other_widths_are_kept():
    """Of three in the layer, the one into 12 is not computed twice, the first into 8 is, and the last needs not be."""
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 8))
    x_ND = torch.randn(5, 8)
    wanted = gradients(layer, x_ND, torch.enable_grad())
    x_ND = x_ND.clone().requires_grad_()
    layer.zero_grad()
    y_ND = checkpoint(layer, x_ND, use_reentrant=False, context_fn=kept_matmuls(8, []))
    with _Count() as counted:
        y_ND.square().sum().backward()
    assert counted.ops.count(torch.ops.aten.addmm.default) == 1
    assert all(torch.equal(a, p.grad) for a, p in zip(wanted, [x_ND, *layer.parameters()], strict=True))
