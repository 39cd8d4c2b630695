"""A tiny corpus made once, and a way to write shards of chosen content."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from data.index import build_index, expand_shards, load_index
from data.text import Tokenizer, build_byte_tokenizer
from launch.make_shards import make_shards


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folder of a corpus with 60 training samples a task."""
    out = tmp_path_factory.mktemp("corpus") / "toy"
    assert make_shards(out, samples=60)
    return out


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_byte_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture(scope="session")
def indexes(corpus, tokenizer):
    shards = expand_shards([f"{corpus}/train/*.tar"])
    return [load_index(shard, Tokenizer(corpus / "tokenizer.json").sha256) for shard in shards]


def encoded_image(height=30, width=40, kind="PNG", **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def sample_json(*texts, domain="read") -> bytes:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "text": text} for i, text in enumerate(texts)]
    return json.dumps({"turns": turns, "domain": domain}).encode()


def write_tar(path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def make_shard(tmp_path, tokenizer):
    """make_shard(members, name) -> (path, report), indexed with the byte tokenizer."""

    def make(members, name="shard-0000.tar"):
        path = write_tar(tmp_path / name, members)
        return str(path), build_index(path, tokenizer)

    make.image, make.json = encoded_image, sample_json
    return make
