import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tandem.data.media.image import decode_image, to_patches
from tandem.data.media.text import Tokenizer
from tandem.data.media.video import decode_frames
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.stream import Stream
from tandem.data.reading import jobs, slots
from tandem.data.reading.reader import ShardReader
from tandem.data.shards.index import VIDEO
from tandem.data.shards.storage import Section
from tandem.data.vision import VisionSpec
from tests.data.synthetic import stream_config

CONFIG = stream_config(
    seq_length=1024, rows_per_step=6, seed=3, vision=VisionSpec(4, 64), video_budget=256, video_levels=(32, 16, 8)
)


def open_corpus(patterns, tokenizer, **settings) -> Corpus:
    return Corpus.open([SourceSettings(name="main", shards=tuple(patterns), **settings)], tokenizer.sha256)


@pytest.fixture(scope="module")
def opened(corpus):
    """(stream, corpus, tokenizer) over every task, images, videos and text."""
    tokenizer = Tokenizer(corpus / "tokenizer.json")
    toy = open_corpus([f"{corpus}/train/*.tar"], tokenizer, fps=2)
    return Stream(toy, CONFIG, tokenizer.stamp_lengths), toy, tokenizer


@pytest.fixture
def plan(opened):
    """A step with videos in it."""
    stream = opened[0]
    while not ((plan := stream.next_step()).time_I > 0).any():
        pass
    return plan


@pytest.fixture(params=[0, 2], ids=["calling thread", "two workers"])
def reader(request, opened):
    reader = ShardReader(opened[1], opened[2], VisionSpec(), 1 << 20, request.param)
    yield reader
    reader.close()


def everything(plan):
    return range(len(plan.tokens_I)), range(CONFIG.rows_per_step)


def test_rows_hold_the_samples(opened, plan, reader):
    stream, corpus, tokenizer = opened
    rows = reader.read(plan, [], range(6))[1]
    assert rows.tokens.shape == rows.trained.shape == (6, 1024)
    assert (rows.tokens.dtype, rows.trained.dtype) == (np.int32, bool) and not rows.failures
    inside, bytes_read = np.zeros((6, 1024), bool), 0
    for s in range(len(plan.shard_S)):
        index = corpus.index(plan.shard_S[s])
        record = index.samples[plan.index_S[s]]
        content = json.loads(Path(index.shard).read_bytes()[record["text_offset"] :][: record["text_size"]])
        bytes_read += int(record["text_size"])
        row, at = plan.row_S[s], slice(plan.start_S[s], plan.start_S[s] + plan.length_S[s])
        inside[row, at] = True
        tokens, trained = rows.tokens[row, at], rows.trained[row, at]
        text, times = tokenizer.decode(tokens[tokens != tokenizer.image_id]), plan.time_I[plan.image_sample_I == s]
        if (times < 0).all():
            whole = "".join(f"<{turn['role']}>{turn['text']}<eos>" for turn in content["turns"])
            assert text == whole.replace("<image>", "[SOI][EOI]")
        else:
            stamps_at = [text.index(f"[{time / 1000:.1f} second][SOI][EOI]") for time in times]
            assert stamps_at == sorted(stamps_at)
        said = [entry for turn in content["turns"] for entry in (*turn.get("stream", []), turn)]
        targets = "".join(f"{entry['text']}<eos>" for entry in said if entry["role"] == "assistant")
        assert tokenizer.decode(tokens[trained]) == targets
        assert stream.domains[plan.domain_S[s]] == content["domain"]
    assert rows.bytes_read == bytes_read
    assert (rows.tokens[~inside] == tokenizer.pad_id).all() and not rows.trained[~inside].any()


def test_visual_positions_are_where_the_plan_says(opened, plan, reader):
    tokenizer = opened[2]
    rows = reader.read(plan, [], [2, 0, 5])[1]  # any rows, in the order asked for
    for r, row in enumerate((2, 0, 5)):
        expected = np.zeros(1024, bool)
        for i in np.flatnonzero(plan.row_I == row):
            end = plan.start_I[i] + plan.tokens_I[i]
            expected[plan.start_I[i] : end] = True
            assert rows.tokens[r, plan.start_I[i] - 1] == tokenizer.ids["[SOI]"]
            assert rows.tokens[r, end] == tokenizer.ids["[EOI]"]
        assert np.array_equal(rows.tokens[r] == tokenizer.image_id, expected)


