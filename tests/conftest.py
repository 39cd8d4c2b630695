"""Session-wide fixtures."""

import pytest

from tests.support import make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A tiny corpus of real pictures, see tests/support.py."""
    return make_corpus(tmp_path_factory.mktemp("corpus") / "toy")
