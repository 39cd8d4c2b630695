"""The encoder engine with a tower of several outputs, learning rates by parameter and averaged weights.

One plain torch process with one AdamW and the average written as its formula is the reference, in fp32, for ZeRO 1, 2
and 3 on 1, 2 and 3 ranks.  Images are dealt over the ranks, one a chunk, with blanks behind them; a step's backwards
run in either order.  The `spare` head gets a gradient from no chunk of the first step, from every chunk of the second,
from the second chunk alone of the third, and so on: what a step leaves behind must not pass for a gradient of the next.

Legend: N patches of an image, P values of a patch, D width, R values of a row, S of a spare row.
"""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tandem.parallel.engines import encoder_engine
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import EMA, AdamSettings
from tests.distributed.runs import whole_state
from tests.distributed.world import run_world

# eps above the rounding noise of small gradients, which Adam would turn into whole steps
ADAM = AdamSettings(lr=1e-2, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.3)
VALUES, WIDTH, ROW, SPARE = 7, 22, 11, 5  # sizes that divide by no world
DECAY = 0.3  # of the average; the first two updates have less
IMAGES, STEPS = 5, 5
DECAYED = {"encoder.embed.weight", "encoder.layers.0.weight", "encoder.layers.1.weight"} | {
    "heads.rows.weight",
    "heads.spare.weight",
}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(VALUES, WIDTH)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x_NP):
        x_ND = self.embed(x_NP)
        for layer in self.layers:
            x_ND = x_ND + F.gelu(layer(x_ND))
        return x_ND


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.spare = nn.Linear(WIDTH, ROW), nn.Linear(WIDTH, SPARE)
        self.token_1D = nn.Parameter(torch.randn(1, WIDTH))
        self.scale, self.bias = nn.Parameter(torch.tensor([0.5])), nn.Parameter(torch.tensor([-1.0]))

    def forward(self, x_ND):
        x_ND = x_ND + self.token_1D
        return self.rows(x_ND), self.scale.float().exp().sum(), self.bias, self.spare(x_ND.detach())


