"""AdamW and LAMB of parallel/engines/optimizers.py by themselves: against formulas written parameter by parameter, in
fp64."""

import pytest
import torch
import torch.distributed as dist

from tandem.parallel.engines import optimizers
from tandem.parallel.engines.state import AdamSettings

SHAPES = ((5, 7), (3, 4), (6,), (2, 9))
ADAM = AdamSettings(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05)
LAMB = AdamSettings(lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.05, name="lamb")


@pytest.fixture(scope="module", autouse=True)
def world_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def weights(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    drawn[1].zero_()  # a parameter that starts at nothing has no norm to follow
    return [weight.to(dtype) for weight in drawn]


def gradients(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    drawn[3].mul_(float(step != 1))  # one step without a gradient
    return [gradient.to(dtype) for gradient in drawn]


def reference(settings, steps):
    """Weights after some steps, each parameter by itself, as the papers' formulas have it."""
    after, (beta1, beta2) = [], settings.betas
    for place, w in enumerate(weights()):
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for step in range(steps):
            g = gradients(step)[place]
            m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
            u = (m / (1 - beta1 ** (step + 1))) / ((v / (1 - beta2 ** (step + 1))).sqrt() + settings.eps)
            matrix = w.dim() > 1
            u = u + settings.weight_decay * w if matrix else u
            norm_w, norm_u = float(w.norm()), float(u.norm())
            ratio = norm_w / norm_u if settings.name == "lamb" and matrix and norm_w and norm_u else 1.0
            w = w - settings.lr * ratio * u
        after.append(w)
    return after


def groups_of(parameters, settings):
    """Matrices and vectors, flat and one after the other; and where each of them lies."""
    groups, runs = [], {}
    for matrix in (True, False):
        members = [(place, p) for place, p in enumerate(parameters) if (p.dim() > 1) == matrix]
        shard = torch.cat([p.flatten() for _, p in members]).requires_grad_()
        decay = settings.weight_decay if matrix else 0.0
        groups.append({"params": [shard], "weight_decay": decay, "adapt": matrix, "lr": settings.lr})
        begin, runs[shard] = 0, []
        for place, p in members:
            runs[shard].append(optimizers.Run(place, begin, p.numel()))
            begin += p.numel()
    return groups, runs


def train(settings, dtype, steps, begun=None):
    """(weights by place, the optimizer) after steps on flat shards; `begun`: what a run before left."""
    groups, runs = groups_of(weights(dtype), settings)
    optimizer = optimizers.build(groups, settings, torch.device("cpu"))
    optimizers.create_state(optimizer)
    if settings.name == "lamb":
        optimizer.place(runs, len(SHAPES), dist.group.WORLD)
    if begun is not None:
        optimizers.set_steps(optimizer, optimizers.steps_of(begun))
        for new, old in zip(optimizer.param_groups, begun.param_groups, strict=True):
            (shard,), (before,) = new["params"], old["params"]
            shard.data.copy_(before.data)
            for kind in ("exp_avg", "exp_avg_sq"):
                optimizer.state[shard][kind].copy_(begun.state[before][kind])
    for step in steps:
        for shard, of_shard in runs.items():
            shard.grad = torch.cat([gradients(step, dtype)[run.parameter].flatten() for run in of_shard])
        optimizer.step()
    places = {run.parameter: run.of(shard).detach() for shard in runs for run in runs[shard]}
    return [places[place].view(shape) for place, shape in enumerate(SHAPES)], optimizer


@pytest.mark.parametrize("settings", [ADAM, LAMB], ids=lambda settings: settings.name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_updates_are_those_of_the_papers(settings, dtype, tolerance):
    after, optimizer = train(settings, dtype, range(4))
    assert optimizers.steps_of(optimizer) == 4
    for weight, expected in zip(after, reference(settings, 4), strict=True):
        # LAMB's ratio is kept in fp32
        least = tolerance if settings is ADAM else max(tolerance, 1e-7)
        torch.testing.assert_close(weight.double(), expected, rtol=least, atol=least)


@pytest.mark.parametrize("settings", [ADAM, LAMB], ids=lambda settings: settings.name)
def test_moments_and_counts_carry_a_run_on(settings):
    whole, _ = train(settings, torch.float32, range(5))
    _, begun = train(settings, torch.float32, range(3))
    after, optimizer = train(settings, torch.float32, range(3, 5), begun)
    assert optimizers.steps_of(optimizer) == 5
    assert all(torch.equal(weight, expected) for weight, expected in zip(after, whole, strict=True))


def test_a_vector_and_a_weight_of_zero_move_as_adamw_moves_them():
    adam, _ = train(ADAM, torch.float32, range(1))
    lamb, _ = train(LAMB, torch.float32, range(1))
    assert not torch.equal(adam[0], lamb[0])
    for place in (1, 2):
        torch.testing.assert_close(lamb[place], adam[place], rtol=1e-6, atol=1e-8)


def test_a_fused_adamw_takes_the_state_that_is_made_for_it():
    """As on CUDA, where `build` and `fuse` ask for it: torch has a fused one for a CPU too."""
    results = []
    for fused in (False, True):
        parameters = [weight.requires_grad_() for weight in weights(torch.float32)]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=fused)
        optimizers.create_state(optimizer)
        optimizers.set_steps(optimizer, 7)
        for parameter, gradient in zip(parameters, gradients(0, torch.float32), strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert optimizers.steps_of(optimizer) == 8
        results.append(parameters)
    for plain, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-6, atol=1e-7)  # one kernel rounds in another order


def test_what_a_cpu_has_stays_as_it_is_built():
    optimizer = torch.optim.AdamW(weights(torch.float32))
    optimizers.fuse(optimizer)
    assert optimizers.name_of(optimizer) == "AdamW of torch"


def test_a_log_can_name_them():
    parameters = weights(torch.float32)
    assert optimizers.name_of(torch.optim.AdamW(parameters)) == "AdamW of torch"
    assert optimizers.name_of(torch.optim.AdamW(parameters, fused=True)) == "fused AdamW of torch"
    assert optimizers.name_of(optimizers.build(groups_of(parameters, LAMB)[0], LAMB, torch.device("cpu"))) == "LAMB"
