import json
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from data.index import load_index
from data.order import permutation
from data.packing import pack_block
from data.plan import row_cu_seqlens, row_positions
from data.stream import Stream, StreamConfig

CONFIG = StreamConfig(
    seq_length=512, rows_per_step=4, seed=3, min_patches=4, max_patches=64, block_samples=150, window_shards=3
)


def equal(a, b):
    return a.digest() == b.digest() and all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)
    )


def test_permutations_are_fixed_for_ever_and_keyed_by_every_argument():
    assert permutation(8, 1, 2, 3, 4, 1).tolist() == permutation(8, 1, 2, 3, 4, 1).tolist()
    seen = {tuple(permutation(50, *np.eye(5, dtype=int)[i].tolist())) for i in range(5)}
    assert len(seen) == 5
    assert permutation(8, 0, 0, 0, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("seed", range(20))
def test_packing_fills_rows_and_never_overfills(seed):
    rng = np.random.default_rng(seed)
    length_N = rng.integers(1, rng.integers(2, 100), rng.integers(1, 200))
    carried = 0
    while carried < len(length_N) and length_N[: carried + 1].sum() <= 100 and rng.random() < 0.7:
        carried += 1
    row_N, open_row = pack_block(length_N, carried, 100)
    fill_R = np.bincount(row_N, length_N)
    assert fill_R.max() <= 100 and fill_R.min() > 0
    assert (row_N[:carried] == 0).all()
    if open_row >= 0:
        others = fill_R[1:] if carried and len(fill_R) > 1 else fill_R
        assert fill_R[open_row] == others.min() and (open_row > 0 or not carried or len(fill_R) == 1)
    else:
        assert (fill_R[1:] == 100).all()


def test_a_carried_row_is_emitted_next_however_empty_it_stays():
    row_N, open_row = pack_block(np.array([50, 90, 80]), 1, 100)
    assert row_N.tolist() == [0, 1, 2] and open_row == 2
    row_N, open_row = pack_block(np.array([50, 20]), 1, 100)
    assert row_N.tolist() == [0, 0] and open_row == 0  # alone: stays open


def test_a_block_without_samples():
    row_N, open_row = pack_block(np.zeros(0, np.int64), 0, 100)
    assert len(row_N) == 0 and open_row == -1


@pytest.mark.parametrize("block_samples", [150, 9])
def test_resuming_at_every_step_gives_the_identical_stream(indexes, block_samples):
    config = replace(CONFIG, block_samples=block_samples)
    stream = Stream(indexes, config)
    states, plans = [stream.state()], []
    for _ in range(40):
        plans.append(stream.next_step())
        states.append(stream.state())
        assert plans[-1].state_after == states[-1]
    assert plans[-1].state_after["epoch"] >= 2
    assert [plan.step for plan in plans] == list(range(40))
    for at, state in enumerate(states[:-1]):
        again = Stream(indexes, config)
        again.load_state(json.loads(json.dumps(state)))
        for plan in plans[at : at + 3]:
            assert equal(again.next_step(), plan)
    stream.load_state(states[5])  # also backwards on a used stream
    assert equal(stream.next_step(), plans[5])


def test_the_batch_size_may_change_between_runs_without_losing_a_row(indexes):
    stream = Stream(indexes, CONFIG)
    stream.next_step()
    larger = Stream(indexes, replace(CONFIG, rows_per_step=8))
    larger.load_state(stream.state())
    plan, first, second = larger.next_step(), stream.next_step(), stream.next_step()
    assert np.array_equal(plan.index_S, np.concatenate([first.index_S, second.index_S]))
    assert np.array_equal(plan.row_S, np.concatenate([first.row_S, second.row_S + 4]))


@pytest.mark.parametrize("block_samples, window_shards", [(150, 3), (20, 1), (7, 4), (1000, 32)])
def test_no_sample_is_lost_or_repeated_within_an_epoch(indexes, block_samples, window_shards):
    """At a border of epochs, what came out and what is carried over is every sample once an epoch, exactly.

    A border is not seen where the next block opens no row of its own, as small blocks often do.
    """
    stream = Stream(indexes, replace(CONFIG, rows_per_step=1, block_samples=block_samples, window_shards=window_shards))
    everything = Counter((shard, i) for shard, index in enumerate(indexes) for i in range(index.n_samples))
    seen, borders = Counter(), 0
    while stream.state()["epoch"] < 4:
        plan, state = stream.next_step(), stream.state()
        seen.update(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True))
        if state["epoch"] and (state["window"], state["sample"], state["row"]) == (0, 0, 0):
            carried = Counter(tuple(pair) for pair in state["carried"])
            assert seen + carried == Counter({sample: state["epoch"] for sample in everything})
            borders += 1
    assert borders


