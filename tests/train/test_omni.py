"""The omni-modal tower and its loss: equal to a plain reference, nothing leaks, and what is off is not there."""

import dataclasses

import numpy as np
import pytest
import torch

from tandem.data.vision import VisionSpec
from tandem.train.models.encoders.text_encoder import PackedTexts
from tandem.train.models.towers.contrastive import ContrastiveConfig, ContrastiveTower
from tandem.train.models.towers.omni import MICO_PAIRS, OmniChunk, OmniConfig
from tandem.train.objectives.omni import omni_loss
from tests.train.omni_reference import (
    ENCODER,
    SIZES,
    TEXT,
    WIDTH,
    Reference,
    tokens_of,
    toy_chunk,
    toy_tower,
    toy_tuples,
)
from tests.train.toys import CPU, packed

ALL = OmniConfig(**SIZES)
OTHERS = OmniConfig(pairs=["frames:audio", "audio+frames:sound", "frames+sound:visual"], **SIZES)
SAMPLES = 4


@pytest.fixture(scope="module")
def tuples():
    return toy_tuples(SAMPLES)


@pytest.fixture(scope="module")
def tower():
    return toy_tower(ALL)


def loss_of(tower, config, tuples):
    chunk = toy_chunk(tuples, list(range(len(tuples))))
    return omni_loss(tower(chunk), config, counts=[len(tuples)], tokens=tokens_of(tuples), group=None)


def named(outputs, config):
    """The outputs with a row a sample, by name."""
    names = [*config.sides, *config.pairs, *config.pairs, "matching", "caption"]
    return {name: x for name, x in zip(names, outputs, strict=True) if x.dim()}


# ---- the reference -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [ALL, OTHERS], ids=["mico", "others"])
def test_loss_and_gradients_are_those_of_the_reference(config, tuples):
    """fp32 against fp64."""
    tower = toy_tower(config)
    reference = Reference(tower, config)
    share, terms = loss_of(tower, config, tuples)
    share.backward()
    expected = reference.terms(tuples)
    assert terms.keys() == expected.keys()
    for name, term in expected.items():
        assert float(terms[name]) == pytest.approx(term.item(), rel=1e-5), name
    reference.loss(expected).backward()
    for name, parameter in tower.named_parameters():
        gradient = reference.weights[name].grad
        difference = (parameter.grad.double() - gradient).abs().max()
        assert difference <= 2e-5 * gradient.abs().max() + 1e-7, name


def test_how_samples_are_cut_into_chunks_changes_nothing(tower, tuples):
    with torch.no_grad():
        together = named(tower(toy_chunk(tuples, [0, 1, 2, 3])), ALL)
        parts = [named(tower(toy_chunk(tuples, places)), ALL) for places in ([0, 1, 2], [3])]
    for name, rows in together.items():
        torch.testing.assert_close(torch.cat([part[name] for part in parts]), rows, rtol=1e-5, atol=1e-6)


def test_recomputation_changes_no_gradient(tuples):
    gradients = {}
    for recompute in ("none", "selective", "full", "replay"):
        tower = toy_tower(ALL, recompute)
        loss_of(tower, ALL, tuples)[0].backward()
        gradients[recompute] = torch.cat([parameter.grad.flatten() for parameter in tower.parameters()])
        assert torch.equal(gradients[recompute], gradients["none"]), recompute


# ---- who sees whom -------------------------------------------------------------------------------------------------
def moved(tower, tuples, others):
    """Of each output, the samples whose rows differ to the bit."""
    with torch.no_grad():
        before, after = (named(tower(toy_chunk(x, list(range(SAMPLES)))), ALL) for x in (tuples, others))
    return {
        name: set((before[name] != after[name]).reshape(SAMPLES, -1).any(1).nonzero()[:, 0].tolist()) for name in before
    }


