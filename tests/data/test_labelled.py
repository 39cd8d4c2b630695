"""Labelled samples from folders and shards: what is read, and how what cannot be read is told."""

import io
import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from tandem.data.media.audio import sound_grid, spectrogram
from tandem.data.media.image import decode_image, to_patches
from tandem.data.media.video import decode_frames
from tandem.data.reading.labelled import Labelled, Sizes
from tandem.data.vision import VisionSpec
from tests.data.videos import make_video
from tests.support import write_tar

SIZES = Sizes(VisionSpec(4, 64), 1 << 20, fps=2.0, video_budget=12, video_levels=(4, 2), audio_seconds=0.0)


def picture(height=56, width=84, seed=0, kind="PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def said(*texts, **more) -> bytes:
    turns = [{"role": "user", "text": "<image>What?"}, *({"role": "assistant", "text": text} for text in texts)]
    return json.dumps({"turns": turns} | more).encode()


def read(*places, sizes=SIZES, threads=2):
    data = Labelled([str(place) for place in places], sizes, threads)
    return list(data), data


@pytest.fixture
def folder(tmp_path):
    """Two classes, one of them with a folder in it, and a file that is no image."""
    for name, seed in (("cat/b.png", 1), ("cat/deeper/a.JPG", 2), ("dog/c.webp", 3)):
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(seed=seed, kind={"png": "PNG", "JPG": "JPEG", "webp": "WEBP"}[name.split(".")[1]]))
    (tmp_path / "pets/cat/notes.txt").write_text("no image")
    return tmp_path / "pets"


def test_a_folder_is_read_in_order_with_its_classes(folder):
    samples, data = read(folder)
    assert [(sample.name, sample.label) for sample in samples] == [
        (f"{folder}/cat/b.png", "cat"),
        (f"{folder}/cat/deeper/a.JPG", "cat"),
        (f"{folder}/dog/c.webp", "dog"),
    ]
    assert data.skipped == [] and all(sample.captions == () for sample in samples)
    again, _ = read(folder, threads=1)
    assert all((a.images.patches_NP == b.images.patches_NP).all() for a, b in zip(samples, again, strict=True))


def test_images_become_the_patches_of_training(folder):
    (sample, *_), _ = read(folder)
    down, across = SIZES.vision.views(56, 84).tolist()
    pixels = decode_image(picture(seed=1), SIZES.max_pixels, (14 * down, 14 * across))
    assert sample.images.grid_hw_I2.tolist() == [[down, across]] == [[4, 6]]
    assert (sample.images.patches_NP == to_patches(pixels, (down, across), SIZES.vision)).all()


def test_shards_give_labels_and_captions(tmp_path):
    members = [
        ("a.json", said("a cat", "meow", label="cat")),
        ("a.0.png", picture()),
        ("a.1.png", picture(28, 28)),
        ("b.json", b'{"label": 7}'),
        ("b.0.jpg", picture(kind="JPEG")),
        ("c.json", said("", "  of a dog")),
        ("c.0.png", picture()),
        ("d.json", b'{"label": "lone \\ud800"}'),
        ("d.0.png", picture()),
    ]
    samples, data = read(write_tar(tmp_path / "some.tar", members))
    assert [(sample.label, sample.captions) for sample in samples] == [
        ("cat", ("a cat", "meow")),
        ("7", ()),
        (None, (None, "  of a dog")),
        ("lone \\ud800", ()),
    ]
    assert samples[0].images.grid_hw_I2.tolist() == [[4, 6], [2, 2]]
    assert data.skipped == []
    assert samples[2].content == samples[3].content and len({sample.content for sample in samples}) == 3
    folder_of_shards, _ = read(tmp_path)
    assert [sample.label for sample in folder_of_shards] == ["cat", "7", None, "lone \\ud800"]


