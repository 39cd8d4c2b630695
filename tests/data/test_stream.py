import json
import time
from collections import Counter
from dataclasses import fields, replace

import numpy as np
import pytest

from tandem.data.media.text import parse_sample
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.plan import (
    row_cu_seqlens,
    row_domains,
    row_labels,
    row_positions,
    row_positions_thw,
    row_samples,
)
from tandem.data.planning.stream import Stream
from tandem.data.reading.sample_layout import lay_out
from tandem.data.shards.index import VIDEO
from tandem.data.shards.storage import open_range
from tandem.data.vision import VisionSpec
from tests.data.synthetic import (
    Medium,
    MemoryShard,
    Sample,
    corpus_of,
    positions_one_by_one,
    random_shards,
    stamp_lengths,
    stream_config,
)

CONFIG = stream_config(
    seq_length=512,
    rows_per_step=4,
    seed=3,
    vision=VisionSpec(4, 64),
    video_budget=60,
    video_levels=(9, 4),
    block_samples=150,
    window_shards=3,
)


def mixed_shards(n_shards=6, samples=60, seed=0):
    """Texts, images, videos with events, six domains, a few samples longer than a row of 512."""
    rng, shards = np.random.default_rng(seed), []
    for _ in range(n_shards):
        made = []
        for n in range(samples):
            text, domain = int(rng.integers(5, 90)), f"d{n % 6}"
            if n % 6 == 0:
                media = ()
            elif n % 6 == 5:
                video = Medium(2, 120, 200, int(rng.integers(500, 9000)), events=((1200, 7), (3000, 5)))
                media = (video, Medium(4, 100, 100))
            else:
                media = tuple(Medium(2 + 2 * m, *rng.integers(20, 400, 2).tolist()) for m in range(n % 6 - 1))
            made.append(Sample(text + 700 * (n == 30) + 2 * len(media), media, domain))
        shards.append(MemoryShard.of(made))
    return shards


@pytest.fixture(scope="module")
def mixed():
    """Two sources of mixed media, in memory."""
    return corpus_of(mixed_shards(), mixed_shards(4, 30, seed=1), settings=[{}, {"fps": 2, "repeat": 1.5}])


def stream_of(corpus, **changes):
    return Stream(corpus, replace(CONFIG, **changes), stamp_lengths)


def equal(a, b):
    return a.digest() == b.digest() and all(
        np.array_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)
    )


# ---------------------------------------------------------------------------------------------------------------------
# The state


@pytest.mark.parametrize("block_samples", [150, 9])
@pytest.mark.parametrize("too_long", ["refuse", "cut"])
def test_resuming_at_every_step_gives_the_identical_stream(mixed, block_samples, too_long):
    config = {"block_samples": block_samples, "too_long": too_long}
    stream = stream_of(mixed, **config)
    states, plans = [stream.state()], []
    for _ in range(40):
        plans.append(stream.next_step())
        states.append(stream.state())
        assert plans[-1].state_after == states[-1]
    assert plans[-1].state_after["slot"] > 540  # more than an epoch of each
    assert [plan.step for plan in plans] == list(range(40))
    for at, state in enumerate(states[:-1]):
        again = stream_of(mixed, **config)
        again.load_state(json.loads(json.dumps(state)))
        for plan in plans[at : at + 3]:
            assert equal(again.next_step(), plan)
    stream.load_state(states[5])  # also backwards on a used stream
    assert equal(stream.next_step(), plans[5])


def test_the_batch_size_may_change_between_runs_without_losing_a_row(mixed):
    stream = stream_of(mixed)
    stream.next_step()
    larger = stream_of(mixed, rows_per_step=8)
    larger.load_state(stream.state())
    plan, first, second = larger.next_step(), stream.next_step(), stream.next_step()
    assert np.array_equal(plan.index_S, np.concatenate([first.index_S, second.index_S]))
    assert np.array_equal(plan.row_S, np.concatenate([first.row_S, second.row_S + 4]))