def test_images_and_frames_are_those_of_the_shards(opened, plan, reader):
    corpus = opened[1]
    ids = np.random.default_rng(0).permutation(len(plan.tokens_I))
    ids = np.append(ids, ids[:3])  # some twice
    images = reader.read(plan, ids, [])[0]
    assert images.patches_NP.dtype == np.uint8 and np.array_equal(images.grid_hw_I2, plan.grid_hw_I2[ids])
    at, seen = 0, {}
    for i in ids:
        shard, medium = int(plan.shard_S[plan.image_sample_I[i]]), int(plan.image_media_I[i])
        index = corpus.index(shard)
        record = index.media[medium]
        encoded = Path(index.shard).read_bytes()[record["offset"] :][: record["size"]]
        seen[shard, medium] = len(encoded)
        down, across = plan.grid_hw_I2[i].tolist()
        if plan.time_I[i] < 0:
            pixels = decode_image(encoded, 1 << 20, (down * 14, across * 14))
        else:
            (pixels,) = decode_frames(io.BytesIO(encoded), [plan.time_I[i]])
        expected = to_patches(pixels, (down, across), VisionSpec())
        assert np.array_equal(images.patches_NP[at : at + down * across], expected)
        at += down * across
    assert at == len(images.patches_NP) and not images.failures
    assert images.bytes_read == sum(seen.values())  # a video is read once for all of its frames
    images.release()


def test_nothing_asked_for(plan, reader):
    images, rows = reader.read(plan, [], [])
    assert images.patches_NP.shape == (0, 588) and images.grid_hw_I2.shape == (0, 2)
    assert rows.tokens.shape == rows.trained.shape == (0, 1024) and images.bytes_read == rows.bytes_read == 0


def test_workers_read_what_the_calling_thread_reads(opened, plan):
    _, corpus, tokenizer = opened
    batches = []
    for processes in (0, 2):
        reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, processes)
        pending = [reader.begin(plan, *everything(plan)) for _ in range(3)]  # several under way at once
        results = [reader.finish(one) for one in pending]
        batches += [(images.patches_NP.copy(), rows.tokens, rows.trained) for images, rows in results]
        reader.close()
    assert len(batches) == 6
    for batch in batches[1:]:
        assert all(np.array_equal(one, other) for one, other in zip(batch, batches[0], strict=True))


def test_pixels_of_another_plan(opened, plan, reader):
    """What an evaluation with exchanged images asks for: places and text of one plan, pixels of another."""
    stills = np.flatnonzero(plan.time_I < 0)
    same_grid = [i for i in stills if np.array_equal(plan.grid_hw_I2[i], plan.grid_hw_I2[stills[0]])]
    source_I = np.arange(len(plan.tokens_I))
    source_I[same_grid] = np.roll(same_grid, 1)
    fields = {name: getattr(plan, name)[source_I] for name in ("image_sample_I", "image_media_I", "time_I")}
    other = type(plan)(**{**vars(plan), **fields})
    images, rows = reader.finish(reader.begin(plan, same_grid, range(6), other))
    expected = reader.read(plan, source_I[same_grid], range(6))
    assert np.array_equal(images.patches_NP, expected[0].patches_NP)
    assert np.array_equal(rows.tokens, expected[1].tokens) and not rows.failures


