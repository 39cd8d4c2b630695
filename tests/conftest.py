"""Fixtures for all tests, which run on the CPU even where there is a GPU: worlds of up to eight gloo ranks anywhere."""

import os

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from tandem.data.media.text import Tokenizer, build_byte_tokenizer
from tests.support import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tiny corpus of real pictures, see tests/support.py."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "toy")


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    build_byte_tokenizer(path)
    return Tokenizer(path)


@pytest.fixture
def configured():
    """configured(mode): sets the mode of compilation, by a backend that needs no compiler, until the test ends."""
    from tandem.parallel.kernels import compilation  # brings torch, which tests of data alone do without

    yield lambda mode: compilation.configure(mode, "aot_eager")
    compilation.configure("auto", "aot_eager")
