"""SigLIP in a world of one against the dense formula; tests/distributed/test_siglip.py has the same over ranks.

Legend: B pairs, D width.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.train.objectives.siglip import siglip_loss

WIDTH = 24


def embeddings(pairs, dtype=torch.float64, seed=0):
    """Unit image and text embeddings, alike enough that matches stand out."""
    draw = torch.Generator().manual_seed(seed)
    image_BD = torch.randn(pairs, WIDTH, generator=draw, dtype=torch.float64)
    text_BD = image_BD + torch.randn(pairs, WIDTH, generator=draw, dtype=torch.float64)
    return [F.normalize(rows_BD, dim=-1).to(dtype).requires_grad_() for rows_BD in (image_BD, text_BD)]


def scalars(dtype=torch.float64, scale=10.0, bias=-4.0):
    return [torch.tensor(value, dtype=dtype, requires_grad=True) for value in (scale, bias)]


def dense(image_BD, text_BD, scale, bias):
    """The formula, all logits at once."""
    logits_BB = scale * image_BD @ text_BD.T + bias
    sign_BB = 2 * torch.eye(len(image_BD), dtype=image_BD.dtype) - 1
    return -F.logsigmoid(sign_BB * logits_BB).sum() / max(len(image_BD), 1)


def ours(*inputs, tile=8):
    return siglip_loss(*inputs, counts=[len(inputs[0])], group=None, tile=tile)


def value_and_gradients(loss, inputs, factor=1.0):
    for tensor in inputs:
        tensor.grad = None
    value = loss(*inputs)
    (factor * value).backward()
    return [value.detach(), *(tensor.grad for tensor in inputs)]


def assert_close(got, expected, tolerance):
    for ours_, theirs in zip(got, expected, strict=True):
        assert ours_.shape == theirs.shape
        assert (ours_.double() - theirs.double()).norm() <= tolerance * theirs.double().norm()


@pytest.mark.parametrize("pairs", [1, 7, 8, 9, 40])
def test_equals_the_dense_formula(pairs):
    inputs = [*embeddings(pairs), *scalars()]
    expected = value_and_gradients(dense, inputs, factor=-3.0)
    assert_close(value_and_gradients(ours, inputs, factor=-3.0), expected, 1e-12)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    got = value_and_gradients(ours, single, factor=-3.0)
    assert all(tensor.dtype == torch.float32 for tensor in got)
    assert_close(got, expected, 1e-5)


def test_no_pairs_are_no_loss():
    value, *gradients = value_and_gradients(ours, [*embeddings(0), *scalars()])
    assert value == 0
    assert [gradient.shape for gradient in gradients] == [(0, WIDTH), (0, WIDTH), (), ()]
    assert all((gradient == 0).all() for gradient in gradients)


@pytest.mark.parametrize(
    ("scale", "bias"), [(1000.0, 0.0), (1000.0, -1000.0), (-1000.0, 300.0), (0.0, 0.0), (27.0, 7.0)]
)
def test_extreme_logits_lose_nothing(scale, bias):
    inputs = [*embeddings(12), *scalars(scale=scale, bias=bias)]
    expected = value_and_gradients(dense, inputs)
    assert_close(value_and_gradients(ours, inputs), expected, 1e-12)
    single = [tensor.detach().float().requires_grad_() for tensor in inputs]
    assert all(tensor.isfinite().all() for tensor in value_and_gradients(ours, single))


def test_a_good_match_keeps_its_small_loss():
    """softplus(z) - z would round a match's loss away in fp32."""
    inputs = [*embeddings(1), *scalars(scale=0.0, bias=14.0)]
    single = [tensor.detach().float() for tensor in inputs]
    torch.testing.assert_close(ours(*single), torch.tensor(14.0).neg().exp().log1p(), rtol=1e-6, atol=0)


def test_bf16_embeddings_have_fp32_logits():
    coarse = [tensor.detach().bfloat16().requires_grad_() for tensor in embeddings(20)]
    inputs = [*coarse, *scalars(torch.float32)]
    got = value_and_gradients(ours, inputs)
    fine = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected = value_and_gradients(dense, fine)
    assert [tensor.dtype for tensor in got] == [torch.float32, torch.bfloat16, torch.bfloat16, *[torch.float32] * 2]
    assert_close(got[:1] + got[3:], expected[:1] + expected[3:], 1e-5)
    assert_close(got[1:3], expected[1:3], 2**-8)


def test_only_what_asks_gets_a_gradient():
    image_BD, text_BD = embeddings(9)
    value = ours(image_BD, text_BD.detach(), *scalars())
    value.backward()
    assert image_BD.grad is not None and text_BD.grad is None
    with torch.no_grad():
        assert torch.equal(ours(image_BD, text_BD, *scalars()), value.detach())
    assert not ours(image_BD.detach(), text_BD.detach(), torch.tensor(10.0), torch.tensor(-4.0)).requires_grad


def test_the_same_bits_each_time():
    inputs = [*embeddings(40, torch.float32), *scalars(torch.float32)]
    first, second = (value_and_gradients(ours, inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


@pytest.mark.parametrize("pairs", [64, 128])
def test_keeps_two_gradients_and_no_logits(pairs):
    inputs = [*embeddings(pairs, torch.float32), *scalars(torch.float32)]
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x)
    with Largest() as largest, hooks:
        value = ours(*inputs)
    assert sum(kept) == 2 * pairs * WIDTH + 2
    with largest:
        value.backward()
    assert largest.elements == pairs * WIDTH  # the gradients themselves; all logits would be pairs * pairs


def test_what_does_not_fit_is_named():
    image_BD, text_BD = embeddings(6)
    with pytest.raises(ValueError, match=r"\(6, 24\) image against \(5, 24\) text"):
        siglip_loss(image_BD, text_BD[:5], *scalars(), counts=[6], group=None)
    with pytest.raises(ValueError, match=r"6 pairs here, but counts of the 1 ranks are \[5\]"):
        siglip_loss(image_BD, text_BD, *scalars(), counts=[5], group=None)
    with pytest.raises(ValueError, match=r"counts of the 1 ranks are \[6, 6\]"):
        siglip_loss(image_BD, text_BD, *scalars(), counts=[6, 6], group=None)