def changed_image(sample, place):
    images = [image.copy() for image in sample.images]
    images[place][-1] = 255 - images[place][-1]
    return dataclasses.replace(sample, images=images)


@pytest.mark.parametrize(("place", "seen_by"), [(0, "frames"), (-1, "audio")])
def test_an_image_is_seen_by_its_own_side_of_its_own_sample(place, seen_by, tower, tuples):
    """Audio does not leak into frames, nor frames into audio, nor a sample into another."""
    others = [*tuples[:1], changed_image(tuples[1], place), *tuples[2:]]
    expected = {name: {1} if seen_by in name.split("+") else set() for name in ALL.sides}
    assert moved(tower, tuples, others) == expected | {"matching": {1}, "caption": {1}}


@pytest.mark.parametrize(("which", "seen_by"), [(0, "visual"), (1, "sound")])
def test_a_caption_is_seen_by_its_own_sample_and_as_the_negative_of_the_one_before(which, seen_by, tower, tuples):
    captions = [caption.copy() for caption in tuples[1].captions]
    captions[which][0] = (captions[which][0] + 1) % TEXT.vocab_size
    others = [*tuples[:1], dataclasses.replace(tuples[1], captions=tuple(captions)), *tuples[2:]]
    expected = {name: {1} if seen_by in name.split("+") else set() for name in ALL.sides}
    assert moved(tower, tuples, others) == expected | {"matching": {0, 1}, "caption": {1}}


def test_the_order_of_frames_matters_to_the_reader_alone(tower, tuples):
    """The embedding of a video is a mean; whoever writes its caption is told which frame is which."""
    sample = tuples[1]
    assert len(sample.images) == 3
    turned = dataclasses.replace(
        sample, images=[sample.images[i] for i in (1, 0, 2)], grids=[sample.grids[i] for i in (1, 0, 2)]
    )
    with torch.no_grad():
        before, after = (named(tower(toy_chunk([x], [0])), ALL) for x in (sample, turned))
    torch.testing.assert_close(after["frames"], before["frames"], rtol=0, atol=1e-6)
    assert (after["caption"] - before["caption"]).abs().item() > 1e-3


def test_a_negative_of_the_same_words_is_none(tower, tuples):
    """The last two toys say the same: the last but one has only its own caption to match."""
    chunk = toy_chunk(tuples, list(range(SAMPLES)))
    assert chunk.other_B.tolist() == [1, 1, 0, 1]
    alone = toy_chunk(tuples[:1], [0])  # the sample after the only one is itself
    assert alone.other_B.tolist() == [0]
    with torch.no_grad():
        own = named(tower(alone), ALL)["matching"]
        both = named(tower(toy_chunk(tuples, [0])), ALL)["matching"]
    assert 0 < float(own) < float(both)


# ---- what there is -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("weights", "absent"),
    [
        ({"matching_weight": 0, "caption_weight": 0}, ("reader",)),
        ({"matching_weight": 0}, ("matching",)),
        ({"caption_weight": 0}, ("words", "start")),
        ({}, ()),
    ],
    ids=["neither", "caption", "matching", "both"],
)
def test_what_is_off_is_not_built_and_what_is_built_learns(weights, absent, tuples):
    config = OmniConfig(**{**SIZES, **weights})
    tower = toy_tower(config)
    present = {part for name in dict(tower.named_parameters()) for part in name.split(".")}
    assert {"reader", "matching", "words", "start"} - present >= set(absent)
    if weights.get("matching_weight", 1):
        assert "matching" in present
    if weights.get("caption_weight", 1):
        assert "words" in present
    chunk = toy_chunk(tuples, [0, 1])
    if "matching" in absent:
        chunk = dataclasses.replace(chunk, other=None, other_B=None)
    share, terms = omni_loss(tower(chunk), config, counts=[2], tokens=20, group=None)
    share.backward()
    assert list(terms) == [*MICO_PAIRS, *(name for name in ("matching", "caption") if weights.get(f"{name}_weight", 1))]
    assert all(parameter.grad.abs().sum() > 0 for parameter in tower.parameters())