class Tower(nn.Module):
    """(rows [N, R], a scalar, a parameter itself, spare rows [N, S]); the encoder runs twice a call."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.heads, self.dtype = Encoder(), Heads(), dtype

    def forward(self, x_NP):
        x_NP = x_NP.to(self.dtype)
        return self.heads(self.encoder(x_NP) + self.encoder(x_NP.flip(0)))


def image(step, place):
    """(patches [N, P], target [N, R]) of one image."""
    generator = torch.Generator().manual_seed(100 * step + place)
    size = 1 + (step + 3 * place) % 4
    return torch.randn(size, VALUES, generator=generator), torch.randn(size, ROW, generator=generator)


def gradients(outputs, target_NR, step, chunk, weight=1.0):
    """Of the outputs of one chunk; weight 0 for a blank."""
    rows_NR, scale, bias, spare_NS = (output.detach() for output in outputs)
    spared = step % 3 == 1 or (step % 3 == 2 and chunk == 1)
    return (
        weight * (rows_NR - target_NR),
        weight * (scale - 1.0).double(),  # of another dtype than the output
        weight * (bias + 0.5),
        weight * (spare_NS + 0.3) if spared else None,
    )


def lr_scale(name):
    """Layer-wise: less the deeper below the heads."""
    if name.startswith("encoder.layers."):
        return 0.5 ** (2 - int(name.split(".")[2]))
    return 0.125 if name.startswith("encoder.") else 1.0


def lr(step):
    return ADAM.lr * (1 + step % 2)


@functools.cache
def reference(worlds):
    """(squared norms by part of each step, state by (name, kind) at the end) of one process.

    worlds: number of ranks of each step, which decides what is the second chunk.
    """
    tower = Tower()
    weights = dict(tower.named_parameters())
    groups = [
        {"params": [weight], "weight_decay": ADAM.weight_decay if name in DECAYED else 0.0, "name": name}
        for name, weight in weights.items()
    ]
    adam = torch.optim.AdamW(groups, lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps)
    averages = {name: weight.detach().clone() for name, weight in weights.items()}
    norms = []
    for step, world in enumerate(worlds):
        for weight in weights.values():
            weight.grad = torch.zeros_like(weight)
        for place in range(IMAGES):
            x_NP, target_NR = image(step, place)
            outputs = tower(x_NP)
            given = gradients(outputs, target_NR, step, place // world)
            pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, given, strict=True) if g is not None]
            torch.autograd.backward(*zip(*pairs, strict=True))
        parts = (tower.encoder, tower.heads)
        norms.append([sum(float(w.grad.square().sum()) for w in part.parameters()) for part in parts])
        for group in adam.param_groups:
            group["lr"] = lr(step) * lr_scale(group["name"])
        adam.step()
        decay = min(DECAY, (2 + step) / (11 + step))
        for name, weight in weights.items():
            averages[name] = decay * averages[name] + (1 - decay) * weight.detach()
    state = {}
    for name, weight in weights.items():
        state[name, "param"], state[name, EMA] = weight.detach(), averages[name]
        state.update({(name, kind): adam.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq")})
    return norms, state


# ---- what a rank runs ------------------------------------------------------------------------------------------------


def build(stage, precision="fp32", ema=DECAY):
    encoder_engine.PERSISTENT_NUMEL = 40  # so that the test's small weights are sharded, but for the smallest
    tower = Tower(torch.bfloat16 if precision == "bf16" else torch.float32)
    parts = {"encoder": tower.encoder, "heads": tower.heads}
    settings = {"zero_stage": stage, "precision": precision, "adam": ADAM}
    return EncoderEngine(tower, parts, **settings, lr_scale=lr_scale, ema=ema)


def accumulate(engine, step, spoil=False):
    """This rank's encodes and backwards of a step; every image's rank is its place, round and round."""
    rank, world = dist.get_rank(), dist.get_world_size()
    places = range(rank, -(-IMAGES // world) * world, world)
    chunks = [(chunk, place < IMAGES, *image(step, place)) for chunk, place in enumerate(places)]
    kept = [(engine.encode(x_NP), target_NR, chunk, real) for chunk, real, x_NP, target_NR in chunks]
    for outputs, target_NR, chunk, real in kept if step % 2 else reversed(kept):
        given = gradients(outputs, target_NR, step, chunk, weight=float(real))
        if spoil:
            given = [torch.full_like(output, float("inf")) for output in outputs]
        engine.backward(outputs, given)
    return engine.squared_grad_norms()


def train(engine, steps):
    norms = []
    for step in steps:
        squares = accumulate(engine, step)
        dist.all_reduce(squares)
        norms.append(squares.tolist())
        engine.set_lr(lr(step))
        engine.step(1.0)
    return norms


def rank_trains(precision):
    """For every stage the final state; on the way come a discarded step and one without gradients."""
    results = []
    for stage in (1, 2, 3):
        engine = build(stage, precision)
        norms = train(engine, range(3))
        before = whole_state(engine)
        accumulate(engine, 1, spoil=True)
        engine.discard()
        outputs = engine.encode(torch.ones(2, VALUES))
        engine.backward(outputs, (None,) * len(outputs))
        engine.step(1.0)
        untouched = all(torch.equal(tensor, before[key]) for key, tensor in whole_state(engine).items())
        norms += train(engine, range(3, STEPS))
        counts = {int(state["step"]) for state in engine._adam.state.values()}
        counts.add(engine.optimizer_steps)
        results.append({"norms": norms, "untouched": untouched, "state": whole_state(engine), "counts": counts})
    return results


def rank_saves(stage, steps):
    engine = build(stage)
    train(engine, steps)
    return whole_state(engine)


def kinds_are_cut_alike(engine):
    """As checkpoints need it: every kind of a tensor is saved in the same runs."""
    cuts = {}
    for chunk in engine.state():
        cuts.setdefault(chunk.name, []).append((chunk.begin, chunk.tensor_N.numel()))
    return all(runs == runs[:1] * 4 for runs in cuts.values())


def rank_resumes(stage, saved, steps):
    """(whether it loads as it was saved, and would save it so; state after some more steps)."""
    engine = build(stage)
    engine.load(lambda name, kind, start, shape: saved[name, kind], True, has_ema=lambda name: (name, EMA) in saved)
    engine.optimizer_steps = steps.start
    same = all(torch.equal(tensor, saved[key]) for key, tensor in whole_state(engine).items())
    train(engine, steps)
    return same and kinds_are_cut_alike(engine), whole_state(engine)


def rank_starts_an_average(saved):
    """State after a load of weights without their average, for every stage, and kinds where no average is kept."""
    loaded = []
    for stage in (1, 2, 3):
        engine = build(stage)
        engine.load(lambda name, kind, start, shape: saved[name, kind], False, parts=["encoder"])
        loaded.append(whole_state(engine))
    plain = build(1, ema=0.0)
    return loaded, {kind for _, kind in whole_state(plain)}


# ---- tests -----------------------------------------------------------------------------------------------------------


def assert_same_state(state, expected):
    assert state.keys() == expected.keys()
    for key, tensor in expected.items():
        # what is left is the order of fp32 sums over images and ranks
        torch.testing.assert_close(state[key], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_stage_equals_one_process(world):
    norms, state = reference((world,) * STEPS)
    for results in run_world(rank_trains, world, "fp32"):
        for result in results:
            assert result["untouched"] and result["counts"] == {STEPS}
            torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(norms), rtol=1e-5, atol=0)
            assert_same_state(result["state"], state)


def test_bf16_weights_have_fp32_masters_and_averages():
    norms, expected = reference((2,) * STEPS)
    for result in run_world(rank_trains, 2, "bf16")[0]:
        state = result["state"]
        assert result["untouched"] and state.keys() == expected.keys()
        torch.testing.assert_close(torch.tensor(result["norms"]), torch.tensor(norms), rtol=0.05, atol=0)
        for name in ("heads.scale", "heads.bias"):
            torch.testing.assert_close(state[name, "exp_avg"], expected[name, "exp_avg"], rtol=0.05, atol=0)
        for kind in ("param", EMA):
            assert any(not torch.equal(state[name, kind], state[name, kind].bfloat16().float()) for name, _ in state)


def test_an_average_moves_between_stages_and_world_sizes():
    saved = run_world(rank_saves, 2, 1, range(2))[0]
    for steps, stage, world in ((range(2, 4), 3, 3), (range(4, 5), 2, 1)):
        same, saved = run_world(rank_resumes, world, stage, saved, steps)[0]
        assert same
    assert_same_state(saved, reference((2, 2, 3, 3, 1))[1])


def test_an_average_starts_from_the_weights_that_are_loaded():
    saved = {key: tensor + 1 for key, tensor in reference((1,) * STEPS)[1].items()}
    fresh = {name: weight.detach() for name, weight in Tower().named_parameters()}
    loaded, kinds = run_world(rank_starts_an_average, 2, saved)[0]
    assert EMA not in kinds
    for state in loaded:
        for (name, kind), tensor in state.items():
            weight = saved[name, "param"] if name.startswith("encoder.") else fresh[name]
            assert torch.equal(tensor, weight if kind in ("param", EMA) else torch.zeros_like(weight))


def test_impossible_towers_and_averages_are_named():
    tower, settings = Tower(), {"zero_stage": 1, "precision": "fp32", "adam": ADAM}
    with pytest.raises(ValueError, match=r"optim\.ema=1\.0: must be 0"):
        EncoderEngine(tower, {"all": tower}, **settings, ema=1.0)
    tower.heads.scale = nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"heads\.scale has no dimension"):
        EncoderEngine(tower, {"all": tower}, **settings)
