"""SuperClass against the dense formula, and the counts behind its weights against a loop over captions.

Legend: B samples, V vocabulary, K pairs of a sample and a token that it holds.
"""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tandem.train.objectives.superclass import InverseFrequency, KHot, TokenSets, superclass_loss

VOCAB, EOS = 37, 36


def captions(samples, seed=0, longest=9):
    """Random captions, some of them empty, the common tokens far more frequent; each ends with <eos>."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, longest + 1, samples)
    return [[*np.minimum(draw.geometric(0.15, length), EOS - 1).tolist(), EOS] for length in lengths]


def sets_of(texts, exclude=(EOS,)):
    flat = np.array([token for text in texts for token in text], dtype=np.int64)
    return TokenSets.of(flat, np.array([len(text) for text in texts], dtype=np.int64), exclude)


def counted(*steps, vocab=VOCAB):
    idf = InverseFrequency(vocab, "cpu")
    for texts in steps:
        idf.update([sets_of(texts)], None)
    return idf


def dense_targets(texts, seen, dtype=torch.float64):
    """[B, V] by the definition, token by token."""
    target_BV = torch.zeros(len(texts), VOCAB, dtype=dtype)
    for sample, text in enumerate(texts):
        for token in set(text) - {EOS}:
            holds = sum(token in other for other in seen)
            target_BV[sample, token] = math.log((len(seen) + 1) / (holds + 1))
        total = target_BV[sample].sum()
        if total == 0 and set(text) - {EOS}:
            target_BV[sample] = torch.tensor([float(token in set(text) - {EOS}) for token in range(VOCAB)])
            total = target_BV[sample].sum()
        target_BV[sample] /= max(total, 1e-300)
    return target_BV


def dense_of(khot, samples):
    target_BV = torch.zeros(samples, VOCAB, dtype=torch.float64)
    target_BV[khot.sample_K, khot.token_K] = khot.weight_K.double()
    return target_BV


def dense_loss(logits_BV, target_BV):
    return -(target_BV * torch.log_softmax(logits_BV, dim=1)).sum(dim=1)


def test_weights_are_those_of_the_definition():
    steps = [captions(40, seed) for seed in range(3)]
    idf, last = counted(*steps), steps[-1]
    expected_BV = dense_targets(last, [text for texts in steps for text in texts])
    got_BV = dense_of(idf.k_hot(sets_of(last)), len(last))
    torch.testing.assert_close(got_BV, expected_BV, rtol=1e-6, atol=0)
    has_token_B = torch.tensor([len(text) > 1 for text in last])
    assert not has_token_B.all()
    torch.testing.assert_close(got_BV.sum(dim=1), has_token_B.double(), rtol=1e-6, atol=0)


def test_a_set_holds_each_token_once_and_no_excluded_one():
    sets = sets_of([[5, 3, 5, 5, EOS], [EOS], [], [3, 0, EOS]])
    assert sets.token_K.tolist() == [3, 5, 0, 3]
    assert sets.sample_K.tolist() == [0, 0, 3, 3]
    assert sets.samples == 4
    assert sets_of([[1, EOS], [EOS]], exclude=()).token_K.tolist() == [1, EOS, EOS]


def test_tokens_that_every_caption_holds_weigh_the_same():
    texts = [[4, 7, EOS], [7, 4, EOS]]
    assert counted(texts).k_hot(sets_of(texts)).weight_K.tolist() == [0.5] * 4
    khot = counted(texts).k_hot(sets_of([[4, 9, EOS]]))  # 4 says nothing, 9 was never seen
    assert khot.weight_K.tolist() == [0.0, 1.0]
    fresh = InverseFrequency(VOCAB, "cpu").k_hot(sets_of([[1, 2, 3, EOS]]))  # before any caption
    torch.testing.assert_close(fresh.weight_K, torch.full((3,), 1 / 3))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_loss_equals_the_dense_formula(dtype, tolerance):
    texts = captions(23)
    khot = counted(texts).k_hot(sets_of(texts))
    target_BV = dense_of(khot, len(texts)).requires_grad_(False)
    target_BV /= target_BV.sum(dim=1, keepdim=True).clamp(min=1e-300)  # weights are fp32, their sum 1 to 1e-7
    weight_K = target_BV[khot.sample_K, khot.token_K]
    khot = KHot(khot.token_K, weight_K.to(dtype), khot.sample_K)
    logits_BV = 5 * torch.randn(len(texts), VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    factor_B = torch.linspace(-1, 2, len(texts), dtype=torch.float64)
    results = []
    for loss, leaf_BV, targets in (
        (dense_loss, logits_BV.clone().requires_grad_(), target_BV),
        (superclass_loss, logits_BV.to(dtype).requires_grad_(), khot),
    ):
        loss_B = loss(leaf_BV, targets)
        (loss_B * factor_B.to(loss_B.dtype)).sum().backward()
        results.append((loss_B.detach().double(), leaf_BV.grad.double()))
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() <= tolerance * expected.norm()
    assert leaf_BV.grad.dtype == dtype


def test_no_token_no_loss_and_no_gradient():
    texts = [[EOS], [2, EOS], []]
    khot = counted(texts).k_hot(sets_of(texts))
    logits_BV = torch.randn(3, VOCAB, requires_grad=True)
    loss_B = superclass_loss(logits_BV, khot)
    loss_B.sum().backward()
    assert loss_B[0] == 0 and loss_B[2] == 0 and loss_B[1] > 0
    assert (logits_BV.grad[[0, 2]] == 0).all() and (logits_BV.grad[1] != 0).all()
    for shape, nothing in (((2, VOCAB), [[], [EOS]]), ((0, VOCAB), [])):
        blank_BV = torch.randn(shape, requires_grad=True)
        superclass_loss(blank_BV, counted(texts).k_hot(sets_of(nothing))).sum().backward()
        assert blank_BV.grad.shape == shape and (blank_BV.grad == 0).all()


def test_bf16_logits_are_summed_in_fp32():
    texts = captions(8)
    khot = counted(texts).k_hot(sets_of(texts))
    coarse_BV = (5 * torch.randn(8, VOCAB)).bfloat16().requires_grad_()
    fine_BV = coarse_BV.detach().float().requires_grad_()
    coarse_B, fine_B = superclass_loss(coarse_BV, khot), superclass_loss(fine_BV, khot)
    assert coarse_B.dtype == torch.float32 and torch.equal(coarse_B, fine_B)
    coarse_B.sum().backward()
    fine_B.sum().backward()
    assert torch.equal(coarse_BV.grad, fine_BV.grad.bfloat16())


class SizesMade(TorchDispatchMode):
    """Collects the tensors of this many elements that operations return, alive, so that no address serves twice."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.tensors = elements, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.elements:
            self.tensors.append(result)
        return result


