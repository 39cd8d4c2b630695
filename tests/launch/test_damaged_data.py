"""What a disk gets wrong costs one sample, on all ranks; what one rank gets wrong stops all with its words.

Damage that only training can notice is made in copies of real shards.
"""

import os
import re
import shutil

import numpy as np
import pytest
import torch.distributed as dist

from tandem.data.reading.reader import ShardReader
from tandem.train.input import rows
from tandem.train.input.dataset import open_data
from tandem.train.input.prefetcher import AgreedError
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, read_metrics, settings

STEPS = 3
SMALL = [
    f"train.steps={STEPS}",
    "train.seq_length=256",
    "train.global_batch_size=8",
    "data.max_patches=64",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "model.llm.aux_loss=0",  # the one loss that sees the pixels of a sample that is not trained on
    "model.llm.z_loss=0",
]


@pytest.fixture(scope="module")
def damaged(corpus, tmp_path_factory):
    """(overrides that read a copy of the corpus, (shard, sample) of what is damaged in it): one image of a sample of
    several in step 0, and one more image in step 2, overwritten after the shards were indexed."""
    copy = tmp_path_factory.mktemp("damaged")
    shutil.copytree(corpus, copy, dirs_exist_ok=True)
    data = open_data(settings("stage1", *SMALL, *corpus_overrides(copy)))
    plans = [data.stream.next_step() for _ in range(STEPS)]
    victims = []
    for plan, at_least in ((plans[0], 2), (plans[2], 1)):
        images_S = np.bincount(plan.image_sample_I, minlength=plan.length_S.size)
        sample = int(np.flatnonzero(images_S >= at_least)[0])
        image = int(np.flatnonzero(plan.image_sample_I == sample)[-1])
        index = data.stream.corpus.index(int(plan.shard_S[sample]))
        record = index.media[plan.image_media_I[image]]
        with open(index.shard, "r+b") as file:
            file.seek(int(record["offset"]))
            file.write(bytes(int(record["size"])))
        os.utime(index.shard + ".index")  # an index must not be older than its shard
        victims.append((int(plan.shard_S[sample]), int(plan.index_S[sample])))
    used = [pair for plan in plans for pair in zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True)]
    assert all(used.count(victim) == 1 for victim in victims), "a damaged sample comes once in these steps"
    data.reader.close()
    return corpus_overrides(copy), victims


def train_and_tell(overrides, run_dir):
    """Trains; (trained tokens, samples skipped) of every step as this rank has them."""
    seen, step_input = [], rows.step_input

    def watched(prepared, **settings):
        seen.append((prepared.trained_tokens, prepared.skipped))
        return step_input(prepared, **settings)

    rows.step_input = watched
    train_run("stage1", overrides, run_dir)
    return seen


def train_without(victims, overrides, run_dir):
    """Trains on whole data with the losses of `victims` left out; how many trained tokens that took away."""
    begin, finish, taken, reading = ShardReader.begin, ShardReader.finish, [], {}

    def noting(self, plan, image_ids, rows, pixels=None):
        pending = begin(self, plan, image_ids, rows, pixels)
        reading[id(pending)] = plan, rows
        return pending

    def fewer(self, pending):
        images, text = finish(self, pending)
        plan, rows = reading.pop(id(pending))
        for sample, place in enumerate(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True)):
            if place in victims and plan.row_S[sample] in rows:
                line = text.trained[list(rows).index(plan.row_S[sample])]
                first, last = plan.start_S[sample], plan.start_S[sample] + plan.length_S[sample]
                taken.append(int(line[first:last].sum()))
                line[first:last] = False
        return images, text

    ShardReader.begin, ShardReader.finish = noting, fewer
    train_run("stage1", overrides, run_dir)
    return taken


