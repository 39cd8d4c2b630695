"""Optimizers on CUDA: the fused ones are chosen, agree with the CPU's, and nothing in a step waits for the device."""

import contextlib

import pytest
import torch
import torch.distributed as dist

from tandem.parallel.engines import optimizers
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import AdamSettings
from tests.distributed.test_encoder_engine import Tower

SIZES = ((64, 48), (1000,), (7, 11))


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def settings(name):
    return AdamSettings(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, name=name)


def train(name, device, steps=3, quiet=contextlib.nullcontext):
    """(flat weights, the optimizer) after steps on one shard of three parameters."""
    generator = torch.Generator().manual_seed(0)
    shard = torch.cat([torch.randn(size, generator=generator).flatten() for size in SIZES]).to(device).requires_grad_()
    optimizer = optimizers.build([{"params": [shard], "adapt": True}], settings(name), torch.device(device))
    optimizers.create_state(optimizer)
    if name == "lamb":
        runs = [optimizers.Run(0, 0, 3072), optimizers.Run(1, 3072, 1000), optimizers.Run(2, 4072, 77)]
        optimizer.place({shard: runs}, len(runs), dist.group.WORLD)
    for _ in range(steps):
        shard.grad = torch.randn(shard.numel(), generator=generator).to(device)
        with quiet():
            optimizer.step()
    return shard.detach().cpu(), optimizer


@contextlib.contextmanager
def no_waiting():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_adamw_is_fused_and_agrees_with_the_cpus():
    found, optimizer = train("adamw", "cuda", quiet=no_waiting)
    expected, _ = train("adamw", "cpu")
    assert optimizers.name_of(optimizer) in ("fused AdamW of torch", "fused AdamW of Apex")
    assert optimizers.steps_of(optimizer) == 3
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fp32 in another order


def test_an_adamw_built_plain_is_made_a_fused_one():
    parameter = torch.ones(100, device="cuda", requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    optimizers.fuse(optimizer)
    optimizers.create_state(optimizer)
    parameter.grad = torch.ones_like(parameter)
    with no_waiting():
        optimizer.step()
    assert optimizers.name_of(optimizer) == "fused AdamW of torch"
    assert optimizer.state[parameter]["step"].is_cuda and optimizers.steps_of(optimizer) == 1
    torch.testing.assert_close(parameter.detach().cpu(), torch.full((100,), 1 - 0.1 - 0.1 * 0.01))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_an_engine_in_bf16_trains_with_them(stage, name):
    tower = Tower(("encoder", "adapter"), torch.bfloat16).cuda()
    engine = EncoderEngine(tower, tower.parts, zero_stage=stage, precision="bf16", adam=settings(name))
    x_NP, target = torch.randn(50, 7, device="cuda"), 0.1
    losses = []
    for _ in range(20):
        rows = engine.encode(x_NP)
        losses.append(float((rows.detach().float() - target).square().sum()))
        engine.backward(rows, rows.detach() - target)
        assert engine.squared_grad_norms().isfinite().all()
        engine.step(0.1)
    assert engine.optimizer_steps == 20
    assert losses[-1] < 0.7 * losses[0]


def test_lamb_agrees_with_the_cpus_and_waits_for_nothing():
    found, optimizer = train("lamb", "cuda", quiet=no_waiting)
    assert optimizers.name_of(optimizer) == "LAMB" and optimizers.steps_of(optimizer) == 3
    expected, _ = train("lamb", "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # fp32 in another order