def test_no_dense_target_is_made():
    texts = captions(6)
    logits_BV = torch.randn(6, VOCAB, requires_grad=True)
    with SizesMade(logits_BV.numel()) as sizes:
        loss_B = superclass_loss(logits_BV, counted(texts).k_hot(sets_of(texts)))
        (grad_BV,) = torch.autograd.grad(loss_B.sum(), logits_BV)
    made = {tensor.data_ptr() for tensor in sizes.tensors} - {logits_BV.data_ptr()}
    assert made == {grad_BV.data_ptr()}


def test_state_goes_round():
    first, second = captions(30, 1), captions(30, 2)
    whole, half = counted(first, second), counted(first)
    state = half.state()
    assert {name: tensor.dtype for name, tensor in state.items()} == dict.fromkeys(("counts", "samples"), torch.float64)
    resumed = InverseFrequency(VOCAB, "cpu")
    resumed.load_state(state)
    resumed.update([sets_of(second)], None)
    assert all(torch.equal(resumed.state()[name], tensor) for name, tensor in whole.state().items())
    assert all(torch.equal(state[name], tensor) for name, tensor in half.state().items())  # a copy, not a view


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="token 37 is outside the classifier's vocabulary of 37"):
        counted([[37, EOS]])
    with pytest.raises(ValueError, match="counts of 37 tokens for a vocabulary of 40"):
        InverseFrequency(40, "cpu").load_state(counted(captions(3)).state())
    with pytest.raises(ValueError, match="3 tokens, but the lengths of the samples sum to 4"):
        TokenSets.of(np.arange(3), np.array([2, 2]))
