from collections import Counter

import numpy as np
import pytest

from tandem.data.planning.order import SourceOrder, permutation
from tests.data.synthetic import MemoryCatalog, MemoryShard, Sample, random_shards


def order_of(shards, entity_cap=None, copies=1, seed=3, window_shards=3, number=0):
    catalog = MemoryCatalog(shards)
    return SourceOrder(catalog, entity_cap, copies, seed, window_shards, number, catalog.index), catalog


def epoch_of(order, epoch):
    n = order.samples_per_epoch
    return list(zip(*(column.tolist() for column in order.take(epoch * n, n)), strict=True))


def entity_shards(seed=0):
    """Seven shards, entities of 1 to 40 samples spread over them, three domains of which `rare` is small."""
    rng = np.random.default_rng(seed)
    samples = [Sample(9, domain="common", entity=f"e{e}") for e in range(12) for _ in range(rng.integers(1, 40))]
    samples += [Sample(9, domain="other") for _ in range(150)]
    samples += [Sample(9, domain="rare", entity=f"e{e}") for e in (3, 3, 3, 3, 3, 3, 5)]
    rng.shuffle(samples)
    cuts = sorted(rng.integers(0, len(samples), 6).tolist())
    return [MemoryShard.of(samples[a:b]) for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)], samples


def test_permutations_are_fixed_for_ever_and_keyed_by_every_argument():
    assert permutation(8, 1, 2, 3, 4, 1).tolist() == permutation(8, 1, 2, 3, 4, 1).tolist()
    seen = {tuple(permutation(50, *np.eye(5, dtype=int)[i].tolist())) for i in range(5)}
    assert len(seen) == 5
    assert permutation(8, 0, 0, 0, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("window_shards", [1, 3, 32])
def test_every_sample_is_visited_once_an_epoch(window_shards):
    order, catalog = order_of(random_shards(8, 30, seed=1), window_shards=window_shards)
    everything = {(k, i) for k in range(8) for i in range(30)}
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    for visited in epochs:
        assert len(visited) == 240 and set(visited) == everything
    assert len({tuple(visited) for visited in epochs}) == 3
    assert not catalog.opened  # counts alone
    for first in range(0, 240, 30 * window_shards):  # a window at a time
        assert len({shard for shard, _ in epochs[0][first : first + 30 * window_shards]}) <= window_shards


@pytest.mark.parametrize("cap, copies", [(None, 1), (5, 1), (5, 3)])
def test_any_position_is_reached_without_what_comes_before(cap, copies):
    shards, _ = entity_shards()
    order, _ = order_of(shards, cap, copies)
    n = order.samples_per_epoch
    shard_N, index_N = order.take(0, 4 * n)
    for first in np.random.default_rng(0).integers(0, 4 * n - 50, 25).tolist():
        fresh, _ = order_of(shards, cap, copies)
        shard_n, index_n = fresh.take(first, 50)
        assert np.array_equal(shard_n, shard_N[first : first + 50])
        assert np.array_equal(index_n, index_N[first : first + 50])
    assert order.take(7, 0)[0].shape == (0,)


def test_seed_and_place_in_the_list_give_other_orders():
    shards = random_shards(4, 50, seed=1)
    orders = [epoch_of(order_of(shards, **change)[0], 0) for change in ({}, {"seed": 4}, {"number": 1})]
    assert orders[0] != orders[1] != orders[2] != orders[0]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cap, copies", [(1, 1), (5, 1), (17, 1), (5, 3), (100, 2), (None, 4)])
def test_caps_are_exact_and_rotate_and_rare_domains_are_copied(seed, cap, copies):
    shards, samples = entity_shards(seed)
    order, _ = order_of(shards, cap, copies)

    def facts(visited):
        return [shards[k].groups[shards[k].samples["group"][i]] for k, i in visited]

    total = Counter((s.domain, s.entity) for s in samples)
    rare = "rare" if copies > 1 else None
    size_of = Counter(s.entity for s in samples if s.domain != rare)
    seen, epochs = Counter(), max(-(-n // (cap or n)) for n in size_of.values())
    for epoch in range(epochs):
        visited = epoch_of(order, epoch)
        times = Counter(visited)
        seen.update(times.keys())
        by_group = Counter(facts(visited))
        for (domain, entity), n in total.items():
            if domain == rare:
                assert by_group[domain, entity] == n * copies
            elif entity is None:
                assert by_group[domain, entity] == n
        for entity, n in size_of.items():
            if entity is not None:
                used = sum(count for (domain, e), count in by_group.items() if e == entity and domain != rare)
                assert used == (n if cap is None else min(n, cap))
        for (k, i), count in times.items():
            domain, _ = shards[k].groups[shards[k].samples["group"][i]]
            assert count == (copies if domain == rare else 1)
    assert len(seen) == len(samples)  # the turns have gone through all


def test_the_same_capped_samples_come_back_only_after_all_others():
    shards = [MemoryShard.of([Sample(9, entity="e")] * 10), MemoryShard.of([Sample(9, entity="e")] * 10)]
    order, _ = order_of(shards, entity_cap=5)
    epochs = [set(epoch_of(order, epoch)) for epoch in range(8)]
    assert order.samples_per_epoch == 5 and all(len(epoch) == 5 for epoch in epochs)
    assert len(set.union(*epochs[:4])) == 20 and epochs[:4] == epochs[4:]


def test_a_domain_under_half_the_mean_is_rare():
    counts = {"large": 60, "half": 20, "rare": 19, "other": 61}  # mean 40
    order, _ = order_of([MemoryShard.of([Sample(9, domain=d) for d, n in counts.items() for _ in range(n)])], copies=4)
    assert order.samples_per_epoch == 60 + 20 + 4 * 19 + 61


def test_only_the_windows_indexes_are_opened():
    shards = [MemoryShard.of([Sample(9, entity="e")] * 10) for _ in range(50)]
    order, catalog = order_of(shards, entity_cap=100, window_shards=4)
    order.take(10**9, 3)
    assert 1 <= len(catalog.opened) <= 4


def test_shards_without_samples_are_passed_over():
    empty = MemoryShard.of([])
    order, _ = order_of([empty, MemoryShard.of([Sample(9)] * 3), empty, empty], window_shards=1)
    assert Counter(epoch_of(order, 2)) == Counter({(1, 0): 1, (1, 1): 1, (1, 2): 1})
