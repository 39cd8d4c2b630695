"""Cross-entropy computed from the last hidden states: at most one tile of logits exists at a time.

    loss(s) = log sum_v exp(h_s . w_v)  -  h_s . w_label(s)

Logits of all tokens against one block of vocabulary entries are computed, reduced to two numbers per token, and freed;
the backward recomputes them, replaces them by their gradient (softmax minus one-hot) and multiplies it out at once.  If
one block holds the whole vocabulary, its logits are saved for backward instead.  Blocks split the vocabulary and not
the tokens: a block's weight gradient is then one product over all tokens and needs no fp32 sum of the size of the
weight; only the hidden states' gradient needs one, and it is small.  (Recomputed logits: Wijmans et al. 2024, "Cut your
losses in large-vocabulary language models"; split vocabulary: Megatron-LM, Shoeybi et al. 2019, section 3.)

Legend: S tokens of the row on this cp rank, D width, V vocabulary entries of this tensor-parallel rank, B vocabulary
entries of a block.
"""

import math

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from tandem.parallel.kernels.fusion import fused

TILE = 2**26  # logits held at once: 128 MiB in bf16


def linear_cross_entropy(
    hidden_SD: torch.Tensor,
    weight_VD: torch.Tensor,
    labels_S: torch.Tensor,
    group: dist.ProcessGroup | None,
    *,
    sequence_parallel: bool = False,
    tile: int = TILE,
    words: int | None = None,
) -> torch.Tensor:
    """Loss of every token, fp32 [S] (fp64 for fp64 inputs), equal on all ranks of the tensor-parallel `group`.

    hidden_SD: all S tokens, or with `sequence_parallel` this rank's S / tp of them.  weight_VD: this rank's words, the
    group's in order of rank; no group (None): the whole vocabulary.  labels_S: int64 over the whole vocabulary; a label
    outside of it counts as a word of logit 0.  words: of the whole vocabulary, where the last ranks' rows pad it: each
    rank has at least one, and padding has no logit and a zero gradient.  Products are in the inputs' dtype, softmax and
    sums in fp32.  One collective in the forward (two numbers a token and rank) besides the gathering of hidden states.
    """
    here = weight_VD.shape[0]
    if words is not None:
        here = min(here, words - here * (0 if group is None else dist.get_rank(group)))
    return _LinearCrossEntropy.apply(hidden_SD, weight_VD, labels_S, group, sequence_parallel, tile, here)


def peak_bytes(tokens: int, width: int, words: int, itemsize: int, tile: int = TILE) -> int:
    """Most memory that forward and backward take beyond their inputs, the gradients that they return included.

    words: of this rank.  Holds without sequence parallelism, which adds the gathered hidden states, and for code that
    is not compiled: where it is, the fp32 copies of a tile are never written.
    """
    tile = min(block_of(tokens, words, tile), words) * tokens
    wide = 0 if itemsize >= 4 else 4
    numbers = 64 * tokens  # losses, labels and the like, of 8 bytes at most
    kept = tile * itemsize if tile == words * tokens else 0
    forward = tile * (itemsize + (2 * wide or itemsize))
    slopes = kept + tile * (itemsize + wide)
    sums = tokens * width * (wide or itemsize)
    cast = tokens * width * itemsize if wide else 0
    return numbers + max(forward, words * width * itemsize + sums + slopes + cast)


