"""The order in which the samples of a source are visited: a pure function of (seed, epoch, position).

An epoch permutes the shards and cuts them into windows of a few shards; inside a window all samples are shuffled
together. So any position is found from the shards' sample counts and one window, and reads stay near each other.

Two settings change what an epoch holds. `entity_cap` N: an entity of n > N samples gives N of them, those with
(ordinal - epoch * N) mod n < N, so that consecutive epochs take turns through all n. `rare_domain_copies`: a domain
with fewer than half the samples of the source's average domain has every sample that many times, and is not capped.

Shapes: K shards of the source, X pairs of (shard, group of samples with one domain and one entity), E entities,
N samples.
"""

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from tandem.data.shards.catalog import Catalog
from tandem.data.shards.index import ShardIndex

SHARDS, SAMPLES, ROWS = 0, 1, 2  # what is being permuted; keeps the random streams apart
CACHED_WINDOWS = 2
_SHARDS_AT_ONCE = 4096  # bounds the memory of counting over all groups


def permutation(n: int, seed: int, epoch: int, window: int, place: int, kind: int) -> np.ndarray:
    """A permutation of range(n), int64, drawn from the counter-based generator keyed by the other arguments.

    Sorting raw Philox words is stable over numpy versions, which numpy's own shuffles do not promise.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, place, window, kind])
    return np.argsort(generator.random_raw(n), kind="stable")


class SourceOrder:
    """The endless order of one source, `number` in the list of sources; open_index(k) gives the index of its shard k.

    Memory is that of two windows. Indexes are opened only where a cap or copies ask which samples they concern.
    """

    def __init__(
        self,
        catalog: Catalog,
        entity_cap: int | None,
        rare_domain_copies: int,
        seed: int,
        window_shards: int,
        number: int,
        open_index: Callable[[int], ShardIndex],
    ):
        self._catalog, self._open_index = catalog, open_index
        self._seed, self._window_shards, self._number = seed, window_shards, number
        self._groups = _Groups(catalog, entity_cap, rare_domain_copies)
        self.samples_per_epoch = int(self._groups.samples_of_shards(0).sum())
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._windows: OrderedDict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def take(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard_N, index_N) int64 of the samples at positions first .. first + count: shards of the source from 0."""
        parts, end = [(np.zeros(0, np.int64),) * 2], first + count
        while first < end:
            epoch, within = divmod(first, self.samples_per_epoch)
            _, _, border_W1 = self._shards_of_epoch(epoch)
            window = int(np.searchsorted(border_W1, within, side="right")) - 1
            begin = within - int(border_W1[window])
            shard_N, index_N = self._window(epoch, window)
            part = slice(begin, min(len(shard_N), begin + end - first))
            parts.append((shard_N[part], index_N[part]))
            first += part.stop - part.start
        shard_N, index_N = (np.concatenate(column) for column in zip(*parts, strict=True))
        return shard_N, index_N

    def _shards_of_epoch(self, epoch: int) -> tuple[int, np.ndarray, np.ndarray]:
        """(epoch, its order of shards, samples before each of its windows)."""
        if self._epoch is None or self._epoch[0] != epoch:
            order_K = self._permutation(self._catalog.n_shards, epoch, 0, SHARDS)
            samples_K = self._groups.samples_of_shards(epoch)[order_K]
            starts = np.arange(0, len(order_K), self._window_shards)
            border_W1 = np.concatenate([[0], np.cumsum(np.add.reduceat(samples_K, starts))])
            self._epoch = (epoch, order_K, border_W1)
        return self._epoch

    def _window(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard_N, index_N) of a whole window, shuffled."""
        if (epoch, window) not in self._windows:
            _, order_K, _ = self._shards_of_epoch(epoch)
            shards = order_K[window * self._window_shards : (window + 1) * self._window_shards].tolist()
            indexes = [self._groups.samples_of_shard(shard, epoch, self._open_index) for shard in shards]
            shard_N, index_N = np.repeat(shards, [len(index) for index in indexes]), np.concatenate(indexes)
            order_N = self._permutation(len(shard_N), epoch, window, SAMPLES)
            self._windows[epoch, window] = shard_N[order_N], index_N[order_N]
            while len(self._windows) > CACHED_WINDOWS:
                self._windows.popitem(last=False)
        return self._windows[epoch, window]

    def _permutation(self, n: int, epoch: int, window: int, kind: int) -> np.ndarray:
        return permutation(n, self._seed, epoch, window, self._number, kind)


class _Groups:
    """What the cap and the copies make of each group of samples. Every epoch has equally many samples."""

    def __init__(self, catalog: Catalog, entity_cap: int | None, rare_domain_copies: int):
        self._catalog, self._cap, self._copies = catalog, entity_cap or 0, rare_domain_copies  # cap: 0 for none
        self._plain = entity_cap is None and rare_domain_copies == 1
        self._rare_D = np.zeros(len(catalog.domains), bool)
        self._base_X, self._total_E = catalog.group_base_X, catalog.entity_samples_E
        if rare_domain_copies > 1:
            domain_X, samples_X = np.asarray(catalog.group_domain_X), np.asarray(catalog.group_samples_X)
            samples_D = np.bincount(domain_X, samples_X, len(catalog.domains))
            self._rare_D = 2 * samples_D < samples_D.mean()
            rare_X = self._rare_D[domain_X]
            if entity_cap is not None and (np.asarray(catalog.group_entity_X)[rare_X] >= 0).any():
                self._count_without_rare(rare_X)

    def _count_without_rare(self, rare_X: np.ndarray) -> None:
        """Ordinals over the samples that the cap concerns: those of rare domains do not use up their entity's share."""
        entity_X, samples_X = np.asarray(self._catalog.group_entity_X), np.asarray(self._catalog.group_samples_X)
        order_X = np.flatnonzero((entity_X >= 0) & ~rare_X)
        order_X = order_X[np.argsort(entity_X[order_X], kind="stable")]
        before_X = np.cumsum(samples_X[order_X]) - samples_X[order_X]
        first_X = np.searchsorted(entity_X[order_X], entity_X[order_X])
        self._base_X = np.zeros(len(entity_X), np.int64)
        self._base_X[order_X] = before_X - before_X[first_X]
        self._total_E = np.zeros(self._catalog.n_entities, np.int64)
        np.add.at(self._total_E, entity_X[order_X], samples_X[order_X])

    def samples_of_shards(self, epoch: int) -> np.ndarray:
        """Samples that each shard gives in this epoch, copies counted, int64 [K]."""
        if self._plain:
            return np.asarray(self._catalog.samples_K)
        start_K1, parts = np.asarray(self._catalog.group_start_K1), []
        for first in range(0, self._catalog.n_shards, _SHARDS_AT_ONCE):
            border_K1 = start_K1[first : first + _SHARDS_AT_ONCE + 1]
            count_X = self._samples_of_groups(slice(int(border_K1[0]), int(border_K1[-1])), epoch)
            before_X1 = np.concatenate([[0], np.cumsum(count_X)])
            parts.append(np.diff(before_X1[border_K1 - border_K1[0]]))
        return np.concatenate(parts)

    def _samples_of_groups(self, rows: slice, epoch: int) -> np.ndarray:
        samples_X = np.asarray(self._catalog.group_samples_X[rows]).astype(np.int64)
        capped_X, base_X, total_X = self._capped(rows)
        count_X = np.where(self._rare_D[self._catalog.group_domain_X[rows]], samples_X * self._copies, samples_X)
        if capped_X.any():
            # The ordinals used are [begin, begin + cap) on a circle of `total`; a group is [base, base + samples).
            cap, begin_X, end_X = self._cap, epoch * self._cap % total_X, base_X + samples_X
            here_X = np.minimum(begin_X + cap, end_X) - np.maximum(begin_X, base_X)
            around_X = np.minimum(begin_X + cap, end_X + total_X) - np.maximum(begin_X, base_X + total_X)
            used_X = np.maximum(here_X, 0) + np.maximum(around_X, 0)
            count_X = np.where(capped_X, used_X, count_X)
        return count_X

    def _capped(self, rows: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(whether the cap leaves samples out, ordinal of the first sample, samples of the entity) of these groups."""
        entity_X, base_X = np.asarray(self._catalog.group_entity_X[rows]), np.asarray(self._base_X[rows])
        if not self._cap or not len(self._total_E):
            return np.zeros(len(entity_X), bool), base_X, np.ones(len(entity_X), np.int64)
        total_X = np.asarray(self._total_E)[np.maximum(entity_X, 0)]
        capped_X = (entity_X >= 0) & (total_X > self._cap) & ~self._rare_D[self._catalog.group_domain_X[rows]]
        return capped_X, base_X, np.maximum(total_X, 1)

    def samples_of_shard(self, shard: int, epoch: int, open_index: Callable[[int], ShardIndex]) -> np.ndarray:
        """Samples of one shard in this epoch, ascending, copies next to each other, int64."""
        index_N = np.arange(int(self._catalog.samples_K[shard]))
        if self._plain:
            return index_N
        rows = slice(int(self._catalog.group_start_K1[shard]), int(self._catalog.group_start_K1[shard + 1]))
        capped_X, base_X, total_X = self._capped(rows)
        rare_X = self._rare_D[self._catalog.group_domain_X[rows]]
        if not capped_X.any() and not rare_X.any():
            return index_N
        group_N = np.asarray(open_index(shard).samples["group"])
        ordinal_N = base_X[group_N] + _rank_in_group(group_N)
        copies_N = np.where(rare_X[group_N], self._copies, 1)
        if capped_X.any():
            used_N = (ordinal_N - epoch * self._cap) % total_X[group_N] < self._cap
            copies_N[capped_X[group_N] & ~used_N] = 0
        return np.repeat(index_N, copies_N)


def _rank_in_group(group_N: np.ndarray) -> np.ndarray:
    """How many earlier samples of the shard are in the same group."""
    order_N = np.argsort(group_N, kind="stable")
    sorted_N = group_N[order_N]
    rank_N = np.empty(len(group_N), np.int64)
    rank_N[order_N] = np.arange(len(group_N)) - np.searchsorted(sorted_N, sorted_N)
    return rank_N