def test_a_blank_chunk_reaches_every_parameter(tower):
    """ZeRO-3 gathers what a call uses, on every rank the same."""
    outputs = tower(OmniChunk.blank(VisionSpec(), CPU))
    gradients = torch.autograd.grad(
        sum(output.sum() for output in outputs), list(tower.parameters()), allow_unused=True, materialize_grads=False
    )
    assert all(gradient is not None for gradient in gradients)
    assert all(len(output) == 1 for output in outputs if output.dim())


def test_embeddings_for_evaluation_are_those_of_training(tower, tuples):
    chunk = toy_chunk(tuples, list(range(SAMPLES)))
    frames = packed([x for s in tuples for x in s.images[:-1]], [grid for s in tuples for grid in s.grids[:-1]])
    audio = packed([s.images[-1] for s in tuples], [s.grids[-1] for s in tuples])
    sounds = [s.captions[1] for s in tuples]
    with torch.no_grad():
        trained = named(tower(chunk), ALL)
        evaluated = {
            "frames": tower.embed_images(frames, torch.tensor([len(s.images) - 1 for s in tuples])),
            "audio": tower.embed_audio(audio),
            "sound": tower.embed_texts(PackedTexts.of(np.concatenate(sounds), [len(text) for text in sounds], CPU)),
        }
    for name, rows in evaluated.items():
        torch.testing.assert_close(rows, trained[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rows.norm(dim=-1), torch.ones(SAMPLES))


def test_parts_of_a_contrastive_tower_fit_by_name(tower):
    contrastive = ContrastiveTower(ENCODER, TEXT, ContrastiveConfig(), width=WIDTH)
    shapes, theirs = (
        {name: p.shape for name, p in x.named_parameters() if not name.startswith(("omni.", "contrastive."))}
        for x in (tower, contrastive)
    )
    assert shapes == theirs and {name.split(".")[0] for name in shapes} == {"encoder", "pool", "text"}


# ---- settings ------------------------------------------------------------------------------------------------------
def test_pairs_are_written_in_one_way():
    config = OmniConfig(pairs=["audio + frames:sound+visual", "frames:visual"])
    assert config.pairs == ["frames+audio:visual+sound", "frames:visual"]
    assert config.sides == ("frames+audio", "visual+sound", "frames", "visual")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"pairs": []}, r"objective\.omni\.pairs=\[\]: none has frames or audio"),
        ({"pairs": ["frames:audio"]}, "none has visual or sound to teach the text encoder"),
        ({"pairs": ["visual:sound"]}, "none has frames or audio to teach the encoder"),
        ({"pairs": ["frames"]}, "'frames' must be two sides with a colon between"),
        ({"pairs": ["frames:visual:sound"]}, "must be two sides with a colon between"),
        ({"pairs": ["frames:text"]}, "'frames:text' names 'text', must be of frames, audio, visual, sound"),
        ({"pairs": ["frames+:visual"]}, "names ''"),
        ({"pairs": ["frames+audio:frames"]}, "names a source twice"),
        ({"pairs": ["frames:visual", "visual:frames"]}, "'visual:frames' is there twice"),
        ({"matching_weight": -1.0}, r"objective\.omni\.matching_weight=-1\.0"),
        ({"caption_weight": float("nan")}, r"objective\.omni\.caption_weight=nan"),
        ({"scale_init": 0.0}, r"objective\.omni\.scale_init=0\.0"),
        ({"decoder_depth": 0}, r"objective\.omni\.decoder_depth=0"),
        ({"decoder_width": 20, "decoder_heads": 4}, "each head needs an even number of channels"),
    ],
)
def test_settings_that_cannot_be_are_named(setting, message):
    with pytest.raises(ValueError, match=message):
        OmniConfig(**setting)