def test_train_roles_are_those_of_the_source(corpus, opened):
    tokenizer = opened[2]
    sources = [
        SourceSettings(name="both", shards=(f"{corpus}/train/text-*.tar",), train_roles=("user", "assistant")),
        SourceSettings(name="users", shards=(f"{corpus}/train/caption-*.tar",), train_roles=("user",)),
    ]
    mixed = Corpus.open(sources, tokenizer.sha256)
    plan = Stream(mixed, CONFIG, tokenizer.stamp_lengths).next_step()
    reader = ShardReader(mixed, tokenizer, VisionSpec(), 1 << 20, 0)
    rows = reader.read(plan, [], range(6))[1]
    seen = set()
    for s in range(len(plan.shard_S)):
        at = slice(plan.start_S[s], plan.start_S[s] + plan.length_S[s])
        ends = rows.trained[plan.row_S[s], at][rows.tokens[plan.row_S[s], at] == tokenizer.eos_id]
        source = int(mixed.source_of(int(plan.shard_S[s])))
        assert ends.tolist() == [[True, True], [True, False]][source]
        seen.add(source)
    assert seen == {0, 1}


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def overwrite(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(int(offset))
        file.write(data)


@pytest.fixture
def damaged(make_shard, tokenizer):
    """(corpus, plan) of five samples, more than once each; four were overwritten after indexing: the json of the first,
    the image of the second, the video of the third, and the text of the fourth is now shorter."""
    members = []
    for n in range(5):
        kind, data = ("video", make_shard.video()) if n == 2 else ("image", make_shard.image(56, 56))
        members.append((f"s{n}.0.{'mp4' if n == 2 else 'png'}", data))
        members.append((f"s{n}.json", make_shard.json(f"<{kind}>hi", str(n))))
    shard, _ = make_shard(members)
    corpus = open_corpus([shard], tokenizer)
    config = stream_config(
        seq_length=256, rows_per_step=1, seed=0, vision=VisionSpec(4, 64), block_samples=5, video_levels=(16,)
    )
    plan = Stream(corpus, config, tokenizer.stamp_lengths).next_step()
    assert set(plan.index_S.tolist()) == set(range(5))
    index = corpus.index(0)
    samples, media = index.samples.copy(), index.media.copy()
    overwrite(shard, samples[0]["text_offset"], b"?" * 10)
    overwrite(shard, media[1]["offset"] + 60, bytes(40))
    overwrite(shard, media[2]["offset"] + media[2]["size"] // 2, bytes(200))
    shorter = make_shard.json("<image>h", "3").ljust(int(samples[3]["text_size"]))
    overwrite(shard, samples[3]["text_offset"], shorter)
    return corpus, plan


@pytest.mark.parametrize("processes", [0, 1])
def test_damage_is_reported_and_keeps_the_planned_shapes(damaged, tokenizer, processes):
    corpus, plan = damaged
    shard = corpus.shard_name(0)
    unseen_S, unread_S = np.isin(plan.index_S, (1, 2)), np.isin(plan.index_S, (0, 3))
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, processes)
    for _ in range(2):  # the second time into memory that held something else
        images, rows = reader.read(plan, range(len(plan.tokens_I)), [0])
        assert [failure.sample for failure in images.failures] == np.flatnonzero(unseen_S).tolist()
        for failure in images.failures:
            record = corpus.index(0).media[plan.index_S[failure.sample]]
            kind = "video" if record["kind"] == VIDEO else "image"
            assert failure.sentence.startswith(f"{kind} at byte {record['offset']} of {shard}: ")
            assert (failure.shard, failure.reason) == (shard, "changed") and "checksum" in failure.sentence
        border_I1 = np.append(0, np.cumsum(plan.grid_hw_I2.prod(1)))
        assert len(images.patches_NP) == border_I1[-1]
        for i, sample in enumerate(plan.image_sample_I):
            assert images.patches_NP[border_I1[i] : border_I1[i + 1]].any() != unseen_S[sample]

        assert [failure.sample for failure in rows.failures] == np.flatnonzero(unread_S).tolist()
        visual = np.zeros(256, bool)
        for start, count in zip(plan.start_I, plan.tokens_I, strict=True):
            visual[start : start + count] = True
        assert np.array_equal(rows.tokens[0] == tokenizer.image_id, visual)
        for start, length, unread in zip(plan.start_S, plan.length_S, unread_S, strict=True):
            assert rows.trained[0, start : start + length].any() != unread
        images.release()
    reader.close()


def test_what_the_checksum_cannot_see(damaged, tokenizer, monkeypatch):
    """Damage told by decoding, where checksums are those of the damaged bytes; and a limit lower than the index's."""
    corpus, plan = damaged
    monkeypatch.setattr(jobs, "zlib", SimpleNamespace(crc32=lambda data: 0))
    index = corpus.index(0)
    trusting = SimpleNamespace(samples=index.samples.copy(), media=index.media.copy(), format="turns", prompt=None)
    trusting.samples["text_crc"] = trusting.media["crc"] = 0
    monkeypatch.setattr(corpus, "index", lambda shard: trusting)
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0)
    images, rows = reader.read(plan, range(len(plan.tokens_I)), [0])
    reasons = {int(plan.index_S[failure.sample]): failure.reason for failure in images.failures}
    assert reasons.pop(1) == "unreadable image" and reasons in ({}, {2: "unreadable video"})
    reasons = {int(plan.index_S[failure.sample]): failure.reason for failure in rows.failures}
    assert reasons == {0: "bad json", 3: "changed"}

    tight = ShardReader(corpus, tokenizer, VisionSpec(), 100, 0)
    failures = tight.read(plan, range(len(plan.tokens_I)), [])[0].failures
    whole = [failure.sentence for failure in failures if plan.index_S[failure.sample] in (0, 3, 4)]
    assert whole and all("the limit is 100 pixels" in sentence for sentence in whole)


