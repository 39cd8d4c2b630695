"""The order in which samples are visited: a pure function of (seed, epoch, window), nothing remembered.

An epoch permutes the shards and cuts them into windows of a few shards; inside a window all samples are shuffled
together. So an order needs the sample counts of one window's shards only, and reads stay near each other.

Shapes: N samples of a window.
"""

from collections.abc import Sequence

import numpy as np

SHARDS, SAMPLES, ROWS = 0, 1, 2  # what is being permuted; keeps the random streams apart


def permutation(n: int, seed: int, epoch: int, window: int, place: int, kind: int) -> np.ndarray:
    """A permutation of range(n), int64, drawn from the counter-based generator keyed by the other arguments.

    Sorting raw Philox words is stable over numpy versions, which numpy's own shuffles do not promise.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, place, window, kind])
    return np.argsort(generator.random_raw(n), kind="stable")


def windows_per_epoch(n_shards: int, window_shards: int) -> int:
    return -(-n_shards // window_shards)


def shards_of_window(n_shards: int, window_shards: int, seed: int, epoch: int, window: int) -> np.ndarray:
    """Shard numbers of one window, int64."""
    order = permutation(n_shards, seed, epoch, 0, 0, SHARDS)
    return order[window * window_shards : (window + 1) * window_shards]


def samples_of_window(
    shards: Sequence[int], counts: Sequence[int], seed: int, epoch: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """(shard_N, index_N) int64: every sample of these shards once. `counts` are the shards' sample counts."""
    shard_N = np.repeat(np.asarray(shards, np.int64), counts)
    index_N = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    order_N = permutation(len(shard_N), seed, epoch, window, 0, SAMPLES)
    return shard_N[order_N], index_N[order_N]
