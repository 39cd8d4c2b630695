"""Files damaged at random: each is used, refused with a ValueError, or left out and counted, and nothing else happens.

The examples are derived from the tests' names, so a run is the same run every time.
"""

import io
import json
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tandem.data.media.audio import decode_audio
from tandem.data.media.image import ImageError, decode_image, image_size
from tandem.data.media.text import parse_sample
from tandem.data.media.turns import SampleError
from tandem.data.media.video import VideoError, decode_frames, probe
from tandem.data.reading.jobs import WHOLE_VIDEO_BYTES
from tandem.data.shards.catalog import gather_catalog, open_catalog, write_catalog
from tandem.data.shards.index import load_index
from tandem.data.shards.indexing import build_index
from tests.data.conftest import encoded_image, encoded_video, sample_json
from tests.support import write_tar

MAX_PIXELS = 1 << 20
bounded = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damage(draw, size: int):
    """A function that damages a file of `size` bytes: bytes replaced, cut out, repeated, or the end cut off."""
    edits = draw(
        st.lists(
            st.tuples(
                st.sampled_from(["set", "set", "set", "drop", "repeat", "end"]),
                st.integers(0, size - 1),
                st.binary(min_size=1, max_size=8),
            ),
            min_size=1,
            max_size=6,
        )
    )

    def damaged(data: bytes) -> bytes:
        for kind, place, value in edits:
            place = min(place, len(data))
            if kind == "set":
                data = data[:place] + value + data[place + len(value) :]
            elif kind == "drop":
                data = data[:place] + data[place + len(value) :]
            elif kind == "repeat":
                data = data[:place] + value * 3 + data[place:]
            elif place > size // 2:
                data = data[:place]
        return data

    return damaged


IMAGES = {kind: encoded_image(60, 80, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}
VIDEOS = {codec: encoded_video(2, 5, 32, 48, codec) for codec in ("libx264", "mpeg4")}


@pytest.mark.parametrize("kind", IMAGES)
def test_images(kind):
    whole = IMAGES[kind]

    @bounded
    @given(damage(len(whole)))
    def check(damaged):
        data = damaged(whole)
        for read in (
            lambda: image_size(io.BytesIO(data), MAX_PIXELS),
            lambda: decode_image(data, MAX_PIXELS, (28, 28)),
        ):
            try:
                read()
            except ImageError as error:
                assert len(str(error)) < 400

    check()


@pytest.mark.parametrize("codec", VIDEOS)
def test_videos(codec):
    whole = VIDEOS[codec]
    assert len(whole) < WHOLE_VIDEO_BYTES

    @bounded
    @given(damage(len(whole)))
    def check(damaged):
        data = damaged(whole)
        try:
            found = probe(io.BytesIO(data))
            assert found.height * found.width <= 1 << 26
        except VideoError as error:
            assert len(str(error)) < 400
        try:
            frames = list(decode_frames(io.BytesIO(data), [0, 900, 1800], MAX_PIXELS))
            assert len(frames) == 3
        except VideoError as error:
            assert len(str(error)) < 400
        try:
            decode_audio(io.BytesIO(data))
        except VideoError as error:
            assert len(str(error)) < 400

    check()


@bounded
@given(st.one_of(st.binary(max_size=200), st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists)))
def test_sample_json(value):
    data = value if isinstance(value, bytes) else json.dumps({"turns": value}).encode()
    try:
        assert "turns" in parse_sample(data, "the sample")
    except SampleError as error:
        assert error.reason == "bad json"


@bounded
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["role", "text", "stream", "time"]), inner),
        max_leaves=12,
    )
)
def test_turns(tokenizer, turns):
    try:
        tokenizer.encode_sample(turns, ("assistant",), ("image", "video"), "the sample")
    except SampleError as error:
        assert str(error).startswith("the sample")


@pytest.fixture(scope="module")
def shard(tokenizer, tmp_path_factory):
    """A small shard with an image and a video, and its bytes."""
    path = tmp_path_factory.mktemp("fuzz") / "a.tar"
    members = []
    for i in range(4):
        members += [(f"s{i}.json", sample_json("<image>what?", "that")), (f"s{i}.0.png", encoded_image())]
    members += [("v.json", sample_json("<video>what?", "that")), ("v.0.mp4", VIDEOS["libx264"])]
    write_tar(path, members)
    return path


def test_shards(shard, tokenizer, tmp_path):
    """What is left of a damaged tar is indexed; every sample of the index can be found again in the bytes."""
    whole = shard.read_bytes()
    path = tmp_path / "a.tar"

    @bounded
    @given(damage(len(whole)))
    def check(damaged):
        path.write_bytes(damaged(whole))
        try:
            report = build_index(path, tokenizer)
        except ValueError as error:
            assert "a.tar" in str(error)
            return
        index, size = load_index(path, tokenizer.sha256), path.stat().st_size
        samples, media = np.asarray(index.samples), np.asarray(index.media)
        assert len(samples) == report.samples <= 5 + 6
        assert (samples["text_offset"] + samples["text_size"] <= size).all()
        assert (media["offset"] + media["size"] <= size).all()
        assert (media["height"].astype(np.int64) * media["width"] <= 1 << 27).all()

    check()


@pytest.mark.parametrize("suffix", [".index", ".catalog"])
def test_indexes_and_catalogs(suffix, shard, tokenizer, tmp_path):
    """A damaged one is refused, or says the same as the whole one."""
    path = tmp_path / "a.tar"
    shutil.copy(shard, path)
    build_index(path, tokenizer)
    catalog = tmp_path / "a.catalog"
    write_catalog(catalog, gather_catalog([str(path)], tokenizer.sha256))
    target = tmp_path / ("a.catalog" if suffix == ".catalog" else "a.tar.index")
    whole, truth = target.read_bytes(), load_index(path, tokenizer.sha256).samples.tobytes()

    @bounded
    @given(damage(len(whole)))
    def check(damaged):
        target.write_bytes(damaged(whole))
        try:
            if suffix == ".catalog":
                index = open_catalog([str(catalog)], tokenizer.sha256).index(0)
            else:
                index = load_index(path, tokenizer.sha256)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 600
            return
        assert index.samples.tobytes() == truth

    check()
