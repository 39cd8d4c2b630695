"""Megatron-core's models want process groups even where nobody else is there."""

import functools

import pytest
import torch

from benchmarks.workloads.language import World
from tests.train.toys import toy_llm


@pytest.fixture(scope="module")
def build_llm():
    """build_llm(kind, recompute="none") -> ToyLLM."""
    with World(torch.device("cpu")) as world:
        yield functools.partial(toy_llm, layout=world.layout)
