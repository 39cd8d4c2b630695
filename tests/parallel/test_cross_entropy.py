"""Cross-entropy from hidden states against the plain one: all logits, log_softmax, and autograd.

fp64 inputs agree to 1e-12: sums in another order.  bf16 is compared with the plain formula on the same bf16 products,
so that what remains is rounding of the gradient's tiles to bf16 (2^-9 of each, as the plain backward rounds them).
"""

import functools
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tandem.parallel.kernels.cross_entropy import block_of, linear_cross_entropy, peak_bytes

MIB = 2**20
TILES = (2**26, 7 * 128, 1)  # one block, a few uneven ones, as many as there can be


def inputs(tokens, width=12, words=300, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden_SD = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(dtype)
    weight_VD = (torch.randn(words, width, generator=generator, dtype=torch.float64) / 2).to(dtype)
    labels_S = torch.randint(words, (tokens,), generator=generator)
    grad_S = torch.rand(tokens, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    return hidden_SD, weight_VD, labels_S, grad_S


def plain(hidden_SD, weight_VD, labels_S):
    logits_SV = hidden_SD @ weight_VD.T
    logits_SV = logits_SV.to(torch.promote_types(logits_SV.dtype, torch.float32))
    return F.cross_entropy(logits_SV, labels_S, reduction="none")


def loss_and_gradients(function, hidden_SD, weight_VD, labels_S, grad_S):
    hidden_SD, weight_VD = hidden_SD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    loss_S = function(hidden_SD, weight_VD, labels_S)
    return loss_S.detach(), *torch.autograd.grad(loss_S, (hidden_SD, weight_VD), grad_S)


def ours(tile):
    return lambda *given: linear_cross_entropy(*given, None, tile=tile)


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("tokens", [0, 1, 23])
def test_equals_the_plain_one(tile, tokens):
    given = inputs(tokens)
    for mine, theirs in zip(loss_and_gradients(ours(tile), *given), loss_and_gradients(plain, *given), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tile", TILES)
def test_rows_that_pad_the_vocabulary_never_win(tile):
    """Equal to the bit without them, and their gradient is zero, whatever they hold."""
    hidden_SD, weight_VD, labels_S, grad_S = inputs(23)
    padded_VD = torch.cat([weight_VD, 100 * torch.ones(5, 12, dtype=torch.float64)])
    words = functools.partial(linear_cross_entropy, group=None, tile=tile, words=300)
    mine = loss_and_gradients(words, hidden_SD, padded_VD, labels_S, grad_S)
    theirs = loss_and_gradients(ours(tile), hidden_SD, weight_VD, labels_S, grad_S)
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert torch.equal(mine[2][:300], theirs[2]) and not mine[2][300:].any()


@pytest.mark.parametrize("tile", TILES)
def test_bf16_differs_by_its_rounding_alone(tile):
    given = inputs(64, width=32, words=700, dtype=torch.bfloat16)
    mine, theirs = loss_and_gradients(ours(tile), *given), loss_and_gradients(plain, *given)
    exact = loss_and_gradients(plain, *(x.double() if x.is_floating_point() else x for x in given))
    assert mine[0].dtype == torch.float32 and mine[1].dtype == mine[2].dtype == torch.bfloat16
    torch.testing.assert_close(mine[0], theirs[0], rtol=0, atol=1e-5)  # the same bf16 logits, summed in another order
    for x, y, z in zip(mine[1:], theirs[1:], exact[1:], strict=True):
        error, plain_error = ((w.double() - z).norm() / z.norm() for w in (x, y))
        assert error < max(1.1 * plain_error, 2**-8)


def test_large_logits_and_certain_predictions():
    hidden_SD, weight_VD, _, grad_S = inputs(9)
    given = 300 * hidden_SD, weight_VD, (300 * hidden_SD @ weight_VD.T).argmax(1), grad_S
    for mine, theirs in zip(loss_and_gradients(ours(1), *given), loss_and_gradients(plain, *given), strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_a_label_of_no_word_is_one_of_logit_zero():
    hidden_SD, weight_VD, labels_S, grad_S = inputs(5)
    labels_S[2], labels_S[4] = -100, 300
    loss_S, hidden_grad_SD, _ = loss_and_gradients(ours(7 * 128), hidden_SD, weight_VD, labels_S, grad_S)
    logits_SV = hidden_SD @ weight_VD.T
    torch.testing.assert_close(loss_S[[2, 4]], logits_SV.logsumexp(1)[[2, 4]])
    pulled_SD = grad_S[:, None] * (logits_SV.softmax(1) @ weight_VD)
    torch.testing.assert_close(hidden_grad_SD[[2, 4]], pulled_SD[[2, 4]])


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_no_gradient_is_computed_that_nobody_wants(frozen):
    hidden_SD, weight_VD, labels_S, grad_S = inputs(5, words=4096)
    _, *wanted = loss_and_gradients(plain, hidden_SD, weight_VD, labels_S, grad_S)
    learns = weight_VD if frozen == "hidden" else hidden_SD
    learns.requires_grad_()
    loss_S = linear_cross_entropy(hidden_SD, weight_VD, labels_S, None, tile=1)
    with Allocations() as allocations:
        loss_S.backward(grad_S)
    torch.testing.assert_close(learns.grad, wanted[frozen == "hidden"])
    assert (allocations.peak > weight_VD.nbytes) == (frozen == "hidden")


def test_without_autograd_nothing_is_kept():
    hidden_SD, weight_VD, labels_S, _ = inputs(64, words=1000)
    with torch.no_grad(), Allocations() as allocations:
        loss_S = linear_cross_entropy(hidden_SD, weight_VD.requires_grad_(), labels_S, None)
    assert loss_S.grad_fn is None
    assert allocations.live == loss_S.nbytes


def test_the_same_to_the_bit_when_computed_again():
    given = inputs(33, dtype=torch.float32)
    once, again = (loss_and_gradients(ours(7 * 128), *given) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


@pytest.mark.parametrize(
    ("tokens", "words", "tile"), [(0, 5, 1), (1, 5, 1), (32768, 155136, 2**26), (7, 1001, 900), (131072, 19392, 2**26)]
)
def test_blocks_are_even_and_within_the_tile(tokens, words, tile):
    block = block_of(tokens, words, tile)
    assert block % 128 == 0 and block > 0
    assert tokens * (block - 128) < max(tile, 1) or block == 128


# ---- memory --------------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Bytes of the storages that operations under this mode made: alive now, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        if storage not in self._seen:
            size = storage.nbytes()
            self._seen[storage] = size
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 64, 4096, 2**17), (2048, 128, 1024, 2**18), (256, 512, 2048, 2**20)])
def test_memory_is_that_of_the_formula(shape, dtype):
    """Under the formula, and above half of it: it is a bound that means something."""
    tokens, width, words, tile = shape
    given = inputs(tokens, width, words, dtype)
    with Allocations() as allocations:
        loss_and_gradients(ours(tile), *given)
    peak = allocations.peak - given[0].nbytes - given[1].nbytes  # the copies that `loss_and_gradients` makes
    bound = peak_bytes(tokens, width, words, dtype.itemsize, tile)
    assert 0.5 * bound < peak <= bound


def test_a_full_size_row_takes_less_than_one_and_a_half_gib():
    assert peak_bytes(32768, 2048, 155136, 2) <= 1.5 * 1024 * MIB
    assert peak_bytes(32768, 2048, 155136, 2) < 32768 * 155136 * 2 / 6  # the logits alone in bf16