def test_a_state_of_another_stream_is_refused(mixed):
    state = stream_of(mixed).state()
    weighted = corpus_of(mixed_shards(), mixed_shards(4, 30, seed=1), settings=[{"weight": 1}, {"weight": 1, "fps": 2}])
    others = [stream_of(corpus_of(mixed_shards(5))), stream_of(weighted)]
    others += [stream_of(mixed, **change) for change in ({"seq_length": 256}, {"too_long": "cut"}, {"video_budget": 9})]
    for other in others:
        with pytest.raises(
            ValueError, match=r"belongs to another stream: data.sources \(shards, weight.*data.too_long"
        ):
            other.load_state(state)
    with pytest.raises(ValueError, match="has keys"):
        other.load_state({"step": 1})


def test_names_roles_and_the_batch_size_do_not_decide_the_order(mixed):
    sources = mixed_shards(), mixed_shards(4, 30, seed=1)
    other = corpus_of(*sources, settings=[{"train_roles": ("user",)}, {"fps": 2, "repeat": 1.5}])
    stream_of(other, rows_per_step=2).load_state(stream_of(mixed).state())


# ---------------------------------------------------------------------------------------------------------------------
# Which samples


@pytest.mark.parametrize("block_samples, window_shards", [(150, 3), (20, 1), (7, 4), (1000, 32)])
def test_no_sample_is_lost_or_repeated_within_an_epoch(block_samples, window_shards):
    """After any block, what came out, what is carried over and what was refused are the slots so far."""
    shards = mixed_shards(samples=30)
    corpus = corpus_of(shards)
    stream = stream_of(
        corpus, rows_per_step=1, block_samples=block_samples, window_shards=window_shards, seq_length=800
    )
    seen, epochs = Counter(), 0
    while stream.state()["slot"] < 4 * 180:
        plan, state = stream.next_step(), stream.state()
        seen.update(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True))
        if state["row"] == 0:
            visited = seen + Counter(tuple(pair) for pair in state["carried"])
            times, slots = divmod(state["slot"], 180)
            assert set(visited.values()) <= {times, times + 1} and visited.total() == state["slot"]
            assert sum(count > times for count in visited.values()) == slots
            epochs += 1
    assert epochs


def test_each_epoch_has_its_own_shuffle_and_each_seed_its_own_stream(mixed):
    def first_rows(seed, skip):
        stream = stream_of(mixed, seed=seed)
        while stream.state()["slot"] < skip:
            stream.next_step()
        plan = stream.next_step()
        return list(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True))

    assert first_rows(3, 0) == first_rows(3, 0)
    assert first_rows(3, 0) != first_rows(4, 0)
    assert first_rows(3, 0) != first_rows(3, 540)


def source_counts(corpus, stream, steps):
    seen = np.zeros(len(corpus.sources), np.int64)
    for _ in range(steps):
        seen += np.bincount(corpus.source_of(stream.next_step().shard_S), minlength=len(corpus.sources))
    return seen


def test_weights_are_realised_exactly():
    sources = [[MemoryShard.of([Sample(8)] * n) for _ in range(3)] for n in (50, 5, 200)]
    weights = [{"weight": 0.6}, {"weight": 0.3}, {"weight": 0.1}]
    corpus = corpus_of(*sources, settings=weights)
    stream = stream_of(corpus, seq_length=80, rows_per_step=10)  # 10 samples a row, blocks of 15 rows
    assert source_counts(corpus, stream, 30).tolist() == [1800, 900, 300]


def test_without_weights_sizes_repeats_and_caps_decide():
    sources = [[MemoryShard.of([Sample(8)] * n)] for n in (40, 30, 80)]
    corpus = corpus_of(*sources, settings=[{}, {"repeat": 2}, {"max_samples": 20}])
    stream = stream_of(corpus, seq_length=80, rows_per_step=1, block_samples=120)  # 40 + 2 * 30 + 20 slots
    assert source_counts(corpus, stream, 12).tolist() == [40, 60, 20]
    capped = [MemoryShard.of([Sample(8, entity="x")] * 30 + [Sample(8)] * 30)]
    corpus = corpus_of(capped, sources[0], settings=[{"entity_cap": 10}, {}])
    stream = stream_of(corpus, seq_length=80, rows_per_step=1, block_samples=80)
    assert source_counts(corpus, stream, 8).tolist() == [40, 40]


