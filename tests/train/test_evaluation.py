"""The control of the evaluation: every image comes from another sample, at the size that was planned."""

import numpy as np

from data.index import expand_shards, load_index
from data.reader import ShardReader
from data.stream import Stream, StreamConfig
from data.text import Tokenizer
from train.evaluation import Score, exchange_images


def one_step(corpus, shards):
    tokenizer = Tokenizer(corpus / "tokenizer.json")
    indexes = [load_index(path, tokenizer.sha256) for path in expand_shards([f"{corpus}/heldout/{shards}.tar"])]
    config = StreamConfig(seq_length=512, rows_per_step=4, seed=0, min_patches=4, max_patches=256)
    stream = Stream(indexes, config)
    return stream.next_step(), ShardReader(indexes, tokenizer, ["assistant"], 10**7, 1)


def test_no_sample_keeps_its_image_and_sizes_stay(corpus):
    plan, reader = one_step(corpus, "read-*")
    exchanged = exchange_images(plan)
    assert (exchanged.image_sample_I != plan.image_sample_I).all()
    assert sorted(exchanged.image_member_I) == sorted(plan.image_member_I)
    everything = np.arange(plan.tokens_I.size)
    right, wrong = reader.read_images(plan, everything), reader.read_images(exchanged, everything)
    assert not wrong.failures
    assert right.patches_N588.shape == wrong.patches_N588.shape
    assert (right.patches_N588 != wrong.patches_N588).any()
    reader.close()


def test_images_are_exchanged_inside_their_domain(corpus):
    plan, reader = one_step(corpus, "{read,count}-*")
    exchanged = exchange_images(plan)
    before, after = (plan.domain_S[p.image_sample_I] for p in (plan, exchanged))
    assert (before == after).all()
    reader.close()


def test_scores_are_means():
    assert Score(samples=4, exact=3, loss=2.0, tokens=8).numbers() == {"samples": 4, "exact_match": 0.75, "loss": 0.25}
    assert Score().numbers() == {"samples": 0, "exact_match": 0.0, "loss": 0.0}
