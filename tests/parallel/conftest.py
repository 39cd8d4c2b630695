"""Megatron-core's modules want process groups even where nobody else is there."""

import pytest
import torch

from benchmarks.workloads.language import World


@pytest.fixture(scope="module")
def alone():
    """The layout of a world of one, whose groups stand."""
    with World(torch.device("cpu")) as world:
        yield world.layout
