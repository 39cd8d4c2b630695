"""How samples are divided: every one to one rank, by cost, in chunks that all ranks have as many of."""

import json

import numpy as np
import pytest

from tandem.data.media.text import Tokenizer
from tandem.data.planning.plan import images_of
from tandem.data.reading.captions import captions
from tandem.data.shards.indexing import build_index
from tandem.train.input.dataset import open_data
from tandem.train.input.samples import Captions, Samples
from tests.data.conftest import encoded_image, encoded_video, sound_of
from tests.support import settings, write_tar

IMAGE = [{"role": "user", "text": "<image>"}]


def opened(corpus, recipe: str, task: str, *overrides: str):
    """(settings, data) of a recipe on one task of the toy corpus."""
    shards = f"data.sources.main.shards=['{corpus}/vision/train/{task}-*.tar']"
    config = settings(recipe, shards, f"data.tokenizer={corpus}/tokenizer.json", *overrides)
    return config, open_data(config)


@pytest.mark.parametrize("balance", ["true", "false"])
@pytest.mark.parametrize("world", [1, 3, 8])
@pytest.mark.parametrize(
    ("recipe", "task", "wanted"), [("vit_mim", "digit", 0), ("vit_contrastive", "*o*", 1), ("vit_omni", "sound", 2)]
)
def test_every_sample_has_one_rank(corpus, recipe, task, wanted, world, balance):
    config, data = opened(
        corpus, recipe, task, "train.global_batch_size=20", "parallel.encoder.chunk_patches=300",
        "data.max_patches=256", f"parallel.balance={balance}",
    )  # fmt: skip
    plan = data.stream.next_step()
    kinds = {"eos_id": data.reader.tokenizer.eos_id, "wanted": wanted, "negatives": wanted == 2}
    rank_shards = [Samples(config, data.stream.corpus, rank, world, **kinds).shard(plan) for rank in range(world)]
    assert (
        len({rank_shard.digest for rank_shard in rank_shards})
        == len({len(rank_shard.chunks) for rank_shard in rank_shards})
        == 1
    )
    assert sorted(np.concatenate([np.concatenate(rank_shard.chunks) for rank_shard in rank_shards])) == list(range(20))
    assert sorted(np.concatenate([rank_shard.image_ids for rank_shard in rank_shards])) == list(
        range(plan.tokens_I.size)
    )
    patches_I = plan.patches_I
    for rank, rank_shard in enumerate(rank_shards):
        mine = np.concatenate(rank_shard.chunks)
        assert (rank_shard.encoding_rank_S[mine] == rank).all()
        assert np.array_equal(rank_shard.image_ids, images_of(plan, mine)[0])
        assert np.array_equal(rank_shard.rows, (mine[:0], mine, np.concatenate([mine, (mine + 1) % 20]))[wanted])
        for chunk in rank_shard.chunks:
            assert len(chunk) <= 1 or patches_I[images_of(plan, chunk)[0]].sum() <= 300
    if balance == "true" and world == 3:
        assert rank_shards[0].load_max_over_mean < 1.15


def test_captions_of_any_rows():
    tokens_RP = np.arange(1, 25, dtype=np.int32).reshape(3, 8)
    trained_RP = np.array([[0, 1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 1, 1, 0]], bool)
    tokens_RP[[0, 0, 1, 2, 2], [2, 6, 7, 1, 6]] = eos = 99
    told = Captions(*captions(tokens_RP, trained_RP, 2, 48, eos))
    tokens_T, length = told.of(np.array([2, 0]), 1)
    assert (tokens_T.tolist(), length.tolist()) == ([22, eos, 5, 6, eos], [2, 3])
    assert [[part.tolist() for part in pair] for pair in told.pairs(np.array([0, 2]))] == [
        [[2, eos], [5, 6, eos]],
        [[17, eos], [22, eos]],
    ]
    assert told.of(np.array([1]), 1)[1].tolist() == [0]


def told(corpus, folder, recipe: str, wanted: int, samples: list[tuple[list, list]], *overrides: str):
    """{sample: Failure} of what two ranks say of samples given as (turns, media members), read as one step."""
    members = []
    for number, (turns, media) in enumerate(samples):
        members.append((f"s{number}.json", json.dumps({"turns": turns}).encode()))
        members += [(f"s{number}.{place}.{kind}", content) for place, (kind, content) in enumerate(media)]
    shard = write_tar(folder / "shard.tar", members)
    build_index(shard, Tokenizer(corpus / "tokenizer.json"))
    here = [f"data.sources.main.shards=['{shard}']", f"data.tokenizer={corpus}/tokenizer.json", *overrides]
    config = settings(recipe, *here, f"train.global_batch_size={len(samples)}", f"data.block_samples={len(samples)}")
    data, failures = open_data(config), {}
    plan = data.stream.next_step()
    for rank in range(2):
        eos_id = data.reader.tokenizer.eos_id
        sharding = Samples(config, data.stream.corpus, rank, 2, eos_id=eos_id, wanted=wanted)
        rank_shard = sharding.shard(plan)
        _, text = data.reader.read(plan, rank_shard.image_ids, rank_shard.rows)
        failures |= {int(plan.index_S[found.sample]): found for found in sharding.inspect(plan, rank_shard, text)}
    return failures, shard


def test_samples_that_cannot_teach_are_told(corpus, tmp_path):
    """No caption, an empty one, and no image; each by name, on the rank that has read it."""
    cat, picture = {"role": "assistant", "text": "a cat"}, [("png", encoded_image())]
    mute = [*IMAGE, {"role": "assistant", "text": ""}]
    samples = [
        ([*IMAGE, cat], picture),
        (IMAGE, picture),
        (mute, picture),
        ([{"role": "user", "text": "Hm?"}, cat], []),
    ]
    failures, shard = told(corpus, tmp_path, "vit_contrastive", 1, samples)
    reasons = {index: failure.reason for index, failure in failures.items()}
    assert reasons == {1: "no caption", 2: "no caption", 3: "no image"}
    assert failures[3].sentence == f"sample 3 of {shard} has no image"
    assert "fewer than 1 captions with a token that is trained" in failures[1].sentence


def test_a_tuple_is_one_video_with_sound(corpus, tmp_path):
    """A picture beside the video would be taken for its sound."""
    clip = ("mp4", encoded_video(seconds=1, sound_S=sound_of(440.0)))
    said = [{"role": "assistant", "text": "a"}, {"role": "user", "text": "?"}, {"role": "assistant", "text": "b"}]
    samples = [
        ([{"role": "user", "text": text}, *said], media)
        for text, media in (
            ("<video>", [clip]),
            ("<video><image>", [clip, ("png", encoded_image())]),
            ("<image><video>", [("png", encoded_image()), clip]),
            ("<video><video>", [clip, clip]),
        )
    ]
    failures, _ = told(corpus, tmp_path, "vit_omni", 2, samples, "data.audio_seconds=1")
    assert {index: failure.reason for index, failure in failures.items()} == dict.fromkeys((1, 2, 3), "not one video")
