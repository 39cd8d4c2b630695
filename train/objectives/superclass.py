"""SuperClass: the tokens of a caption as classes of its image (Huang et al. 2024, arXiv 2411.03313, section 3).

    loss_b = logsumexp(logits_b) - sum_k w_bk logits_b[token_bk],    w_bk = idf(token_bk) / sum_k' idf(token_bk')

over the set of tokens of sample b.  The paper's idf is log(|D| / (1 + n)), n of |D| captions holding the token, which
is negative for a token that all hold; its released code counts while it trains and takes log((|D| + 1) / (n + 1)),
which never is.  So do we, with whole captions of all ranks as the unit.  Targets stay sparse: K pairs (sample, token).

Legend: B samples, V vocabulary, T tokens of all samples end to end, K pairs of a sample and a token that it holds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from tandem.parallel.comm.transfer import host_to_device


@dataclass(frozen=True)
class TokenSets:
    """Which tokens each of `samples` samples holds, on the host: int64 [K], in order of sample, no pair twice."""

    token_K: np.ndarray
    sample_K: np.ndarray
    samples: int

    @staticmethod
    def of(tokens_T: np.ndarray, lengths_B: np.ndarray, exclude: Sequence[int] = ()) -> "TokenSets":
        """lengths_B: tokens of each sample, may be 0.  exclude: ids that are no class, such as <eos>."""
        tokens_T, lengths_B = np.asarray(tokens_T, dtype=np.int64), np.asarray(lengths_B, dtype=np.int64)
        if tokens_T.size != lengths_B.sum():
            raise ValueError(f"{tokens_T.size} tokens, but the lengths of the samples sum to {lengths_B.sum()}")
        sample_T = np.repeat(np.arange(lengths_B.size), lengths_B)
        classes = ~np.isin(tokens_T, np.asarray(exclude, dtype=np.int64))
        span = int(tokens_T.max(initial=0)) + 1
        pair_K = np.unique(sample_T[classes] * span + tokens_T[classes])
        return TokenSets(pair_K % span, pair_K // span, lengths_B.size)


@dataclass(frozen=True)
class KHot:
    """Sparse targets: token_K and sample_K int64, no pair twice; weight_K fp32, of sum 1 in each sample."""

    token_K: torch.Tensor
    weight_K: torch.Tensor
    sample_K: torch.Tensor


class InverseFrequency:
    """How many captions were seen and how many of them hold each token, the same on every rank.

    Counts are whole numbers in fp64: exact, and so independent of the order and of the number of ranks.
    """

    def __init__(self, vocab_size: int, device: torch.device | str):
        self.counts_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        self.samples = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, sets: Sequence[TokenSets], group: dist.ProcessGroup | None) -> None:
        """Counts a step's captions of all ranks, in one all-reduce; every rank calls, with what it holds, even nothing.

        group: None where there is one rank.  Raises ValueError for a token outside the vocabulary.
        """
        vocab_size = len(self.counts_V)
        seen = np.zeros(vocab_size + 1)
        for part in sets:
            self._check(part)
            seen[:-1] += np.bincount(part.token_K, minlength=vocab_size)
            seen[-1] += part.samples
        seen = host_to_device(seen, self.counts_V.device)
        if group is not None and group.size() > 1:
            dist.all_reduce(seen, group=group)
        self.counts_V += seen[:-1]
        self.samples += seen[-1]

    def k_hot(self, sets: TokenSets) -> KHot:
        """Targets weighted by the counts so far; all equal where all captions hold all tokens of a sample."""
        self._check(sets)
        device = self.counts_V.device
        token_K, sample_K = host_to_device(sets.token_K, device), host_to_device(sets.sample_K, device)
        holds_K = self.counts_V[token_K]
        idf_K = torch.log1p((self.samples - holds_K) / (holds_K + 1))  # log((|D| + 1) / (n + 1)), 0 where n = |D|
        size_K = host_to_device(np.bincount(sets.sample_K, minlength=sets.samples)[sets.sample_K], device)
        sum_K = torch.zeros(sets.samples, dtype=torch.float64, device=device).index_add_(0, sample_K, idf_K)[sample_K]
        weight_K = torch.where(sum_K > 0, idf_K / sum_K, 1 / size_K)
        return KHot(token_K, weight_K.float(), sample_K)

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint keeps: fp64 `counts` [V] and `samples` ()."""
        return {"counts": self.counts_V.clone(), "samples": self.samples.clone()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Raises ValueError where the state is of another vocabulary."""
        if state["counts"].shape != self.counts_V.shape:
            raise ValueError(
                f"counts of {len(state['counts'])} tokens for a vocabulary of {len(self.counts_V)}: "
                "SuperClass continues only with the tokenizer that it began with"
            )
        self.counts_V.copy_(state["counts"])
        self.samples.copy_(state["samples"])

    def _check(self, sets: TokenSets) -> None:
        largest = int(sets.token_K.max(initial=0))
        if largest >= len(self.counts_V):
            raise ValueError(f"token {largest} is outside the classifier's vocabulary of {len(self.counts_V)}")


def superclass_loss(logits_BV: torch.Tensor, khot: KHot) -> torch.Tensor:
    """Loss of each sample, [B], fp32 (fp64 for fp64 logits); 0 for a sample without a token.

    Nothing of the logits' size is made but their gradient, and for a moment what a softmax needs.
    """
    return _SuperClass.apply(logits_BV, khot.token_K, khot.weight_K, khot.sample_K)


class _SuperClass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_BV, token_K, weight_K, sample_K):
        exact = torch.promote_types(logits_BV.dtype, torch.float32)
        weight_K = weight_K.to(exact)
        target_K = weight_K * logits_BV[sample_K, token_K].to(exact)
        target_B = target_K.new_zeros(len(logits_BV)).index_add_(0, sample_K, target_K)
        has_token_B = torch.zeros_like(target_B).index_fill_(0, sample_K, 1)
        ctx.save_for_backward(logits_BV, token_K, weight_K, sample_K, has_token_B)
        return has_token_B * torch.logsumexp(logits_BV.to(exact), dim=1) - target_B

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_B):
        logits_BV, token_K, weight_K, sample_K, has_token_B = ctx.saved_tensors
        grad_BV = torch.softmax(logits_BV, dim=1, dtype=weight_K.dtype).mul_((grad_B * has_token_B)[:, None])
        grad_BV.index_put_((sample_K, token_K), -weight_K * grad_B[sample_K], accumulate=True)
        return grad_BV.to(logits_BV.dtype), None, None, None
