import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data.image import decode_image, to_patches
from data.index import load_index
from data.reader import ShardReader, _OpenFiles
from data.stream import Stream, StreamConfig
from data.text import Tokenizer

CONFIG = StreamConfig(seq_length=512, rows_per_step=4, seed=3, min_patches=4, max_patches=64, window_shards=3)


@pytest.fixture
def opened(corpus, indexes):
    tokenizer = Tokenizer(corpus / "tokenizer.json")
    reader = ShardReader(indexes, tokenizer, ("assistant",), 1 << 20, workers=2)
    yield Stream(indexes, CONFIG), reader, tokenizer
    reader.close()


def members_of(shard):
    with tarfile.open(shard) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_rows_hold_the_samples_and_labels_never_cross_them(opened, indexes):
    stream, reader, tokenizer = opened
    plan = stream.next_step()
    batch = reader.read_rows(plan, range(4))
    assert batch.tokens.shape == batch.labels.shape == batch.loss_mask.shape == batch.domain.shape == (4, 512)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.loss_mask.dtype) == (np.int64, np.int64, bool)
    assert not batch.failures
    bytes_read = 0
    for s in range(len(plan.shard_S)):
        record = indexes[plan.shard_S[s]].samples[plan.index_S[s]]
        raw = Path(indexes[plan.shard_S[s]].shard).read_bytes()
        content = json.loads(raw[record["json_offset"] :][: record["json_size"]])
        bytes_read += int(record["json_size"])
        row, at = plan.row_S[s], slice(plan.start_S[s], plan.start_S[s] + plan.length_S[s])
        tokens, labels, mask = batch.tokens[row, at], batch.labels[row, at], batch.loss_mask[row, at]
        question, answer = (turn["text"] for turn in content["turns"])
        text = tokenizer.decode(tokens[tokens != tokenizer.image_id])
        marked = question.replace("<image>", "[SOI][EOI]")
        assert text == f"<user>{marked}<eos><assistant>{answer}<eos>"
        assert np.array_equal(labels[:-1], tokens[1:]) and labels[-1] == tokenizer.pad_id and not mask[-1]
        assert tokenizer.decode(labels[mask]) == answer + "<eos>"
        assert (batch.domain[row, at] == plan.domain_S[s]).all()
        assert stream.domains[plan.domain_S[s]] == content["domain"]
    assert batch.bytes_read == bytes_read
    assert not (batch.labels[batch.loss_mask] == tokenizer.image_id).any()
    padding = batch.domain == -1
    assert (batch.tokens[padding] == tokenizer.pad_id).all() and not batch.loss_mask[padding].any()


def test_visual_positions_are_where_the_plan_says(opened):
    stream, reader, tokenizer = opened
    plan = stream.next_step()
    batch = reader.read_rows(plan, [2, 0])  # any rows, in the order asked for
    for r, row in enumerate((2, 0)):
        expected = np.zeros(512, bool)
        for i in np.flatnonzero(plan.row_I == row):
            end = plan.start_I[i] + plan.tokens_I[i]
            expected[plan.start_I[i] : end] = True
            assert batch.tokens[r, plan.start_I[i] - 1] == tokenizer.ids["[SOI]"]
            assert batch.tokens[r, end] == tokenizer.ids["[EOI]"]
        assert np.array_equal(batch.tokens[r] == tokenizer.image_id, expected)


def test_images_are_those_of_the_shard(opened, indexes):
    stream, reader, _ = opened
    plan = stream.next_step()
    ids = np.random.default_rng(0).permutation(len(plan.tokens_I))[:25]
    batch = reader.read_images(plan, ids)
    assert batch.patches_N588.dtype == np.uint8 and np.array_equal(batch.grid_hw_I2, plan.grid_hw_I2[ids])
    at, bytes_read = 0, 0
    for i in ids:
        shard = indexes[plan.shard_S[plan.image_sample_I[i]]]
        record = shard.images[plan.image_member_I[i]]
        encoded = Path(shard.shard).read_bytes()[record["offset"] :][: record["size"]]
        down, across = plan.grid_hw_I2[i].tolist()
        expected = to_patches(decode_image(encoded, 1 << 20), down * 14, across * 14)
        assert np.array_equal(batch.patches_N588[at : at + down * across], expected)
        at, bytes_read = at + down * across, bytes_read + len(encoded)
    assert at == len(batch.patches_N588) and batch.bytes_read == bytes_read and not batch.failures
    none = reader.read_images(plan, [])
    assert none.patches_N588.shape == (0, 588) and none.grid_hw_I2.shape == (0, 2)
    assert reader.read_rows(plan, []).tokens.shape == (0, 512)


