"""LAMB under ZeRO 1, 2 and 3 on 1, 2 and 4 ranks against one process that takes each parameter by itself.

Shards cut parameters wherever it suits DeepSpeed; the trust ratio is that of whole ones, so that weights and moments
are the same in any layout.  Tower, images and steps are those of test_encoder_engine.py.
"""

import functools

import pytest
import torch

from tandem.parallel.engines import encoder_engine, encoder_state
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import AdamSettings
from tests.distributed.runs import whole_state
from tests.distributed.test_encoder_engine import Plan, Tower, assert_same_state, images, lr, train, weights_of
from tests.distributed.world import run_world

# eps above the rounding noise of a gradient that is zero (key biases), which Adam would turn into whole steps
LAMB = AdamSettings(lr=1e-3, betas=(0.9, 0.98), eps=1e-4, weight_decay=0.05, name="lamb")
STEPS = 5


@functools.cache
def reference():
    """(squared norms of each step, state by (name, kind)) of one process, in fp32."""
    tower = Tower(("encoder", "adapter"), torch.float32)
    weights = dict(tower.named_parameters())
    m, v = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    norms, (beta1, beta2) = [], LAMB.betas
    for step in range(STEPS):
        tower.zero_grad()
        for x_NP, target_NR in images(step):
            rows_NR = tower(x_NP)
            rows_NR.backward(rows_NR.detach() - target_NR)
        norms.append([sum(float(w.grad.square().sum()) for w in part.parameters()) for part in tower.parts.values()])
        scale = min(1.0, 2.0 / sum(norms[-1]) ** 0.5)
        with torch.no_grad():
            for name, w in weights.items():
                g = w.grad * scale
                m[name] = beta1 * m[name] + (1 - beta1) * g
                v[name] = beta2 * v[name] + (1 - beta2) * g * g
                u = m[name] / (1 - beta1 ** (step + 1)) / ((v[name] / (1 - beta2 ** (step + 1))).sqrt() + LAMB.eps)
                ratio = 1.0
                if w.dim() > 1:
                    u += LAMB.weight_decay * w
                    ratio = w.double().norm() / u.double().norm()
                w -= lr(step) * ratio * u
    state = {(name, "param"): w.detach() for name, w in weights.items()}
    for name in weights:
        state[name, "exp_avg"], state[name, "exp_avg_sq"] = m[name], v[name]
    return norms, state


def build(stage, precision="fp32"):
    encoder_engine.PERSISTENT_NUMEL = 40  # so that the test's small weights are sharded, but for norms and biases
    tower = Tower(("encoder", "adapter"), torch.bfloat16 if precision == "bf16" else torch.float32)
    return EncoderEngine(tower, tower.parts, zero_stage=stage, precision=precision, adam=LAMB)


def rank_trains(precision):
    """(squared norms of each step, state, count of steps) for every stage."""
    results = []
    for stage in (1, 2, 3):
        engine = build(stage, precision)
        norms = train(engine, Plan(range(STEPS), precision=precision))
        results.append((norms, whole_state(engine), engine.optimizer_steps))
    return results


def rank_goes_on(stage, saved, steps):
    """(whether it loads what was saved, state after some more steps)."""
    engine = build(stage)
    if saved is not None:
        engine.load(lambda name, kind, start, shape: saved[name, kind], optimizer=True)
        engine.optimizer_steps = steps.start
    same = saved is None or all(torch.equal(tensor, saved[key]) for key, tensor in whole_state(engine).items())
    train(engine, Plan(steps))
    return same, whole_state(engine)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_stage_equals_one_process(world):
    norms, state = reference()
    for results in run_world(rank_trains, world, "fp32"):
        for found, reached, steps in results:
            # what is left is the order of fp32 sums: over images and ranks, and in the norms of runs
            torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=1e-5, atol=0)
            assert_same_state(reached, state, 1e-6)
            assert steps == STEPS


def test_bf16_weights_follow_fp32_masters():
    norms, expected = reference()
    for found, state, _ in run_world(rank_trains, 2, "bf16")[0]:
        torch.testing.assert_close(torch.tensor(found), torch.tensor(norms), rtol=0.05, atol=0)
        # a step moves a weight by a share of its norm: five of them differ by less than two, whatever bf16 rounds
        assert_same_state(weights_of(state), weights_of(expected), 4 * LAMB.lr)
        assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in weights_of(state).values())


def test_moments_move_between_stages_and_world_sizes():
    saved = None
    for steps, stage, world in ((range(2), 1, 2), (range(2, 4), 3, 3), (range(4, STEPS), 2, 1)):
        same, saved = run_world(rank_goes_on, world, stage, saved, steps)[0]
        assert same
    assert_same_state(saved, reference()[1], 1e-6)


def test_a_run_is_of_the_master_that_it_lies_in():
    """DeepSpeed's masters of stage 3 may be parts of one buffer."""
    masters = torch.zeros(10).split([6, 4])
    for begin, expected in ((0, [True, False]), (5, [True, False]), (6, [False, True]), (9, [False, True])):
        run = masters[0].as_strided((1,), (1,), begin)
        assert [encoder_state._holds(master, run) for master in masters] == expected
