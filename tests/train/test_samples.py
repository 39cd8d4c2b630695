"""How samples are divided: every one to one rank, by cost, in chunks that all ranks have as many of."""

import json

import numpy as np
import pytest

from data.captions import captions
from data.indexing import build_index
from data.text import Tokenizer
from tests.data.conftest import encoded_image
from tests.support import settings, write_tar
from train.build import open_data
from train.samples import Captions, Samples, cut_samples, images_of

IMAGE = [{"role": "user", "text": "<image>"}]


def opened(corpus, recipe: str, task: str, *overrides: str):
    """(settings, data) of a recipe on one task of the toy corpus."""
    shards = f"data.sources.main.shards=['{corpus}/vision/train/{task}-*.tar']"
    config = settings(recipe, shards, f"data.tokenizer={corpus}/tokenizer.json", *overrides)
    return config, open_data(config)


@pytest.mark.parametrize("balance", ["true", "false"])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize(("recipe", "task", "wanted"), [("vit_contrastive", "*o*", 1), ("vit_omni", "sound", 2)])
def test_every_sample_has_one_rank(corpus, recipe, task, wanted, world, balance):
    config, data = opened(
        corpus, recipe, task, "train.global_batch_size=20", "parallel.encoder.chunk_patches=300",
        "data.max_patches=256", f"parallel.balance={balance}",
    )  # fmt: skip
    plan = data.stream.next_step()
    kinds = {"wanted": wanted, "negatives": wanted == 2}
    shares = [Samples(config, data.stream.corpus, rank, world, **kinds).divide(plan) for rank in range(world)]
    assert len({share.digest for share in shares}) == len({len(share.chunks) for share in shares}) == 1
    assert sorted(np.concatenate([np.concatenate(share.chunks) for share in shares])) == list(range(20))
    assert sorted(np.concatenate([share.image_ids for share in shares])) == list(range(plan.tokens_I.size))
    patches_I = plan.grid_hw_I2.prod(axis=1)
    for rank, share in enumerate(shares):
        mine = np.concatenate(share.chunks)
        assert (share.owner_S[mine] == rank).all()
        assert np.array_equal(share.image_ids, images_of(plan, mine))
        assert np.array_equal(share.rows, np.concatenate([mine, (mine + 1) % 20]) if wanted == 2 else mine)
        for chunk in share.chunks:
            assert len(chunk) <= 1 or patches_I[images_of(plan, chunk)].sum() <= 300
    if balance == "true" and world == 3:
        assert shares[0].load_max_over_mean < 1.15


def test_chunks_hold_what_fits():
    patches_S = np.array([10, 20, 70, 40, 60, 5])
    assert [chunk.tolist() for chunk in cut_samples(np.arange(6), patches_S, 60)] == [[0, 1], [2], [3], [4], [5]]
    assert cut_samples(np.empty(0, np.int64), patches_S, 60) == []


def test_captions_of_any_rows():
    tokens_RP = np.arange(1, 25, dtype=np.int32).reshape(3, 8)
    trained_RP = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1, 0]], bool)
    told = Captions(*captions(tokens_RP, trained_RP, 2, 48))
    tokens_T, length = told.of(np.array([2, 0]), 1)
    assert (tokens_T.tolist(), length.tolist()) == ([22, 23, 5, 6, 7], [2, 3])
    assert [[part.tolist() for part in pair] for pair in told.pairs(np.array([0, 2]))] == [
        [[2, 3], [5, 6, 7]],
        [[17, 18], [22, 23]],
    ]
    assert told.of(np.array([1]), 1)[1].tolist() == [0]


def test_samples_that_cannot_teach_are_told(corpus, tmp_path):
    """No caption, an empty one, and no image; each by name, on the rank that has read it."""
    cat = {"role": "assistant", "text": "a cat"}
    told = [[*IMAGE, cat], IMAGE, [*IMAGE, {"role": "assistant", "text": ""}], [{"role": "user", "text": "Hm?"}, cat]]
    members = []
    for number, turns in enumerate(told):
        members.append((f"s{number}.json", json.dumps({"turns": turns}).encode()))
        members += [(f"s{number}.0.png", encoded_image())] if turns[0] is IMAGE[0] else []
    shard = write_tar(tmp_path / "shard.tar", members)
    build_index(shard, Tokenizer(corpus / "tokenizer.json"))
    config = settings(
        "vit_contrastive", f"data.sources.main.shards=['{shard}']", f"data.tokenizer={corpus}/tokenizer.json",
        "train.global_batch_size=4", "data.block_samples=4",
    )  # fmt: skip
    data, reasons = open_data(config), {}
    plan = data.stream.next_step()
    for rank in range(2):
        division = Samples(config, data.stream.corpus, rank, 2, wanted=1)
        share = division.divide(plan)
        _, text = data.reader.read(plan, share.image_ids, share.rows)
        for failure in division.inspect(plan, share, text):
            reasons[int(plan.index_S[failure.sample])] = failure
    assert {index: failure.reason for index, failure in reasons.items()} == {
        1: "no caption", 2: "no caption", 3: "no image"
    }  # fmt: skip
    assert reasons[3].sentence == f"sample 3 of {shard} has no image"
    assert "fewer than 1 captions with a token that is trained" in reasons[1].sentence
