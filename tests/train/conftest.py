"""A world of one in the test process: Megatron-core's models want process groups even where nobody else is there."""

import functools

import pytest
import torch.distributed as dist

from parallel.grid import build_grid, destroy_grid
from parallel.layout import Layout
from tests.train.toys import CPU, toy_llm


@pytest.fixture(scope="module")
def build_llm():
    """build_llm(kind, recompute=False) -> ToyLLM."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    layout = Layout(world=1)
    build_grid(layout, CPU, seed=0)
    yield functools.partial(toy_llm, layout=layout)
    destroy_grid()
    dist.destroy_process_group()