@pytest.fixture(scope="module")
def reference(corpus, damaged, tmp_path_factory):
    """Metrics of one process that reads whole data and leaves the losses of the damaged samples out."""
    run_dir = tmp_path_factory.mktemp("reference")
    [taken] = run_world(train_without, 1, damaged[1], [*SMALL, *corpus_overrides(corpus)], str(run_dir))
    assert len(taken) == 2 and all(taken)
    return read_metrics(run_dir)


@pytest.mark.parametrize("layout", ["parallel.tp=1", "parallel.pp=2"])
def test_an_undecodable_image_costs_its_sample_and_nothing_else(layout, damaged, reference, tmp_path):
    """Counted, told, and left out of the loss on every rank; encoder and LLM learn as from the same rows without it."""
    overrides, _ = damaged
    first, second = run_world(train_and_tell, 2, [*SMALL, *overrides, layout], str(tmp_path))
    metrics = read_metrics(tmp_path)
    assert first == second
    assert [len(skipped) for _, skipped in first] == [1, 0, 1]
    assert all(
        "image at byte" in skipped[0].sentence and "checksum differs" in skipped[0].sentence
        for _, skipped in (first[0], first[2])
    )
    assert [line["skipped"] for line in metrics] == [1, 1, 2]
    for mine, other, (trained, _) in zip(metrics, reference, first, strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"] == trained
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        for norm in ("grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm"):
            assert mine[norm] == pytest.approx(other[norm], rel=1e-4), norm


def broken_from_the_second(function, words: str):
    """`function`, which raises RuntimeError from its second call on."""
    calls = []

    def broken(*arguments, **named):
        calls.append(arguments)
        if len(calls) > 1:
            raise RuntimeError(words)
        return function(*arguments, **named)

    return broken


def failure(overrides, run_dir, break_rank=None):
    """The error that ends training on this rank; `break_rank` cannot read images from its second step on."""
    if dist.get_rank() == break_rank:
        ShardReader.finish = broken_from_the_second(ShardReader.finish, "the disk is gone")
    try:
        train_run("stage1", overrides, run_dir)
    except AgreedError as error:
        return str(error)


def test_too_many_undecodable_samples_stop_every_rank(damaged, tmp_path):
    first, second = run_world(failure, 2, [*SMALL, *damaged[0], "data.max_skip_rate=0.001"], str(tmp_path))
    assert first == second
    sentence = (
        r"2 of the latest \d+ samples could not be used, above data.max_skip_rate=0.001; the last one: image at byte"
    )
    assert re.match(sentence, first)
    assert len(read_metrics(tmp_path)) == 2


def test_an_error_on_one_rank_stops_all_with_its_words(corpus, tmp_path):
    first, second = run_world(failure, 2, [*SMALL, *corpus_overrides(corpus)], str(tmp_path), 1)
    assert first == second == "rank 1: RuntimeError: the disk is gone"
    assert len(read_metrics(tmp_path)) == 1


def failure_to_compose(overrides, run_dir):
    """As `failure`; rank 1 cannot make the batch of its second step."""
    if dist.get_rank() == 1:
        rows.step_input = broken_from_the_second(rows.step_input, "no memory")
    return failure(overrides, run_dir)


def test_a_batch_that_one_rank_cannot_make_stops_all_with_its_words(corpus, tmp_path):
    first, second = run_world(failure_to_compose, 2, [*SMALL, *corpus_overrides(corpus)], str(tmp_path))
    assert first == second == "rank 1: RuntimeError: no memory"
    assert len(read_metrics(tmp_path)) == 1


def failure_with_own_seed(overrides, run_dir):
    return failure([*overrides, f"train.seed={dist.get_rank()}"], run_dir)


def test_ranks_that_plan_differently_stop_before_they_exchange_anything(corpus, tmp_path):
    first, second = run_world(failure_with_own_seed, 2, [*SMALL, *corpus_overrides(corpus)], str(tmp_path))
    assert first == second == "ranks [1] planned step 0 differently from rank 0"