def damaged_after_indexing(make_shard, tokenizer):
    """A shard of three samples whose first json and second image were overwritten after indexing."""
    members = []
    for n in range(3):
        members += [(f"s{n}.0.png", make_shard.image(56, 56)), (f"s{n}.json", make_shard.json("<image>hi", str(n)))]
    shard, _ = make_shard(members)
    index = load_index(shard, tokenizer.sha256)
    with open(shard, "r+b") as file:
        file.seek(int(index.samples[0]["json_offset"]))
        file.write(b"?" * 10)
        file.seek(int(index.images[1]["offset"]) + 60)
        file.write(b"\0" * (int(index.images[1]["size"]) - 80))
        file.seek(int(index.samples[2]["json_offset"]))
        longer = make_shard.json("<image>h", "2")  # one token fewer than indexed
        file.write(longer.ljust(int(index.samples[2]["json_size"])))
    return index


def test_damage_is_reported_and_keeps_the_planned_shapes(make_shard, tokenizer):
    index = damaged_after_indexing(make_shard, tokenizer)
    config = StreamConfig(seq_length=64, rows_per_step=1, seed=0, min_patches=4, max_patches=64, block_samples=3)
    plan = Stream([index], config).next_step()
    reader = ShardReader([index], tokenizer, ("assistant",), 1 << 20, workers=2)

    images = reader.read_images(plan, range(len(plan.tokens_I)))
    assert len(images.patches_N588) == plan.grid_hw_I2.prod(1).sum()
    broken = [i for i, _ in images.failures]
    assert broken == np.flatnonzero(plan.image_member_I == 1).tolist()
    sentence = images.failures[0][1]
    assert "shard-0000.tar" in sentence and f"byte {index.images[1]['offset']}" in sentence and "decoded" in sentence
    first = int(plan.grid_hw_I2[: broken[0]].prod(1).sum())
    assert not images.patches_N588[first : first + 16].any()

    rows = reader.read_rows(plan, [0])
    damaged = {sample: sentence for sample, sentence in rows.failures}
    assert set(plan.index_S[list(damaged)].tolist()) == {0, 2}
    for sample, sentence in damaged.items():
        at = slice(plan.start_S[sample], plan.start_S[sample] + plan.length_S[sample])
        assert not rows.loss_mask[0, at].any()
        assert (rows.tokens[0, at] == tokenizer.image_id).sum() == 4
        wrong = "cannot be parsed" if plan.index_S[sample] == 0 else "no longer matches its index"
        assert wrong in sentence and "shard-0000.tar" in sentence
    assert rows.loss_mask.any()

    tight = ShardReader([index], tokenizer, ("assistant",), 100, workers=1)
    assert "the limit is 100 pixels" in tight.read_images(plan, [0]).failures[0][1]
    os.truncate(index.shard, 600)
    assert "ends" in reader.read_images(plan, [1]).failures[0][1]


def test_reader_settings_name_their_key(indexes, tokenizer):
    with pytest.raises(ValueError, match="data.train_roles is \\['robot'\\]"):
        ShardReader(indexes, tokenizer, ("robot",), 100, 1)
    with pytest.raises(ValueError, match="data.workers is 0"):
        ShardReader(indexes, tokenizer, ("user",), 100, 0)


def test_open_files_stay_bounded(tmp_path):
    files = _OpenFiles(2)
    for n in range(5):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 10)
        assert files.pread(str(tmp_path / str(n)), 4, 6) == bytes([n]) * 4
        assert len(files._files) <= 2
    with pytest.raises(OSError, match="ends 1 bytes early"):
        files.pread(str(tmp_path / "4"), 5, 6)
    files.close()


def test_webdataset_reads_the_same_samples(corpus, indexes):
    """The shards are plain webdataset shards, and the index lists what webdataset yields, in its order."""
    webdataset = pytest.importorskip("webdataset")
    index = next(index for index in indexes if "ground" in index.domains)
    seen = list(webdataset.WebDataset(index.shard, shardshuffle=False, empty_check=False))
    assert len(seen) == index.n_samples
    raw = Path(index.shard).read_bytes()
    for sample, record in zip(seen, index.samples, strict=True):
        assert sample["json"] == raw[record["json_offset"] :][: record["json_size"]]
        image = sample.get("0.png") or sample["0.jpg"]
        assert decode_image(image, 1 << 20).shape[:2] == (
            index.images[record["first_image"]]["height"],
            index.images[record["first_image"]]["width"],
        )
