"""Streams whose rows are single samples: the same exactness as packed rows, and nothing carried between blocks."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.plan import row_cu_seqlens
from tandem.data.planning.stream import Stream
from tandem.data.reading.reader import ShardReader
from tandem.data.vision import VisionSpec
from tests.data.synthetic import MemoryShard, Sample, corpus_of, stamp_lengths
from tests.data.test_stream import CONFIG, equal, mixed_shards

SAMPLES = replace(CONFIG, rows="samples", rows_per_step=7)


@pytest.fixture(scope="module")
def mixed():
    """Two sources of mixed media, in memory."""
    return corpus_of(mixed_shards(), mixed_shards(4, 30, seed=1), settings=[{}, {"fps": 2, "repeat": 1.5}])


def stream_of(corpus, **changes):
    return Stream(corpus, replace(SAMPLES, **changes), stamp_lengths)


def pairs(plan):
    return list(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True))


@pytest.mark.parametrize("block_samples", [150, 9, 3])
@pytest.mark.parametrize("too_long", ["refuse", "cut"])
def test_resuming_at_every_step_gives_the_identical_stream(mixed, block_samples, too_long):
    config = {"block_samples": block_samples, "too_long": too_long}
    stream = stream_of(mixed, **config)
    states, plans = [stream.state()], []
    for _ in range(90):
        plans.append(stream.next_step())
        states.append(stream.state())
        assert plans[-1].state_after == states[-1] and not states[-1]["carried"]
    assert states[-1]["slot"] > 540  # more than an epoch of each
    for at, state in enumerate(states[:-1]):
        again = stream_of(mixed, **config)
        again.load_state(json.loads(json.dumps(state)))
        for plan in plans[at : at + 2]:
            assert equal(again.next_step(), plan)


@pytest.mark.parametrize("too_long", ["refuse", "cut"])
def test_every_sample_is_a_row_and_rows_are_as_long_as_the_longest(mixed, too_long):
    stream, lengths, cuts = stream_of(mixed, too_long=too_long), set(), 0
    for _ in range(30):
        plan = stream.next_step()
        assert plan.row_S.tolist() == list(range(7)) and not plan.start_S.any()
        assert plan.seq_length == plan.length_S.max() <= 512
        assert np.array_equal(plan.row_I, plan.image_sample_I)
        for row, length in enumerate(plan.length_S.tolist()):
            assert row_cu_seqlens(plan, row).tolist() == sorted({0, length, plan.seq_length})
        lengths.add(plan.seq_length)
        cuts += int(plan.cut_S.sum())
    assert len(lengths) > 10 and (cuts > 0) == (too_long == "cut")


@pytest.mark.parametrize("block_samples, window_shards, rows", [(150, 3, 7), (20, 1, 1), (7, 4, 30)])
def test_no_sample_is_lost_or_repeated_within_an_epoch(block_samples, window_shards, rows):
    corpus = corpus_of(mixed_shards(samples=30))
    stream = stream_of(corpus, block_samples=block_samples, window_shards=window_shards, rows_per_step=rows)
    epoch = stream.samples_per_epoch
    assert epoch == 180  # of these shards, all fit
    seen = Counter()
    for step in range(1, 3 * epoch // rows):
        seen.update(pairs(stream.next_step()))
        times, more = divmod(step * rows, epoch)
        if stream.state()["row"] == 0:  # whole blocks so far
            assert set(seen.values()) <= {times, times + 1} and sum(count > times for count in seen.values()) == more


def test_the_samples_are_those_of_packed_rows(mixed):
    """The same slots: over whole blocks both modes deal the same samples, carried ones aside."""
    packed, single = Stream(mixed, CONFIG, stamp_lengths), stream_of(mixed, rows_per_step=1)
    dealt = Counter()
    while packed.state()["slot"] < 450 or packed.state()["row"]:
        dealt.update(pairs(packed.next_step()))
    dealt.update(tuple(pair) for pair in packed.state()["carried"])
    alone = Counter()
    while single.state()["slot"] < packed.state()["slot"]:
        alone.update(pairs(single.next_step()))
    assert alone == dealt and single.refused == packed.refused


def test_blocks_are_shuffled_and_steps_of_any_size_cut_the_same_row_of_samples(mixed):
    def samples(rows_per_step, steps, seed=3):
        stream = stream_of(mixed, rows_per_step=rows_per_step, seed=seed)
        return [pair for _ in range(steps) for pair in pairs(stream.next_step())]

    assert samples(6, 10) == samples(60, 1) == samples(1, 60) != samples(60, 1, seed=4)


def test_the_kind_of_rows_is_part_of_what_decides_the_order(mixed):
    with pytest.raises(ValueError, match=r"belongs to another stream.*the kind of rows"):
        stream_of(mixed).load_state(Stream(mixed, CONFIG, stamp_lengths).state())
    with pytest.raises(ValueError, match="rows of 'single'; they must be packed or samples"):
        replace(CONFIG, rows="single")


def test_a_step_of_equal_samples_has_no_padding():
    plan = stream_of(corpus_of([MemoryShard.of([Sample(9)] * 5)]), block_samples=4).next_step()
    assert plan.seq_length == 9 and plan.length_S.tolist() == [9] * 7


def test_rows_are_read_as_the_samples_are(corpus, tokenizer):
    """Text, targets and pixels of a sample are the same in a row of its own as in a packed one."""
    opened = Corpus.open([SourceSettings("toy", (f"{corpus}/train/*.tar",))], tokenizer.sha256)
    reader, seen = ShardReader(opened, tokenizer, VisionSpec(), 1 << 20, 0), {}
    for rows in ("samples", "packed"):
        config = replace(CONFIG, rows=rows, rows_per_step=64 if rows == "samples" else 12, block_samples=64)
        plan = Stream(opened, config, tokenizer.stamp_lengths).next_step()
        images, text = reader.read(plan, range(len(plan.tokens_I)), range(config.rows_per_step))
        assert text.tokens.shape == (config.rows_per_step, plan.seq_length) and not (images.failures or text.failures)
        patch_I1 = np.append(0, np.cumsum(plan.grid_hw_I2.prod(1)))
        for s, pair in enumerate(pairs(plan)):
            place = plan.row_S[s], slice(plan.start_S[s], plan.start_S[s] + plan.length_S[s])
            mine = np.flatnonzero(plan.image_sample_I == s)
            pixels = b"".join(images.patches_NP[patch_I1[i] : patch_I1[i + 1]].tobytes() for i in mine)
            found = text.tokens[place].tobytes(), text.trained[place].tobytes(), pixels
            assert seen.setdefault(pair, found) == found
        images.release()
    assert len(seen) < 64 + len(plan.shard_S)  # some samples were seen both ways