def test_long_samples_are_passed_over_and_counted_by_reason():
    samples = [Sample(10)] * 30 + [Sample(80), Sample(10, (Medium(2, 280, 280),)), Sample(10, (Medium(2, 56, 56),))]
    corpus = corpus_of([MemoryShard.of(samples)])
    stream = stream_of(corpus, seq_length=48, vision=VisionSpec(4, 1024), block_samples=33)
    seen = set()
    while stream.state()["slot"] < 66:
        seen.update(stream.next_step().index_S.tolist())
    assert seen == set(range(30)) | {32} and stream.samples_per_epoch == 31
    assert stream.refused == {"samples longer than a row": 2, "rows shorter than one image": 2}
    stream = stream_of(corpus, seq_length=48, vision=VisionSpec(4, 1024), block_samples=33, too_long="cut")
    plans = [stream.next_step() for _ in range(5)]
    cut = {(int(i), int(n)) for plan in plans for i, n in zip(plan.index_S, plan.length_S, strict=True) if n == 48}
    assert (30, 48) in cut and all(plan.cut_S.tolist() == (plan.index_S == 30).tolist() for plan in plans)
    assert set(stream.refused) == {"rows shorter than one image"}


def test_no_sample_fits():
    with pytest.raises(
        ValueError, match=r"seq_length is 8, but the smallest sample of data.sources.a \(number 0 of .*12"
    ):
        stream_of(corpus_of([MemoryShard.of([Sample(12), Sample(90)])]), seq_length=8)
    wide = [MemoryShard.of([Sample(8, (Medium(2, 280, 280),))])]
    with pytest.raises(ValueError, match="rows shorter than one image: train.seq_length is 48"):
        stream_of(corpus_of([MemoryShard.of([Sample(4)])], wide), seq_length=48, vision=VisionSpec(4, 1024))


def test_one_tiny_sample_fills_rows_over_epochs():
    shards = [MemoryShard.of([Sample(6)]), MemoryShard.of([])]
    plan = stream_of(corpus_of(shards), window_shards=1, seq_length=64, block_samples=512).next_step()
    assert set(np.bincount(plan.row_S).tolist()) == {10}  # 10 copies of 6 tokens


# ---------------------------------------------------------------------------------------------------------------------
# The plan