def test_each_epoch_has_its_own_shuffle_and_each_seed_its_own_stream(indexes):
    def first_rows(seed, skip):
        stream = Stream(indexes, replace(CONFIG, seed=seed))
        while stream.state()["epoch"] < skip:
            stream.next_step()
        plan = stream.next_step()
        return list(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True))

    assert first_rows(3, 0) == first_rows(3, 0)
    assert first_rows(3, 0) != first_rows(4, 0)
    assert first_rows(3, 0) != first_rows(3, 1)


def test_rows_are_nearly_full(indexes):
    stream = Stream(indexes, replace(CONFIG, block_samples=1024, window_shards=32))
    fill = [stream.next_step().length_S.sum() / (4 * 512) for _ in range(60)]
    assert np.mean(fill) >= 0.97


def test_the_plan_is_consistent(indexes):
    stream = Stream(indexes, CONFIG)
    assert stream.domains == ("caption", "count", "ground", "multi", "read", "text")
    for _ in range(5):
        plan = stream.next_step()
        assert (np.diff(plan.row_S) >= 0).all() and set(plan.row_S.tolist()) == {0, 1, 2, 3}
        for row in range(4):
            here = plan.row_S == row
            ends = plan.start_S[here] + plan.length_S[here]
            assert plan.start_S[here].tolist() == [0, *ends[:-1].tolist()] and ends[-1] <= 512
            cu = row_cu_seqlens(plan, row)
            assert cu.dtype == np.int32 and cu[0] == 0 and cu[-1] == 512 and (np.diff(cu) > 0).all()
            assert set(ends.tolist()) <= set(cu.tolist()) and len(cu) - 1 - here.sum() == (ends[-1] < 512)
            positions = row_positions(plan, row)
            assert positions.shape == (512,) and (positions[cu[:-1]] == 0).all()
            assert (np.diff(positions)[np.diff(positions) != 1] < 0).all() and positions.max() == np.diff(cu).max() - 1
        order = plan.row_I.astype(int) * 512 + plan.start_I
        assert (np.diff(order) >= plan.tokens_I[:-1]).all()  # sorted and disjoint
        assert np.array_equal(plan.tokens_I, plan.grid_hw_I2.prod(1) // 4) and plan.grid_hw_I2.prod(1).max() <= 64
        owner = plan.image_sample_I
        assert (plan.start_I > plan.start_S[owner]).all()
        assert (plan.start_I + plan.tokens_I < (plan.start_S + plan.length_S)[owner]).all()
        for s in range(len(plan.shard_S)):
            index = indexes[plan.shard_S[s]]
            record = index.samples[plan.index_S[s]]
            members = plan.image_member_I[owner == s]
            assert members.tolist() == list(range(record["first_image"], record["first_image"] + record["images"]))
            assert plan.length_S[s] == record["text_tokens"] + plan.tokens_I[owner == s].sum()
            assert stream.domains[plan.domain_S[s]] == index.domains[record["domain"]]


def test_the_digest_sees_every_array(indexes):
    plan = Stream(indexes, CONFIG).next_step()
    assert 0 <= plan.digest() < 1 << 63 and plan.digest() == Stream(indexes, CONFIG).next_step().digest()
    for field in fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, np.ndarray):
            value = value.copy()
            value.flat[0] += 1
        else:
            value = {**value, "row": -1} if isinstance(value, dict) else value + 1
        assert replace(plan, **{field.name: value}).digest() != plan.digest(), field.name


