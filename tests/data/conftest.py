"""The tiny corpus's indexes, and a way to write shards of chosen content."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from tandem.data.shards.catalog import expand_shards
from tandem.data.shards.index import load_index
from tandem.data.shards.indexing import build_index
from tandem.data.synthesis.videos import encode_clip
from tests.support import write_tar


@pytest.fixture(scope="session")
def indexes(corpus, tokenizer):
    """Index of every training shard of the corpus, whose tokenizer is the byte tokenizer too."""
    return [load_index(shard, tokenizer.sha256) for shard in expand_shards([f"{corpus}/train/*.tar"])]


@pytest.fixture(scope="session")
def video_index(corpus, tokenizer):
    """Index of the training shard of videos, some of them streamed."""
    return load_index(f"{corpus}/train/video-0000.tar", tokenizer.sha256)


def encoded_image(height=30, width=40, kind="PNG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def encoded_video(seconds=2, fps=5, height=30, width=40, codec="libx264", sound_S=None, sound_codec="aac") -> bytes:
    """An mp4 whose frame k is one grey of about 20 + 4 k, for as long as that is below 250."""
    grey = np.clip(20 + 4 * np.arange(seconds * fps), 0, 250).astype(np.uint8)
    frames = np.broadcast_to(grey[:, None, None, None], (len(grey), height, width, 3)).copy()
    return encode_clip(frames, fps, codec, sound_S, sound_codec)


def sound_of(*hertz: float, seconds: float = 1.0) -> np.ndarray:
    """Tones one after another, 16 kHz."""
    time_S = np.arange(int(16_000 * seconds)) / 16_000
    return np.concatenate([0.3 * np.sin(2 * np.pi * each * time_S) for each in hertz])


def sample_json(*texts, domain="read", entity=None, stream=()) -> bytes:
    """Turns of user and assistant by turns; `stream` is that of the first turn, as (seconds, role, text)."""
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "text": text} for i, text in enumerate(texts)]
    if stream:
        turns[0]["stream"] = [{"time": time, "role": role, "text": text} for time, role, text in stream]
    content = {"turns": turns, "domain": domain}
    return json.dumps(content if entity is None else content | {"entity": entity}).encode()


@pytest.fixture
def make_shard(tmp_path, tokenizer):
    """make_shard(members, name) -> (path, report), indexed with the byte tokenizer."""

    def make(members, name="shard-0000.tar"):
        path = write_tar(tmp_path / name, members)
        return path, build_index(path, tokenizer)

    make.image, make.video, make.json = encoded_image, encoded_video, sample_json
    return make
