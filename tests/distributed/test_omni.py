"""The omni-modal loss over ranks is that of one process, whoever has which samples: uneven, and none at all."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tandem.data.vision import VisionSpec
from tandem.parallel.engines import encoder_engine
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.train.models.towers.omni import OmniChunk, OmniConfig
from tandem.train.objectives.omni import omni_loss
from tests.distributed.world import run_world
from tests.reference.vision import dense_siglip
from tests.train.omni_reference import (
    SIZES,
    Reference,
    tokens_of,
    toy_chunk,
    toy_tower,
    toy_tuples,
)
from tests.train.toys import CPU

CONFIG = OmniConfig(**SIZES)
SAMPLES = 5
SPLITS = {1: [[0, 1, 2, 3, 4]], 2: [[3], [1, 0, 4, 2]], 3: [[0, 2, 4], [], [1, 3]]}
ZERO_STAGE = {1: 1, 2: 3, 3: 2}
CHUNK = 2  # samples; a rank that has fewer chunks than others encodes blank ones
ADAM = AdamSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)


def counts_of(split):
    return [len(places) for places in split]


def group_of(split):
    return dist.group.WORLD if len(split) > 1 else None


def chunks_of(tuples, split, rank):
    """(chunk, whether it counts), as many on every rank."""
    most = max(-(-count // CHUNK) for count in counts_of(split))
    mine = [split[rank][first : first + CHUNK] for first in range(0, most * CHUNK, CHUNK)]
    return [
        (toy_chunk(tuples, places), True) if places else (OmniChunk.blank(VisionSpec(), CPU), False) for places in mine
    ]


def objective(encoded, chunks, split):
    """Outputs of all chunks, joined without blank ones, as leaves with gradients; this rank's share, and its terms."""
    leaves = []
    for column in zip(*encoded, strict=True):
        rows = [x if counts or not x.dim() else x[:0] for x, (_, counts) in zip(column, chunks, strict=True)]
        leaves.append((torch.cat(rows) if rows[0].dim() else rows[0]).detach().requires_grad_())
    tokens = tokens_of(toy_tuples(SAMPLES))
    share, terms = omni_loss(leaves, CONFIG, counts=counts_of(split), tokens=tokens, group=group_of(split))
    share.backward()
    return leaves, share, terms


def gradients_of(leaves, encoded, chunks):
    """(outputs, their gradients) of each chunk; a scalar's go to the first."""
    taken = [0] * len(leaves)
    for index, (outputs, (_, counts)) in enumerate(zip(encoded, chunks, strict=True)):
        mine = []
        for place, (leaf, output) in enumerate(zip(leaves, outputs, strict=True)):
            if output.dim() == 0:
                mine.append(leaf.grad * (index == 0))
            elif counts:
                mine.append(leaf.grad[taken[place] : taken[place] + len(output)])
                taken[place] += len(output)
            else:
                mine.append(torch.zeros_like(output))
        yield outputs, tuple(mine)


def rank_learns(split):
    """Sums over ranks of the loss, its terms and every gradient, without ZeRO."""
    tower, chunks = toy_tower(CONFIG), chunks_of(toy_tuples(SAMPLES), split, dist.get_rank())
    encoded = [tower(chunk) for chunk, _ in chunks]
    leaves, share, terms = objective(encoded, chunks, split)
    for outputs, gradients in gradients_of(leaves, encoded, chunks):
        torch.autograd.backward(outputs, gradients)
    sums = {"loss": share.detach(), **terms, **{name: p.grad for name, p in tower.named_parameters()}}
    for tensor in sums.values():
        dist.all_reduce(tensor)
    return sums


def rank_learns_sharded(split, zero_stage):
    """Squared norms of the gradients by part, with ZeRO."""
    encoder_engine.PERSISTENT_NUMEL = 40  # so that stage 3 shards the toy's weights
    tower, chunks = toy_tower(CONFIG), chunks_of(toy_tuples(SAMPLES), split, dist.get_rank())
    parts = {name: getattr(tower, name) for name in ("encoder", "pool", "text", "omni")}
    engine = EncoderEngine(tower, parts, zero_stage=zero_stage, precision="fp32", adam=ADAM)
    encoded = [engine.encode(chunk) for chunk, _ in chunks]
    leaves, *_ = objective(encoded, chunks, split)
    for outputs, gradients in gradients_of(leaves, encoded, chunks):
        engine.backward(outputs, gradients)
    squares = engine.squared_grad_norms()
    dist.all_reduce(squares)
    return dict(zip(parts, squares.tolist(), strict=True))