def test_videos_give_frames_and_sound(tmp_path):
    loud, mute = make_video(frames=20, tone=440), make_video(frames=20)
    members = [("a.json", said("up", "a tone")), ("a.0.mp4", loud), ("b.json", said("up")), ("b.0.mp4", mute)]
    shard = write_tar(tmp_path / "clips.tar", members)
    (heard, unheard), data = read(shard, sizes=replace(SIZES, audio_seconds=1.0))
    times = [0, 500, 1000, 1500]
    frames = [to_patches(pixels, (2, 2), SIZES.vision) for pixels in decode_frames(io.BytesIO(loud), times)]
    assert heard.images.grid_hw_I2.tolist() == [[2, 2]] * 4, "two tokens a frame at most, of a budget of twelve"
    assert (heard.images.patches_NP == np.concatenate(frames)).all()
    grid = sound_grid(2000, 1.0, SIZES.vision)
    assert heard.sound.grid_hw_I2.tolist() == [grid.tolist()]
    pixels = spectrogram(io.BytesIO(loud), *SIZES.vision.pixels_hw(grid))
    assert (heard.sound.patches_NP == SIZES.vision.cut(pixels)).all()
    assert unheard.sound is None and "no audio track" in unheard.unheard
    assert [name.endswith("sample b") for name, _ in data.unheard] == [True] and data.skipped == []
    deaf, data = read(shard)
    assert [sample.sound for sample in deaf] == [None, None] and data.unheard == []


def test_a_video_whose_sound_breaks_is_still_seen(tmp_path, monkeypatch):
    """Whatever goes wrong with the sound, FFmpeg's errors or others."""

    class Broken:
        def __init__(self, **_):
            pass

        def resample(self, frame):
            raise ValueError("Frame does not match AudioResampler setup.")

    monkeypatch.setattr(av, "AudioResampler", Broken)
    shard = write_tar(tmp_path / "clip.tar", [("a.json", said("up")), ("a.0.mp4", make_video(frames=20, tone=440))])
    (seen,), data = read(shard, sizes=replace(SIZES, audio_seconds=1.0))
    assert seen.sound is None and "the audio cannot be decoded: Frame does not match" in seen.unheard
    assert len(data.unheard) == 1 and data.skipped == []


def test_what_is_damaged_is_named_and_passed_over(tmp_path, folder):
    (folder / "dog/broken.png").write_bytes(picture()[:60])
    members = [
        ("good.json", said("a cat")),
        ("good.0.png", picture()),
        ("torn.json", said("a cat")),
        ("torn.0.png", picture()[:200]),
        ("odd.json", b'{"label": true}'),
        ("odd.0.png", picture()),
        ("mute.json", b'{"label": ""}'),
        ("mute.0.png", picture()),
        ("list.json", b"[1]"),
        ("list.0.png", picture()),
        ("bad.json", b"{"),
        ("bad.0.png", picture()),
        ("text.json", said("no image")),
        ("turns.json", b'{"turns": 3}'),
        ("turns.0.png", picture()),
        ("none.0.png", picture()),
        ("last.json", said("a cat")),
        ("last.0.png", picture()),
    ]
    shard = write_tar(tmp_path / "some.tar", members)
    whole = Path(shard).read_bytes()
    cut = whole.rindex(picture()[:16]) + 100
    (tmp_path / "cut.tar").write_bytes(whole[:cut])
    (tmp_path / "no.tar").write_bytes(b"nothing like a tar" * 100)
    samples, data = read(folder, tmp_path / "cut.tar", tmp_path / "no.tar")
    assert len(samples) == 4
    why = {name.removeprefix(f"{tmp_path}/"): why for name, why in data.skipped}
    words = {
        "pets/dog/broken.png": "cannot be",
        "cut.tar: sample torn": "cannot be decoded",
        "cut.tar: sample odd": "neither a text nor a whole number",
        "cut.tar: sample mute": "neither a text nor a whole number",
        "cut.tar: sample list": "not an object",
        "cut.tar: sample bad": "cannot be parsed",
        "cut.tar: sample text": "no image and no video",
        "cut.tar: sample turns": "no list of turns",
        "cut.tar: sample none": "no .json member",
        "cut.tar: sample last": "cut off by the end",
        "cut.tar": "truncated",
        "no.tar": "not an uncompressed tar",
    }
    assert set(why) == set(words)
    assert {name: word for name, word in words.items() if word not in why[name]} == {}


def test_nothing_to_read_is_an_error(tmp_path, folder):
    for path in folder.rglob("*.*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the samples in .*pets can be used; the first: .*b.png"):
        read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither shards"):
        read(tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        read(tmp_path / "absent.tar")
