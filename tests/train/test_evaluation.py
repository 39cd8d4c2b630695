"""The control of the evaluation: every image comes from another sample, at the size that was planned."""

import numpy as np

from tandem.train.evaluation.answers import Score, exchange_images
from tandem.train.input.dataset import open_data
from tests.support import corpus_overrides, settings


def one_step(corpus, shards):
    shards = f"data.sources.main.shards=['{corpus}/heldout/{shards}.tar']"
    return open_data(settings("stage1", *corpus_overrides(corpus), shards))


def test_no_sample_keeps_its_image_and_sizes_stay(corpus):
    data = one_step(corpus, "read-*")
    plan = data.stream.next_step()
    exchanged = exchange_images(plan)
    assert (exchanged.image_sample_I != plan.image_sample_I).all()
    assert sorted(exchanged.image_media_I) == sorted(plan.image_media_I)
    everything = np.arange(plan.tokens_I.size)
    right, _ = data.reader.read(plan, everything, [])
    wrong, _ = data.reader.finish(data.reader.begin(plan, everything, [], exchanged))
    assert not wrong.failures
    assert right.patches_NP.shape == wrong.patches_NP.shape
    assert (right.patches_NP != wrong.patches_NP).any()
    data.reader.close()


def test_images_are_exchanged_inside_their_domain(corpus):
    data = one_step(corpus, "{read,count}-*")
    plan = data.stream.next_step()
    exchanged = exchange_images(plan)
    before, after = (plan.domain_S[p.image_sample_I] for p in (plan, exchanged))
    assert (before == after).all()
    data.reader.close()


def test_scores_are_means():
    assert Score(samples=4, exact=3, loss=2.0, tokens=8).numbers() == {"samples": 4, "exact_match": 0.75, "loss": 0.25}
    assert Score().numbers() == {"samples": 0, "exact_match": 0.0, "loss": 0.0}
