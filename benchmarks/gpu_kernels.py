"""Single operations in benchmarks/gpu.py: attention on its own, by backend, and cross-entropy over a large vocabulary.

Legend: S tokens, D width, V words, T query tokens, H query heads, G key/value heads, K head width.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_measure import Place, Variant, Work, relative
from benchmarks.gpu_reference import softmax_attention
from benchmarks.gpu_tower import BACKEND_NEEDS, choose_attention
from benchmarks.workloads.tower import draw_pack, random_like
from tandem.parallel.kernels import attention, compilation
from tandem.parallel.kernels.attention import Segments
from tandem.parallel.kernels.cross_entropy import linear_cross_entropy
from tandem.train.cost.flops import causal_pairs

BACKENDS = ("flash4", "varlen", "cudnn", "te", "sdpa")
BACKWARD = 2.5  # FLOPs of attention's backward over those of its forward: five products for two


@dataclass(frozen=True)
class AttentionCase:
    """lengths: of the packed segments."""

    name: str
    lengths: tuple[int, ...]
    heads: int
    kv_heads: int
    head_width: int
    causal: bool

    @property
    def flops(self) -> int:
        """Of forward and backward; a causal segment counts half its square."""
        pairs = causal_pairs(self.lengths) if self.causal else sum(n * n for n in self.lengths)
        return round((1 + BACKWARD) * 4 * pairs * self.heads * self.head_width)


def attention_cases(place: Place) -> list[AttentionCase]:
    if not place.full:
        return [AttentionCase("attention toy", (64, 48, 16), 4, 2, 32, True)]
    images = tuple(draw_pack(32768).lengths_I.tolist())
    draw, mix = np.random.default_rng(0), []
    while sum(mix) < 32768:
        mix.append(min(round(256 * 32 ** draw.random()), 32768 - sum(mix)))
    return [
        AttentionCase("attention, image mix", images, 20, 20, 64, False),
        AttentionCase("attention, 8 x 4096", (4096,) * 8, 20, 20, 64, False),
        AttentionCase("attention, 4 x 8192", (8192,) * 4, 32, 4, 128, True),
        AttentionCase("attention, causal mix", tuple(mix), 32, 4, 128, True),
    ]


def attention_table(place: Place) -> Iterator[Variant]:
    for case in attention_cases(place):
        for backend in BACKENDS if place.device.type == "cuda" else ("sdpa",):
            if backend == "cudnn" and len(set(case.lengths)) > 1:
                continue  # it takes segments of one length
            yield attention_row(place, case, backend)


def attention_row(place: Place, case: AttentionCase, backend: str) -> Variant:
    def inputs(lengths, device: torch.device, dtype: torch.dtype):
        tokens, heads = sum(lengths), (case.heads, case.kv_heads, case.kv_heads, case.heads)
        # drawn on the CPU, so that a reference there sees the same numbers
        drawn = [
            random_like((tokens, h, case.head_width), torch.device("cpu"), place.dtype, seed)
            for seed, h in enumerate(heads)
        ]
        q, k, v, gradient = (x.to(device, dtype) for x in drawn)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        return leaves, gradient, Segments.of(lengths, device=device)

    def build() -> Work:
        choose_attention(backend, place)
        leaves, gradient, segments = inputs(case.lengths, place.device, place.dtype)

        def step():
            output = attention.attention(*leaves, segments, causal=case.causal)
            torch.autograd.grad(output, leaves, gradient)

        return Work(step, flops=case.flops, tokens=sum(case.lengths))

    def error() -> float:
        choose_attention(backend, place)
        found, wanted = [], []
        few = (128, 128) if backend == "cudnn" else (193, 64, 1, 62)
        for device, dtype, results in (
            (place.device, place.dtype, found),
            (torch.device("cpu"), torch.float64, wanted),
        ):
            leaves, gradient, segments = inputs(few, device, dtype)
            if results is wanted:
                output = softmax_attention(*leaves, segments, case.causal)
            else:
                output = attention.attention(*leaves, segments, causal=case.causal)
            results += [output, *torch.autograd.grad(output, leaves, gradient)]
        return relative(found, wanted)

    return Variant(case.name, backend, build, error, BACKEND_NEEDS.get(backend, {}))


# ---- cross-entropy ---------------------------------------------------------------------------------------------------


def plain_cross_entropy(hidden_SD, weight_VD, labels_S):
    """All logits at once, fp32 in the loss."""
    return F.cross_entropy((hidden_SD @ weight_VD.T).float(), labels_S, reduction="none")


def exact_cross_entropy(hidden_SD, weight_VD, labels_S):
    return F.cross_entropy(hidden_SD @ weight_VD.T, labels_S, reduction="none")


def our_cross_entropy(hidden_SD, weight_VD, labels_S):
    return linear_cross_entropy(hidden_SD, weight_VD, labels_S, None)


def cross_entropy(place: Place) -> Iterator[Variant]:
    """Hidden states and the vocabulary's matrix to losses and back."""
    yield cross_entropy_row(place, "tile by tile", our_cross_entropy, ours=True)
    yield cross_entropy_row(place, "all logits at once", plain_cross_entropy, ours=False)


def cross_entropy_row(place: Place, name: str, function, ours: bool) -> Variant:
    tokens, width, words = (32768, 2048, 155136) if place.full else (512, 64, 2048)

    def inputs(tokens: int, width: int, words: int, device: torch.device, dtype: torch.dtype):
        hidden_SD = random_like((tokens, width), torch.device("cpu"), place.dtype)
        weight_VD = random_like((words, width), torch.device("cpu"), place.dtype, seed=2) * width**-0.5
        labels_S = torch.arange(tokens) * 7919 % words
        leaves = [x.to(device, dtype).requires_grad_() for x in (hidden_SD, weight_VD)]
        return leaves, labels_S.to(device)

    def build() -> Work:
        compilation.configure("auto")
        leaves, labels_S = inputs(tokens, width, words, place.device, place.dtype)
        share = torch.full((tokens,), 1 / tokens, device=place.device)

        def step():
            torch.autograd.grad(function(*leaves, labels_S), leaves, share)

        results = sum(x.numel() * x.element_size() for x in leaves)
        return Work(step, flops=6 * tokens * width * words, tokens=tokens, result_bytes=results)

    def error() -> float:
        compilation.configure("auto")
        small = (384, 128, 1000)
        leaves, labels_S = inputs(*small, place.device, place.dtype)
        exact, exact_labels_S = inputs(*small, torch.device("cpu"), torch.float64)
        losses, wanted = function(*leaves, labels_S), exact_cross_entropy(*exact, exact_labels_S)
        found = torch.autograd.grad(losses.sum(), leaves)
        return relative((losses, *found), (wanted, *torch.autograd.grad(wanted.sum(), exact)))

    return Variant("cross-entropy", name, build, error, ours=ours)
