"""Who encodes which image: longest-processing-time greedy over integer costs (Seed1.5-VL report, section 5.1.2).

Sort by cost descending, hand each image to the rank with the smallest sum so far; the caller knows what an image
costs.  Integers and ties by index make the answer the same on every rank and machine.
"""

import heapq
from collections.abc import Sequence

import numpy as np


def assign_images(costs: Sequence[int] | np.ndarray, ranks: int) -> np.ndarray:
    """Encoding rank of each image, int64 [I], each in 0 .. ranks-1.

    costs: non-negative integer cost of each image; ranks: how many ranks share them.
    Deterministic: equal costs go in image order, equal loads to the lower rank.
    Raises ValueError for ranks < 1 or a negative cost.
    """
    costs_I = np.asarray(costs, dtype=np.int64)
    if ranks < 1:
        raise ValueError(f"cannot assign images to {ranks} ranks")
    encoding_rank_I = np.empty(costs_I.size, dtype=np.int64)
    if not costs_I.size:
        return encoding_rank_I
    if costs_I.min() < 0:
        raise ValueError(f"image {int(costs_I.argmin())} has the negative cost {int(costs_I.min())}")
    order_I = np.argsort(-costs_I, kind="stable")
    # One heap entry is load * ranks + rank: a single integer that orders by load first and by rank in a tie.
    heap = list(range(ranks))
    replace = heapq.heapreplace
    ranks_I: list[int] = []
    keep = ranks_I.append
    for cost in costs_I[order_I].tolist():
        least = heap[0]
        keep(least % ranks)
        replace(heap, least + cost * ranks)
    encoding_rank_I[order_I] = ranks_I
    return encoding_rank_I


def cut_in_order(items_J: np.ndarray, sizes: np.ndarray, most: int) -> list[np.ndarray]:
    """Items in order, in chunks whose sizes sum to at most `most`; one that is larger is a chunk of its own.

    sizes: of all items, those of items_J among them.  No items make no chunk.
    """
    borders, used = [], 0
    for place, size in enumerate(sizes[items_J].tolist()):
        if used and used + size > most:
            borders.append(place)
            used = 0
        used += size
    return np.split(items_J, borders) if items_J.size else []


def load_max_over_mean(costs: np.ndarray, encoding_rank_I: np.ndarray, ranks: int) -> float:
    """Largest over mean encoder load of the ranks; 1.0 is perfect balance (and the answer for no images)."""
    load_R = np.bincount(encoding_rank_I, weights=np.asarray(costs, dtype=np.float64), minlength=ranks)
    return float(load_R.max() / load_R.mean()) if load_R.sum() else 1.0