def whole_outputs():
    """Outputs of a tower for all samples, drawn at random, fp64."""
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(len(CONFIG.sides), SAMPLES, 6, generator=generator).double()
    scales, biases = ([torch.tensor(x + place).double() for place in range(len(CONFIG.pairs))] for x in (4.0, -3.0))
    losses = torch.rand(2, SAMPLES, generator=generator).double()
    return [*F.normalize(sides, dim=-1), *scales, *biases, *losses]


def rank_objective(split):
    """This rank's share of the loss of `whole_outputs`, and its leaves' gradients."""
    leaves = [(x[split[dist.get_rank()]] if x.dim() else x).requires_grad_() for x in whole_outputs()]
    share, _ = omni_loss(leaves, CONFIG, counts=counts_of(split), tokens=23, group=group_of(split))
    share.backward()
    return share.detach(), [leaf.grad for leaf in leaves]


def rank_does_all(split, zero_stage):
    return rank_learns(split), rank_objective(split), rank_learns_sharded(split, zero_stage)


@functools.cache
def results(world):
    """What each rank of one world found, by kind: worlds take longer to start than to compute."""
    return list(zip(*run_world(rank_does_all, world, SPLITS[world], ZERO_STAGE[world]), strict=True))


@functools.cache
def expected():
    """Of the reference: loss and terms, and gradients."""
    reference = Reference(toy_tower(CONFIG), CONFIG)
    terms = reference.terms(toy_tuples(SAMPLES))
    loss = reference.loss(terms)
    loss.backward()
    values = {name: term.item() for name, term in {"loss": loss, **terms}.items()}
    return values, {name: weight.grad for name, weight in reference.weights.items()}


# ---- tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", SPLITS)
def test_loss_and_gradients_are_those_of_one_process(world):
    """fp32 against fp64."""
    values, gradients = expected()
    for sums in results(world)[0]:
        for name, value in values.items():
            assert float(sums[name]) == pytest.approx(value, rel=1e-5), name
        for name, gradient in gradients.items():
            difference = (sums[name].double() - gradient).abs().max()
            assert difference <= 2e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("world", SPLITS)
def test_gradients_under_zero_have_the_same_norms(world):
    _, gradients = expected()
    for squares in results(world)[2]:
        for part, square in squares.items():
            wanted = sum(float(g.square().sum()) for name, g in gradients.items() if name.startswith(f"{part}."))
            assert square == pytest.approx(wanted, rel=1e-4), part


@pytest.mark.parametrize("world", SPLITS)
def test_objective_is_the_formula(world):
    """fp64."""
    outputs = [x.requires_grad_() for x in whole_outputs()]
    sides = dict(zip(CONFIG.sides, outputs, strict=False))
    loss = CONFIG.matching_weight * outputs[-2].sum() / SAMPLES + CONFIG.caption_weight * outputs[-1].sum() / 23
    for place, pair in enumerate(CONFIG.pairs):
        scale, bias = outputs[len(sides) + place], outputs[len(sides) + len(CONFIG.pairs) + place]
        loss = loss + dense_siglip(*(sides[side] for side in pair.split(":")), scale, bias) / len(CONFIG.pairs)
    loss.backward()
    shares, gradients = zip(*results(world)[1], strict=True)
    assert float(sum(shares)) == pytest.approx(loss.item(), rel=1e-12)
    order = [place for mine in SPLITS[world] for place in mine]
    for place, output in enumerate(outputs):
        ranks = [gradient[place] for gradient in gradients]
        found = torch.cat(ranks) if output.dim() else sum(ranks)
        torch.testing.assert_close(found, output.grad[order] if output.dim() else output.grad, rtol=1e-12, atol=1e-14)
