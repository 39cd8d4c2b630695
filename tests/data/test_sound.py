"""Sound in plans and batches: where it is planned, that text stays as it is, what is read, and what cannot be heard."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from tandem.data.media.audio import sound_grid, spectrogram
from tandem.data.media.image import to_patches
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.plan import AUDIO
from tandem.data.planning.stream import Stream
from tandem.data.planning.view import NO_SOUND, REASONS, SOUND_CUT
from tandem.data.reading import jobs
from tandem.data.reading.reader import ShardReader
from tandem.data.shards.storage import Section, open_range
from tandem.data.vision import VisionSpec
from tests.data.conftest import sound_of
from tests.data.synthetic import Medium, MemoryShard, Sample, corpus_of, stamp_lengths, stream_config
from tests.data.test_view import samples, view_of
from tests.data.videos import make_video

CONFIG = stream_config(
    seq_length=512, rows_per_step=4, seed=3, vision=VisionSpec(4, 256), rows="samples", audio_seconds=3
)

# ---------------------------------------------------------------------------------------------------------------------
# Planning


def heard(made: list[Sample]) -> list[Sample]:
    """The same samples, whose videos have sound."""
    return [
        replace(sample, media=tuple(replace(medium, audio=medium.duration_ms > 0) for medium in sample.media))
        for sample in made
    ]


@settings(max_examples=60, deadline=None)
@given(samples())
def test_sound_changes_no_length_and_no_place(made):
    made = heard(made)
    without, view = (view_of(made, seq_length=1 << 20, audio_seconds=seconds) for seconds in (0, 2.5))
    sound_I = view.time_I == AUDIO
    assert np.array_equal(without.length_N, view.length_N) and not view.cut_N.any()
    for name in ("media_I", "time_I", "grid_hw_I2", "tokens_I", "offset_I"):
        assert np.array_equal(getattr(without, name), getattr(view, name)[~sound_I])
    videos = [medium for sample in made for medium in sample.media if medium.duration_ms]
    grids = [sound_grid(one.duration_ms, 2.5, VisionSpec()).tolist() for one in videos]
    assert view.grid_hw_I2[sound_I].tolist() == grids
    assert not view.tokens_I[sound_I].any()
    behind = np.flatnonzero(sound_I) - 1
    assert (view.time_I[behind] >= 0).all() and np.array_equal(view.media_I[behind], view.media_I[sound_I])
    assert np.array_equal(view.offset_I[sound_I], (view.offset_I + view.tokens_I + 1)[behind])
    assert (np.diff(view.offset_I)[np.diff(view.media_I) == 0] > 0).all()
    for n, sample in enumerate(made):
        deaf = not any(medium.duration_ms for medium in sample.media)
        assert REASONS[view.refused_N[n]] == (NO_SOUND if deaf else "")


@settings(max_examples=60, deadline=None)
@given(samples())
def test_a_cut_sample_keeps_its_sound_or_is_refused(made):
    made = heard(made)
    without, view = (view_of(made, seq_length=60, too_long="cut", audio_seconds=seconds) for seconds in (0, 1))
    for n, sample in enumerate(made):
        mine, before = (
            slice(int(one.first_image_N[n]), int(one.first_image_N[n] + one.images_N[n])) for one in (view, without)
        )
        sounds, videos = (view.time_I[mine] == AUDIO).sum(), sum(medium.duration_ms > 0 for medium in sample.media)
        if not videos:
            assert REASONS[view.refused_N[n]] == NO_SOUND
        elif without.refused_N[n]:
            assert view.refused_N[n] == without.refused_N[n]
        else:
            assert REASONS[view.refused_N[n]] == (SOUND_CUT if sounds < videos else "")
            kept = view.time_I[mine][view.time_I[mine] != AUDIO]
            assert np.array_equal(kept, without.time_I[before])
        if view.refused_N[n] == 0:
            assert (view.length_N[n], view.cut_N[n]) == (without.length_N[n], without.cut_N[n])


def test_samples_without_a_sound_track_are_refused_and_counted():
    with_sound, mute, still = Medium(1, duration_ms=900, audio=True), Medium(1, duration_ms=900), Medium(2)
    made = [Sample(9, (with_sound,)), Sample(9, (mute,)), Sample(9, (with_sound, mute)), Sample(9, (still,)), Sample(9)]
    corpus = corpus_of([MemoryShard.of(made)])
    stream = Stream(corpus, replace(CONFIG, block_samples=5), stamp_lengths)
    plan = stream.next_step()
    assert set(plan.index_S.tolist()) == {0} and stream.samples_per_epoch == 1
    assert stream.refused == {"samples without a sound track": 16}
    assert plan.time_I.tolist() == [0, AUDIO] * 4 and plan.tokens_I.tolist() == [4, 0] * 4
    assert set(Stream(corpus, replace(CONFIG, audio_seconds=0), stamp_lengths).next_step().time_I.tolist()) <= {0, -1}
    with pytest.raises(ValueError, match="without a sound track: data.audio_seconds is 3, .* of data.sources.a "):
        Stream(corpus_of([MemoryShard.of(made[1:])]), CONFIG, stamp_lengths)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"audio_seconds": -1}, "data.audio_seconds=-1: must be a number of seconds"),
        ({"audio_seconds": float("inf")}, "data.audio_seconds=inf: must be a number of seconds"),
        ({"audio_seconds": True}, "data.audio_seconds=True: must be a number of seconds"),
        (
            {"audio_seconds": 5},
            "data.audio_seconds is 5, .* pictures of sound of 288 patches, above data.max_patches, 256",
        ),
    ],
)
def test_impossible_settings_name_their_key(change, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **change)


def test_the_length_heard_decides_the_order():
    corpus = corpus_of([MemoryShard.of([Sample(9, (Medium(1, duration_ms=900, audio=True),))])])
    with pytest.raises(ValueError, match="another stream.*data.audio_seconds"):
        Stream(corpus, CONFIG, stamp_lengths).load_state(
            Stream(corpus, replace(CONFIG, audio_seconds=2), stamp_lengths).state()
        )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def opened(shard, tokenizer, **changes):
    """(corpus, plan of one step) of a shard, every sample once."""
    corpus = Corpus.open([SourceSettings("main", (shard,), fps=2)], tokenizer.sha256)
    samples = corpus.index(0).n_samples
    config = replace(CONFIG, **{"rows_per_step": samples, "block_samples": samples} | changes)
    plan = Stream(corpus, config, tokenizer.stamp_lengths).next_step()
    return corpus, plan


@pytest.fixture
def clips(make_shard):
    """A shard of five videos with sound, of 1 to 3 seconds, one of them beside an image."""
    members = []
    for n in range(5):
        media = [("mp4", make_shard.video(1 + n % 3, sound_S=sound_of(200 + 100 * n, seconds=0.6 + n / 2)))]
        media += [("png", make_shard.image(56, 56))] * (n == 3)
        members += [(f"s{n}.{number}.{kind}", data) for number, (kind, data) in enumerate(media)]
        marks = "<video>" + "<image>" * (n == 3)
        members.append((f"s{n}.json", make_shard.json(marks, f"clip {n}", "What is heard?", f"tone {n}")))
    return make_shard(members)[0]


def patches_of(images, plan, ids) -> dict[int, np.ndarray]:
    border = np.append(0, np.cumsum(plan.grid_hw_I2[ids].prod(1)))
    return {int(i): images.patches_NP[border[n] : border[n + 1]] for n, i in enumerate(ids)}


@pytest.mark.parametrize("processes, whole", [(0, True), (1, True), (0, False)], ids=["here", "worker", "ranges"])
def test_sounds_are_those_of_the_shard_and_no_byte_is_read_twice(clips, tokenizer, processes, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(jobs, "WHOLE_VIDEO_BYTES", 0)
    corpus, plan = opened(clips, tokenizer)
    reader, media, shard = (
        ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, processes),
        corpus.index(0).media,
        Path(clips),
    )
    ids, sound_I = np.random.default_rng(0).permutation(len(plan.time_I)), plan.time_I == AUDIO
    assert sound_I.sum() == 5
    both = reader.read(plan, ids, [])[0]
    assert not both.failures
    for i, patches in patches_of(both, plan, ids).items():
        record, (down, across) = media[plan.image_media_I[i]], plan.grid_hw_I2[i].tolist()
        if sound_I[i]:
            encoded = shard.read_bytes()[record["offset"] :][: record["size"]]
            assert (down, across) == (8, sound_grid(int(record["duration_ms"]), 3, VisionSpec())[1])
            picture = spectrogram(io.BytesIO(encoded), 112, 14 * across)
            assert picture[: 8 * 14].any() and np.array_equal(patches, to_patches(picture, (8, across), VisionSpec()))
    sizes = sum(media["size"].tolist())
    assert both.bytes_read == sizes if whole else both.bytes_read <= sizes
    frames, sounds = (reader.read(plan, np.flatnonzero(mask), [])[0] for mask in (~sound_I, sound_I))
    for part, mask in ((frames, ~sound_I), (sounds, sound_I)):
        for i, patches in patches_of(part, plan, np.flatnonzero(mask)).items():
            assert np.array_equal(patches, patches_of(both, plan, ids)[i])
    reader.close()


def test_text_is_the_same_with_sound_and_without(clips, tokenizer):
    rows = []
    for seconds in (0, 3):
        corpus, plan = opened(clips, tokenizer, audio_seconds=seconds)
        read = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0).read(plan, [], range(5))[1]
        assert not read.failures
        order = np.argsort(plan.index_S)
        rows.append((read.tokens[order], read.trained[order]))
        assert tokenizer.decode(read.tokens[order[3]][read.trained[order[3]]]) == "clip 3<eos>tone 3<eos>"
    assert all(np.array_equal(one, other) for one, other in zip(*rows, strict=True))


def test_a_sample_twice_in_a_step_is_heard_twice(clips, tokenizer):
    corpus, plan = opened(clips, tokenizer)
    ids = np.repeat(np.flatnonzero(plan.time_I == AUDIO), 2)
    images = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0).read(plan, ids, [])[0]
    twice = images.patches_NP.reshape(-1, 588)
    border = np.append(0, np.cumsum(plan.grid_hw_I2[ids].prod(1)))
    for n in range(0, len(ids), 2):
        one, other = (twice[border[k] : border[k + 1]] for k in (n, n + 1))
        assert one.any() and np.array_equal(one, other)


@pytest.mark.parametrize("kind", ["mov", "mkv"])
def test_of_a_large_video_frames_read_nothing_anew_that_its_sound_has_read(make_shard, tokenizer, kind, monkeypatch):
    clip = make_video(60, size=(480, 640), codec="mjpeg", kind=kind, tone=440)
    shard, _ = make_shard([(f"s.0.{kind}", clip), ("s.json", make_shard.json("<video>", "x"))])
    corpus, plan = opened(shard, tokenizer, audio_seconds=1, seq_length=2048)
    monkeypatch.setattr(jobs, "WHOLE_VIDEO_BYTES", 0)
    reader, sound_I = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0), plan.time_I == AUDIO
    read = [reader.read(plan, np.flatnonzero(mask), [])[0] for mask in (sound_I, ~sound_I, sound_I | ~sound_I)]
    assert not any(batch.failures for batch in read)
    sound, frames, both = (batch.bytes_read for batch in read)
    assert sound < 0.4 * len(clip) and both <= frames


def test_kept_bytes_are_not_read_again(tmp_path):
    (tmp_path / "file").write_bytes(bytes(range(200)))
    section = Section(open_range(str(tmp_path / "file")), 10, 100)
    section.keep = True
    section.seek(20), section.read(10), section.seek(50), section.read(5), section.seek(15)
    assert section.read(20) == bytes(range(25, 30)) and section.read(20) == bytes(range(30, 40))
    section.keep = False
    section.seek(0)
    whole = b""
    while part := section.read(64):
        whole += part
    assert whole == bytes(range(10, 110)) and section.bytes_read == 100
    section.seek(90), section.read(64)
    assert section.bytes_read == 110  # read after keeping ended


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be heard or seen


def test_bad_sound_and_short_videos_are_failures_of_their_samples_alone(make_shard, tokenizer):
    """Silent, empty and damaged sound, a video shorter than its header says, and two sound samples between them."""
    good = make_shard.video(2, sound_S=sound_of(440, 550))
    silent = make_shard.video(2, sound_S=np.zeros(32_000))
    empty = make_shard.video(2, sound_S=np.zeros(64), sound_codec="pcm_s16le")
    damaged = bytearray(good)
    first, end = good.index(b"mdat") + 8, good.index(b"moov")
    damaged[(first + 3 * end) // 4 : end - 8] = bytes(end - 8 - (first + 3 * end) // 4)
    long = make_video(40, kind="mkv", tone=440)
    clips = [good, silent, empty, bytes(damaged), long[: len(long) // 3], good]
    members = []
    for n, clip in enumerate(clips):
        members += [(f"s{n}.0.{'mkv' if n == 4 else 'mp4'}", clip), (f"s{n}.json", make_shard.json("<video>", "x"))]
    shard, report = make_shard(members)
    assert report.samples == 6 and not report.skipped
    corpus, plan = opened(shard, tokenizer)
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0)
    images, rows = reader.read(plan, range(len(plan.time_I)), range(6))
    reasons = {int(plan.index_S[failure.sample]): failure for failure in images.failures}
    assert {n: failure.reason for n, failure in reasons.items()} == {
        1: "no sound",
        2: "no sound",
        3: "no sound",
        4: "unreadable video",
    }
    place = corpus.index(0).media["offset"][1]
    assert reasons[1].sentence == (
        f"video at byte {place} of {shard}: the audio track is silent for the 2.1 seconds that are heard of it"
    )
    assert "less than one window of 25 ms" in reasons[2].sentence and "\n" not in reasons[3].sentence
    for i, patches in patches_of(images, plan, range(len(plan.time_I))).items():
        assert patches.any() == (int(plan.index_S[plan.image_sample_I[i]]) not in reasons)
    assert not rows.failures and len(images.patches_NP) == plan.grid_hw_I2.prod(1).sum()


def test_a_clip_of_no_length_is_left_out_while_indexing(make_shard):
    clips = {"none": make_video(0), "good": make_shard.video(1, sound_S=sound_of(440))}
    members = []
    for name, clip in clips.items():
        members += [(f"{name}.0.mp4", clip), (f"{name}.json", make_shard.json("<video>", "x"))]
    _, report = make_shard(members)
    assert report.samples == 1 and report.skipped == {"unreadable video": 1}


def test_images_of_one_pixel_by_five_thousand_are_seen(make_shard, tokenizer):
    members = []
    for n in range(200):  # so many that a plan of one step does not run through thousands of epochs
        size = (1, 5000) if n % 2 else (5000, 1)
        members += [(f"s{n:03}.0.png", make_shard.image(*size)), (f"s{n:03}.json", make_shard.json("<image>", "line"))]
    shard, report = make_shard(members)
    assert report.samples == 200
    corpus, plan = opened(shard, tokenizer, audio_seconds=0, rows_per_step=8)
    assert {tuple(grid) for grid in plan.grid_hw_I2.tolist()} == {(2, 128), (128, 2)} and set(plan.tokens_I) == {64}
    images, rows = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0).read(plan, range(8), range(8))
    assert not images.failures and not rows.failures
    assert all(np.ptp(patches) > 50 for patches in patches_of(images, plan, range(8)).values())
