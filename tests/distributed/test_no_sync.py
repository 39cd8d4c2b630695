"""A step waits for the device once, in `reduce_step_stats`: no other operation of it would stop the host on CUDA."""

import dataclasses
import itertools
import weakref
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tandem.parallel.comm.transfer import to_device
from tandem.parallel.runtime import cpu_backend
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.input.dataset import open_data
from tandem.train.tasks import find
from tests.distributed.runs import train_run
from tests.distributed.test_vision_stages import overrides as vision_overrides
from tests.distributed.world import run_world
from tests.support import corpus_overrides, settings
from tests.syncs import ForbidSyncs

WARM = 2  # steps: ZeRO-3 writes down the order of modules in its first ones
SMALL = ["train.seq_length=256", "train.global_batch_size=4", "data.max_patches=64"]
ALLOWED = (
    "parallel/hybrid_step.py:reduce_step_stats",  # the one place
    "parallel/kernels/experts.py:arrange",  # on a CPU; on CUDA `Grouped` takes counts of the device
    "torch/optim/optimizer.py:_get_value",  # Adam's count, a host tensor; on CUDA the fused update takes it as it is
    "zero/partition_parameters.py:__init__",  # ZeRO-3 in a world of one: "to" the device on which it is already
)
TENSOR_PARALLEL = (
    "tensor_parallel/layers.py:forward",  # a number written by a mask into embeddings: on CUDA that is `masked_fill_`,
    "pipeline_parallel/schedules.py:custom_backward",  # and so in its backward
    "tensor_parallel/random.py:fork",  # compares random states of the host
)


def settled_step(recipe: str, overrides: list[str], allowed: tuple[str, ...] = ALLOWED) -> bool:
    """One turn of the loop, as `train.loop` makes it, that must not wait; whether it updated."""
    config = settings(recipe, "logger.wandb=disabled", "optim.lr=1e-3", "optim.warmup_steps=0", *overrides)
    stage = stage_of(config)
    timer, batches = PhaseTimer(torch.device("cpu")), stage.steps(WARM + 1)
    arguments = {"timer": timer, "stop": False, "accept": lambda loss, norm: True}
    for _ in range(WARM):
        stage.step(next(batches)[1], **arguments)
    with ForbidSyncs(allowed=allowed) as waits:
        for kind in (cpu_backend._CUDA, cpu_backend._InOrder):  # streams, events and devices as Megatron-core sees them
            kind.synchronize = lambda *_: waits.note("synchronize")
        prepared, batch = next(batches)
        assert all(tensor.is_meta for tensor in tensors_of(to_device(batch, torch.device("meta"))))
        output = stage.step(batch, **arguments)
        prepared.release()
        stage.facts(prepared, output)
        timer.take()
    return output.applied and output.loss > 0


def tensors_of(value) -> Iterator[torch.Tensor]:
    """All tensors that a batch holds, in whatever."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        yield from itertools.chain.from_iterable(map(tensors_of, value))
    else:
        yield from tensors_of(list((value if isinstance(value, dict) else getattr(value, "__dict__", {})).values()))


def stage_of(config: Config):
    return find(config.task).trainer(
        config, check_config(config, dist.get_world_size()), torch.device("cpu"), open_data(config)
    )


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_hybrid_step(corpus, zero_stage):
    """Expert parallelism of one: with more, the ranks' dispatcher has to know how much it sends."""
    layout = [f"parallel.encoder.zero_stage={zero_stage}", "parallel.encoder.chunk_patches=128"]
    assert run_world(settled_step, 1, "stage2", [*SMALL, *corpus_overrides(corpus), *layout]) == [True]


def test_pipeline(corpus):
    layout = ["parallel.pp=2", "parallel.encoder.recompute=replay"]
    assert run_world(settled_step, 2, "stage2", [*SMALL, *corpus_overrides(corpus), *layout]) == [True] * 2


def test_tensor_parallelism(corpus):
    """Without experts, which are tensor-parallel too."""
    layout = ["parallel.tp=2", "model.llm.num_experts=0", "model.llm.ffn_width=96"]
    overrides = [*SMALL, *corpus_overrides(corpus), *layout]
    assert run_world(settled_step, 2, "stage2", overrides, ALLOWED + TENSOR_PARALLEL) == [True] * 2


@pytest.mark.parametrize("recipe", ["vit_contrastive", "vit_omni"])
def test_encoder_step(corpus, recipe):
    assert run_world(settled_step, 2, recipe, vision_overrides(corpus, recipe)) == [True] * 2


def test_masked_encoder_step(corpus, tmp_path):
    once = [*vision_overrides(corpus, "vit_contrastive"), "train.steps=1"]
    run_world(train_run, 1, "vit_contrastive", once, str(tmp_path))
    overrides = [*vision_overrides(corpus, "vit_mim"), f"objective.teacher={tmp_path}"]
    assert run_world(settled_step, 1, "vit_mim", overrides) == [True]


def batches_alive(overrides: list[str], run_dir: str) -> list[int]:
    """Batches that still lie on the device whenever a run has copied another one, as a run on CUDA copies them."""
    from tandem.train.input import device_prefetcher

    copies, seen = [], []

    class Copying(device_prefetcher.DevicePrefetcher):
        def __next__(self):
            staged, self._ahead = self._ahead or self._stage(next(self._prefetcher)), None
            ready = self._prefetcher.poll()
            self._ahead = self._stage(ready) if ready else None
            return staged

        def _stage(self, prepared):
            batch = dataclasses.replace(prepared.batch)  # another object, as a copy is
            copies.append(weakref.ref(batch))
            seen.append(sum(copy() is not None for copy in copies))
            return prepared, batch

    with mock.patch("tandem.train.tasks.language.DevicePrefetcher", Copying):
        train_run("stage1", overrides, run_dir)
    return seen


def test_two_batches_lie_on_the_device_at_once(corpus, tmp_path):
    overrides = [*corpus_overrides(corpus, "read-*"), *SMALL, "train.steps=6"]
    (seen,) = run_world(batches_alive, 1, overrides, str(tmp_path / "run"))
    assert len(seen) == 6 and max(seen) <= 2