def test_a_shard_that_is_gone(make_shard, tokenizer):
    shard, _ = make_shard([("a.0.png", make_shard.image()), ("a.json", make_shard.json("<image>hi", "yes"))])
    corpus = open_corpus([shard], tokenizer)
    config = stream_config(seq_length=64, rows_per_step=1, seed=0, vision=VisionSpec(4, 64))
    plan = Stream(corpus, config, tokenizer.stamp_lengths).next_step()
    Path(shard).unlink()
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0)
    for batch in reader.read(plan, range(len(plan.tokens_I)), [0]):
        assert {failure.reason for failure in batch.failures} == {"unreadable shard"}
        assert all(shard in failure.sentence for failure in batch.failures)


def test_a_long_video_is_read_in_ranges(opened, plan, monkeypatch):
    _, corpus, tokenizer = opened
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0)
    frames = np.flatnonzero(plan.time_I >= 0)
    whole = reader.read(plan, frames, [])[0]
    monkeypatch.setattr(jobs, "WHOLE_VIDEO_BYTES", 0)
    sections = []
    monkeypatch.setattr(jobs, "Section", lambda *where: sections.append(Section(*where)) or sections[-1])
    ranges = reader.read(plan, frames, [])[0]
    assert np.array_equal(whole.patches_NP, ranges.patches_NP)
    assert ranges.bytes_read == sum(section.bytes_read for section in sections) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def test_memory_is_given_back_and_used_again(opened, plan):
    _, corpus, tokenizer = opened
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0, slots=2)
    first = reader.read(plan, range(2), [])[0]
    held = first.patches_NP.copy()
    second = reader.read(plan, range(2, 4), [])[0]
    assert np.array_equal(first.patches_NP, held)
    with pytest.raises(RuntimeError, match=r"all 2 batches .* are in use: release\(\)"):
        reader.read(plan, range(2), [])
    first.release()
    first.release()  # a second time changes nothing
    third = reader.read(plan, range(2), [])[0]
    assert third.patches_NP.ctypes.data == first.patches_NP.ctypes.data
    with pytest.raises(RuntimeError, match="in use"):
        reader.read(plan, range(2), [])
    view = second.patches_NP[3:]
    del second
    with pytest.raises(RuntimeError, match="in use"):  # somebody still looks at it
        reader.read(plan, range(2), [])
    del view
    reader.read(plan, range(2), [])


def test_memory_is_announced_before_use_and_before_it_goes(opened, plan, monkeypatch):
    monkeypatch.setattr(slots, "SLOT_STEP", 4096)
    _, corpus, tokenizer = opened
    live, log = {}, []

    def on_new(buffer):
        live[buffer.ctypes.data] = len(buffer)
        log.append("new")

    def on_old(buffer):
        assert live.pop(buffer.ctypes.data) == len(buffer)
        log.append("old")

    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0, on_new_buffer=on_new, on_old_buffer=on_old)
    for ids in (range(1), range(1), range(9), range(1)):
        images = reader.read(plan, ids, [])[0]
        address, size = images.patches_NP.ctypes.data, images.patches_NP.nbytes
        assert any(start <= address and address + size <= start + length for start, length in live.items())
        images.release()
    assert log == ["new", "old", "new"]  # one memory, replaced by a larger one
    reader.close()
    reader.close()
    assert not live and log[-1] == "old"


def test_memory_that_cannot_be_announced_is_not_lost(opened, plan):
    _, corpus, tokenizer = opened
    fails = [MemoryError("no more can be pinned")]

    def on_new(buffer):
        if fails:
            raise fails.pop()

    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0, slots=1, on_new_buffer=on_new)
    with pytest.raises(MemoryError, match="pinned"):
        reader.read(plan, range(2), [])
    assert not reader.read(plan, range(2), [])[0].failures


def test_reader_settings_name_their_key(opened):
    with pytest.raises(ValueError, match="data.workers=-1"):
        ShardReader(opened[1], opened[2], VisionSpec(), 100, -1)


def test_webdataset_reads_the_same_samples(corpus, indexes):
    """The shards are plain webdataset shards, and the index lists what webdataset yields, in its order."""
    webdataset = pytest.importorskip("webdataset")
    index = next(index for index in indexes if "ground" in index.shard)
    seen = list(webdataset.WebDataset(index.shard, shardshuffle=False, empty_check=False))
    assert len(seen) == index.n_samples
    raw = Path(index.shard).read_bytes()
    for sample, record in zip(seen, index.samples, strict=True):
        assert sample["json"] == raw[record["text_offset"] :][: record["text_size"]]
        image = sample.get("0.png") or sample["0.jpg"]
        medium = index.media[record["first_media"]]
        assert decode_image(image, 1 << 20).shape[:2] == (medium["height"], medium["width"])