@pytest.mark.parametrize("too_long", ["refuse", "cut"])
def test_the_plan_is_consistent(mixed, too_long):
    stream = stream_of(mixed, too_long=too_long)
    assert stream.domains == ("d0", "d1", "d2", "d3", "d4", "d5")
    frames = cuts = 0
    for _ in range(12):
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
            assert row_positions_thw(plan, row, VisionSpec()).tolist() == positions_one_by_one(plan, row, cu)
        order = plan.row_I.astype(int) * 512 + plan.start_I
        assert (np.diff(order) >= plan.tokens_I[:-1]).all()  # sorted and disjoint
        assert np.array_equal(plan.tokens_I, plan.grid_hw_I2.prod(1) // 4) and plan.grid_hw_I2.prod(1).max() <= 64
        owner = plan.image_sample_I
        assert (np.diff(owner) >= 0).all() and np.array_equal(plan.row_I, plan.row_S[owner])
        assert (plan.start_I > plan.start_S[owner]).all()
        assert (plan.start_I + plan.tokens_I < (plan.start_S + plan.length_S)[owner]).all()
        for s in range(len(plan.shard_S)):
            index = mixed.index(int(plan.shard_S[s]))
            record, mine = index.samples[plan.index_S[s]], owner == s
            group = index.groups[record["group"]]
            assert stream.domains[plan.domain_S[s]] == group[0]
            numbers = list(range(record["first_media"], record["first_media"] + record["media"]))
            if not plan.cut_S[s]:
                assert sorted(set(plan.image_media_I[mine].tolist())) == numbers
            stills = plan.time_I[mine] < 0
            assert np.array_equal(stills, index.media["duration_ms"][plan.image_media_I[mine]] == 0)
            if stills.all() and not plan.cut_S[s]:
                assert plan.length_S[s] == record["text_tokens"] + plan.tokens_I[mine].sum()
        frames, cuts = frames + int((plan.time_I >= 0).sum()), cuts + int(plan.cut_S.sum())
    assert frames > 100 and (cuts > 0) == (too_long == "cut")


def test_places_of_a_video_with_events_in_a_row():
    """<user> (stamp 5 [SOI] v [EOI]) EE (stamp [SOI] v [EOI]) EEE, 7 tokens of text, [SOI] vvvv [EOI] <eos>."""
    media = (Medium(1, 28, 28, 2000, events=((500, 2), (1700, 3))), Medium(9, 56, 56))
    corpus = corpus_of([MemoryShard.of([Sample(11, media)])])
    plan = stream_of(corpus, seq_length=100, block_samples=3, rows_per_step=1).next_step()
    assert plan.length_S.tolist() == [11 + 2 * 8 + 5 + 4] * 2
    assert plan.start_I.tolist() == [7, 17, 9 + 16 + 5, 36 + 7, 36 + 17, 36 + 30]
    assert plan.time_I.tolist() == [0, 1000, -1] * 2 and plan.image_media_I.tolist() == [0, 0, 1] * 2
    assert plan.tokens_I.tolist() == [1, 1, 4] * 2 and plan.image_sample_I.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("too_long, fps", [("refuse", 1.0), ("cut", 2.0)])
def test_plans_of_files_are_the_layout_of_their_samples(corpus, tokenizer, too_long, fps):
    """Lengths and places foreseen from indexes on disk are those that the tokens themselves give."""
    sources = [SourceSettings("toy", (f"{corpus}/train/*.tar",), fps=fps)]
    opened = Corpus.open(sources, tokenizer.sha256)
    config = replace(CONFIG, too_long=too_long, seq_length=160, block_samples=64)
    stream, kinds, cuts = Stream(opened, config, tokenizer.stamp_lengths), Counter(), 0
    for plan in (stream.next_step() for _ in range(25)):
        for s in range(len(plan.shard_S)):
            index, mine = opened.index(int(plan.shard_S[s])), plan.image_sample_I == s
            record = index.samples[plan.index_S[s]]
            name = f"sample at byte {record['text_offset']} of {index.shard}"
            with open_range(opened.shard_name(int(plan.shard_S[s]))) as file:
                content = parse_sample(file.read(int(record["text_offset"]), int(record["text_size"])), name)
            media = index.media[record["first_media"] : record["first_media"] + record["media"]]
            names = ["video" if kind == VIDEO else "image" for kind in media["kind"]]
            encoded = tokenizer.encode_sample(content["turns"], ("assistant",), names, name)
            media_I = plan.image_media_I[mine] - int(record["first_media"])
            tokens, _, start_I = lay_out(
                encoded, tokenizer, media_I, plan.time_I[mine], plan.tokens_I[mine], int(plan.length_S[s]), name
            )
            assert len(tokens) == plan.length_S[s] <= 160
            assert np.array_equal(plan.start_S[s] + start_I, plan.start_I[mine])
            assert (tokens == tokenizer.image_id).sum() == plan.tokens_I[mine].sum()
            assert stream.domains[plan.domain_S[s]] == content["domain"]
            kinds.update(names)
            cuts += int(plan.cut_S[s])
    assert kinds["image"] > 20 and kinds["video"] > 5 and (cuts > 0) == (too_long == "cut")


def test_labels_and_domains_follow_the_samples(mixed):
    plan, rows, rng = stream_of(mixed, block_samples=9).next_step(), [2, 0], np.random.default_rng(0)
    tokens, trained = rng.integers(1, 99, (2, 512)), rng.random((2, 512)) < 0.5
    samples = row_samples(plan, rows)
    labels, loss_mask = row_labels(samples, tokens, trained, pad_id=0)
    domains = row_domains(plan, samples)
    assert (samples[:, -2:] == -1).all()  # padding in both rows
    assert (labels.dtype, loss_mask.dtype, domains.dtype) == (np.int64, bool, np.int16)
    for r, row in enumerate(rows):
        expected, mask = np.zeros(512, np.int64), np.zeros(512, bool)
        sample, domain = np.full(512, -1), np.full(512, -1)
        for s in np.flatnonzero(plan.row_S == row):
            first, last = plan.start_S[s], plan.start_S[s] + plan.length_S[s]
            expected[first : last - 1], mask[first : last - 1] = (
                tokens[r, first + 1 : last],
                trained[r, first + 1 : last],
            )
            sample[first:last], domain[first:last] = s, plan.domain_S[s]
        assert np.array_equal(labels[r], expected) and np.array_equal(loss_mask[r], mask)
        assert np.array_equal(samples[r], sample) and np.array_equal(domains[r], domain)


def test_the_digest_sees_every_array(mixed):
    plan = stream_of(mixed).next_step()
    assert 0 <= plan.digest() < 1 << 63 and plan.digest() == stream_of(mixed).next_step().digest()
    for field in fields(plan):
        value = getattr(plan, field.name)
        if isinstance(value, np.ndarray):
            value = value.copy()
            value.flat[0] = not value.flat[0] if value.dtype == bool else value.flat[0] + 1
        else:
            value = {**value, "row": -1} if isinstance(value, dict) else value + 1
        assert replace(plan, **{field.name: value}).digest() != plan.digest(), field.name


# ---------------------------------------------------------------------------------------------------------------------
# At scale


@pytest.mark.parametrize("seq_length", [32_768, 131_072])
def test_a_batch_of_71_million_tokens_is_planned_in_time_and_full(seq_length):
    """About 100,000 samples of two sources, from any position; the limit on time allows for a busy machine."""
    sources = [random_shards(40, 10_000, seed=s, images=1.5, median=150, sigma=1.0) for s in range(2)]
    corpus = corpus_of(*sources, settings=[{"weight": 0.7}, {"weight": 0.3}])
    rows = 71_000_000 // seq_length
    full = {"seq_length": seq_length, "rows_per_step": rows, "vision": VisionSpec(4, 16384), "block_samples": 4096}
    stream = stream_of(corpus, **full, window_shards=16)
    state = {**stream.state(), "slot": 10**9 // 4096 * 4096}
    began = time.process_time()
    stream.load_state(state)
    plan = stream.next_step()
    assert time.process_time() - began < 2
    assert len(plan.shard_S) > 90_000 and plan.length_S.sum() / (rows * seq_length) >= 0.98
    share = np.bincount(corpus.source_of(plan.shard_S)) / len(plan.shard_S)
    assert abs(share[0] - 0.7) < 0.003


@pytest.mark.parametrize(
    "change, key",
    [
        ({"seq_length": 0}, "train.seq_length=0: must be"),
        ({"rows_per_step": 0}, "train.global_batch_size=0: must be"),
        ({"seed": -1}, "train.seed=-1: must be"),
        ({"block_samples": 1.5}, "data.block_samples=1.5: must be"),
        ({"video_budget": 0}, "data.video.budget=0: must be"),
        ({"video_budget": 3}, "data.video.budget=3: is below"),
        ({"video_levels": (4, 9)}, r"data.video.levels=\[4, 9\]: must be .*falling"),
        ({"too_long": "drop"}, "data.too_long=drop: must be one of"),
    ],
)
def test_impossible_settings_name_their_key(change, key):
    with pytest.raises(ValueError, match=key):
        replace(CONFIG, **change)