def test_a_state_of_another_stream_is_refused(indexes):
    state = Stream(indexes, CONFIG).state()
    for other in (Stream(indexes[:-1], CONFIG), Stream(indexes, replace(CONFIG, seq_length=256))):
        with pytest.raises(ValueError, match="belongs to another stream"):
            other.load_state(state)
    with pytest.raises(ValueError, match="has keys"):
        other.load_state({"step": 1})


def test_long_samples_are_passed_over_and_counted_by_reason(make_shard, tokenizer):
    image = make_shard.image(56, 56)
    members = [(f"short{n}.json", make_shard.json("a", "b")) for n in range(30)]
    members += [("long.json", make_shard.json("x" * 80, "y"))]
    members += [("wide.json", make_shard.json("<image>", "z")), ("wide.0.png", make_shard.image(280, 280))]
    members += [("fits.json", make_shard.json("<image>", "z")), ("fits.0.png", image)]
    shard, _ = make_shard(members)
    stream = Stream([load_index(shard, tokenizer.sha256)], replace(CONFIG, seq_length=48, max_patches=1024))
    seen = set()
    while stream.state()["epoch"] < 2:
        seen.update(stream.next_step().index_S.tolist())
    assert seen == set(range(30)) | {32}
    assert stream.refused == {"samples longer than a row": 2, "rows shorter than one image": 2}


def test_no_sample_fits(make_shard, tokenizer):
    shard, _ = make_shard([("a.json", make_shard.json("hello", "you")), ("b.json", make_shard.json("x" * 90, "y"))])
    index = load_index(shard, tokenizer.sha256)
    with pytest.raises(ValueError, match=r"train.seq_length is 8, but the smallest sample \(number 0 of .*needs 12"):
        Stream([index], replace(CONFIG, seq_length=8))
    wide = [("a.json", make_shard.json("<image>", "x")), ("a.0.png", make_shard.image(280, 280))]
    index = load_index(make_shard(wide, "wide.tar")[0], tokenizer.sha256)
    with pytest.raises(ValueError, match="rows shorter than one image: train.seq_length is 48"):
        Stream([index], replace(CONFIG, seq_length=48, max_patches=1024))
    empty = load_index(make_shard([("a.json", b"{")], "empty.tar")[0], tokenizer.sha256)
    with pytest.raises(ValueError, match="hold no usable sample"):
        Stream([empty], CONFIG)
    with pytest.raises(ValueError, match="no shards"):
        Stream([], CONFIG)


def test_one_tiny_sample_fills_rows_over_epochs(make_shard, tokenizer):
    shard, _ = make_shard([("a.json", make_shard.json("a", "b"))])
    empty, _ = make_shard([("a.json", b"{")], "empty.tar")
    both = [load_index(path, tokenizer.sha256) for path in (shard, empty)]
    plan = Stream(both, replace(CONFIG, window_shards=1, seq_length=64)).next_step()
    assert set(np.bincount(plan.row_S).tolist()) == {10}  # 10 copies of 6 tokens


@pytest.mark.parametrize(
    "change, key",
    [
        ({"seq_length": 0}, "train.seq_length is 0"),
        ({"rows_per_step": 0}, "train.global_batch_size is 0"),
        ({"seed": -1}, "train.seed is -1"),
        ({"max_patches": 2}, "data.max_patches is 2"),
        ({"min_patches": 99}, "data.min_patches is 99, above"),
        ({"block_samples": 1.5}, "data.block_samples is 1.5"),
    ],
)
def test_impossible_settings_name_their_key(change, key):
    with pytest.raises(ValueError, match=key):
        replace(CONFIG, **change)