def block_of(tokens: int, words: int, tile: int) -> int:
    """Words of a block: even blocks of at most `tile` logits, but for rounding up to a multiple of 128."""
    blocks = max(1, math.ceil(tokens * words / tile))
    return math.ceil(words / blocks / 128) * 128


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_SD, padded_VD, labels_S, group, sequence_parallel, tile, words):
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        labels_S = labels_S - rank * padded_VD.shape[0]
        weight_VD = padded_VD[:words]
        whole_SD = _gather(hidden_SD, group) if sequence_parallel and ranks > 1 else hidden_SD
        log_sum_S = label_S = labels_S  # of no block yet
        for first, weight_BD in _blocks(weight_VD, whole_SD.shape[0], tile):
            logits_SB = whole_SD @ weight_BD.T
            part_2S = _reduced(logits_SB, labels_S - first)
            log_sum_S = part_2S[0] if first == 0 else torch.logaddexp(log_sum_S, part_2S[0])
            label_S = part_2S[1] if first == 0 else label_S + part_2S[1]
        if ranks > 1:
            all_R2S = _gather(torch.stack((log_sum_S, label_S))[None], group)
            log_sum_S, label_S = torch.logsumexp(all_R2S[:, 0], 0), all_R2S[:, 1].sum(0)
        loss_S = log_sum_S - label_S
        kept_SV = logits_SB if logits_SB.shape[1] == weight_VD.shape[0] else None
        ctx.save_for_backward(hidden_SD, padded_VD, labels_S, log_sum_S, loss_S, kept_SV)
        ctx.group, ctx.ranks, ctx.tile, ctx.words = group, ranks, tile, words
        ctx.sequence_parallel = sequence_parallel and ranks > 1
        return loss_S

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_S):
        hidden_SD, padded_VD, labels_S, log_sum_S, loss_S, kept_SV = ctx.saved_tensors
        weight_VD = padded_VD[: ctx.words]
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        whole_SD = _gather(hidden_SD, ctx.group) if ctx.sequence_parallel else hidden_SD
        sums_SD = torch.empty_like(whole_SD, dtype=log_sum_S.dtype) if to_hidden else None
        grad_VD = torch.empty_like(padded_VD) if to_weight else None
        if grad_VD is not None:
            grad_VD[ctx.words :] = 0
        label_slope_S = torch.expm1(-loss_S) * grad_S
        for first, weight_BD in _blocks(weight_VD, whole_SD.shape[0], ctx.tile):
            slopes_SB = whole_SD @ weight_BD.T if kept_SV is None else kept_SV.clone()
            _to_slopes(slopes_SB, log_sum_S, grad_S)
            _put_labels(slopes_SB, labels_S - first, label_slope_S)
            if grad_VD is not None:
                torch.mm(slopes_SB.T, whole_SD, out=grad_VD[first : first + len(weight_BD)])
            if sums_SD is not None:
                _add_product(sums_SD, slopes_SB, weight_BD, begin=first == 0)
            del slopes_SB  # before the next block's logits are made
        if sums_SD is None:
            return None, grad_VD, None, None, None, None, None
        grad_SD = sums_SD.to(hidden_SD.dtype)
        if ctx.sequence_parallel:
            grad_SD = _scatter_sum(grad_SD, ctx.group, ctx.ranks)
        elif ctx.ranks > 1:
            dist.all_reduce(grad_SD, group=ctx.group)
        return grad_SD, grad_VD, None, None, None, None, None


def _blocks(weight_VD, tokens, tile):
    """(first vocabulary entry, weights) of every block."""
    size = block_of(tokens, weight_VD.shape[0], tile)
    for first in range(0, weight_VD.shape[0], size):
        yield first, weight_VD[first : first + size]


@fused
def _reduced(logits_SB, label_S):
    """log sum exp and the label's logit, 0 where the label is not in this block, both fp32: [2, S]."""
    wide_SB = logits_SB.to(torch.promote_types(logits_SB.dtype, torch.float32))
    words = logits_SB.shape[1]
    at_S = wide_SB.gather(1, label_S.clamp(0, words - 1)[:, None])[:, 0]
    here_S = (label_S >= 0) & (label_S < words)
    return torch.stack((wide_SB.logsumexp(1), torch.where(here_S, at_S, 0.0)))


@fused
def _to_slopes(logits_SB, log_sum_S, grad_S):
    """Turns logits into softmax * the loss's gradient in place, fp32 inside."""
    wide_SB = logits_SB.to(log_sum_S.dtype)
    wide_SB.sub_(log_sum_S[:, None]).exp_().mul_(grad_S[:, None])
    logits_SB.copy_(wide_SB)


def _put_labels(slopes_SB, label_S, label_slope_S):
    """Writes (softmax - 1) * the loss's gradient at the labels of this block; softmax = exp(-loss) there."""
    words = slopes_SB.shape[1]
    place_S1 = label_S.clamp(0, words - 1)[:, None]
    here_S1 = ((label_S >= 0) & (label_S < words))[:, None]
    value_S1 = torch.where(here_S1, label_slope_S[:, None].to(slopes_SB.dtype), slopes_SB.gather(1, place_S1))
    slopes_SB.scatter_(1, place_S1, value_S1)


def _add_product(sums_SD, slopes_SB, weight_BD, begin):
    """sums += slopes @ weight, on CUDA without rounding the product; `begin`: sums are not yet filled."""
    beta = 0 if begin else 1
    if sums_SD.dtype == weight_BD.dtype:
        sums_SD.addmm_(slopes_SB, weight_BD, beta=beta)
    elif sums_SD.is_cuda:
        torch.addmm(sums_SD, slopes_SB, weight_BD, out_dtype=sums_SD.dtype, beta=beta, out=sums_SD)
    else:  # a CPU has no product of bf16 into fp32
        product_SD = slopes_SB @ weight_BD
        sums_SD.copy_(product_SD) if begin else sums_SD.add_(product_SD)


def _gather(local, group):
    whole = local.new_empty(dist.get_world_size(group) * local.shape[0], *local.shape[1:])
    dist.all_gather_into_tensor(whole, local.contiguous(), group=group)
    return whole


def _scatter_sum(whole, group, ranks):
    local = whole.new_empty(whole.shape[0] // ranks, *whole.shape[1:])
    dist.reduce_scatter_tensor(local, whole, group=group)
    return local
