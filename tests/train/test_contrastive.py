"""The contrastive tower: unit vectors in fp32, means over a sample's images, and nobody sees another's input."""

import dataclasses

import numpy as np
import pytest
import torch

from tandem.data.vision import VisionSpec
from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig
from tandem.train.models.encoders.vit import PackedImages, ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers.contrastive import ContrastiveConfig, ContrastiveTower, mean_of_images
from tandem.train.objectives.superclass import InverseFrequency, TokenSets, superclass_loss
from tests.train.toys import CPU, packed, random_images, to_meta

GRIDS = [[2, 4], [4, 4], [4, 4], [6, 2], [4, 4]]
FRAMES = [2, 1, 2]  # images of each sample
LENGTHS = np.array([3, 6, 2])
WORDS, WIDTH = 30, 24
ENCODER = ViTConfig(width=32, depth=2, heads=4, rope_base=100.0)
TEXT = TextConfig(width=16, depth=2, heads=2, vocab_size=WORDS, max_tokens=8, rope_base=100.0)
CONFIG = ContrastiveConfig(scale_init=5.0, bias_init=-3.0)


def build(recompute="none", **changes):
    tower = ContrastiveTower(ENCODER, TEXT, dataclasses.replace(CONFIG, **changes), width=WIDTH, recompute=recompute)
    initialize(tower, seed=0)
    return tower


@pytest.fixture(scope="module")
def tower():
    return build()


@pytest.fixture
def images():
    return packed(random_images(GRIDS), GRIDS)


@pytest.fixture
def texts():
    return PackedTexts.of(np.random.default_rng(0).integers(0, WORDS, LENGTHS.sum()), LENGTHS, CPU)


@pytest.fixture
def khot(texts):
    sets, frequency = TokenSets.of(texts.tokens_T.numpy(), LENGTHS), InverseFrequency(WORDS, CPU)
    frequency.update([sets], None)
    return frequency.k_hot(sets)


FRAMES_B = torch.tensor(FRAMES)


def test_outputs_are_the_contracted_ones(tower, images, texts, khot):
    with torch.no_grad():
        image_BE, text_BE, scale, bias, superclass_B = tower(images, texts, khot, FRAMES_B)
        assert image_BE.shape == text_BE.shape == (3, WIDTH) and superclass_B.shape == (3,)
        for unit_BE in (image_BE, text_BE):
            torch.testing.assert_close(unit_BE.norm(dim=1), torch.ones(3))
        assert scale.shape == bias.shape == ()
        assert float(scale) == pytest.approx(5.0) and float(bias) == -3.0
        assert torch.equal(tower.embed_images(images, FRAMES_B), image_BE)
        assert torch.equal(tower.embed_texts(texts), text_BE)


def test_superclass_reads_the_mean_before_it_is_normalised(tower, images, texts, khot):
    with torch.no_grad():
        pooled_IE = tower.pool(tower.encoder(images), images.segments)
        mean_BE = torch.stack([part.mean(0) for part in pooled_IE.split(FRAMES)])
        wanted_B = superclass_loss(tower.contrastive.classifier(mean_BE), khot)
        image_BE, _, _, _, superclass_B = tower(images, texts, khot, FRAMES_B)
    torch.testing.assert_close(superclass_B, wanted_B, rtol=0, atol=1e-6)
    torch.testing.assert_close(image_BE, mean_BE / mean_BE.norm(dim=1, keepdim=True), rtol=0, atol=1e-6)
    assert (mean_BE.norm(dim=1) - 1).abs().min() > 0.1


def test_the_mean_over_images_has_the_gradient_of_a_mean():
    pooled_IE = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight_BE = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    (mean_of_images(pooled_IE, FRAMES_B) * weight_BE).sum().backward()
    wanted_IE = (weight_BE / FRAMES_B[:, None]).repeat_interleave(FRAMES_B, dim=0)
    torch.testing.assert_close(pooled_IE.grad, wanted_IE)
    assert mean_of_images(pooled_IE, None) is pooled_IE


def test_a_sample_has_no_part_in_another(tower, images, texts, khot):
    """To the bit, for its frames as for its text."""
    with torch.no_grad():
        before = tower(images, texts, khot, FRAMES_B)
        others = random_images(GRIDS)
        others[2][-1] = 255 - others[2][-1]
        moved = tower(packed(others, GRIDS), texts, khot, FRAMES_B)
        assert [(a != b).any(-1).tolist() for a, b in zip(before[:2], moved[:2], strict=True)] == [
            [False, True, False],
            [False] * 3,
        ]
        assert (before[4] != moved[4]).tolist() == [False, True, False]
        tokens_T = texts.tokens_T.numpy().copy()
        tokens_T[4] = (tokens_T[4] + 1) % WORDS
        moved_BE = tower.embed_texts(PackedTexts.of(tokens_T, LENGTHS, CPU))
        assert (moved_BE != before[1]).any(1).tolist() == [False, True, False]


def test_embeddings_depend_on_relative_positions_only(tower):
    images = random_images(GRIDS)
    shifted = packed(images, GRIDS, shift_I2=[[7, 0], [0, 9], [30, 20], [1, 1], [0, 0]])
    with torch.no_grad():
        before_BE, moved_BE = tower.embed_images(packed(images, GRIDS)), tower.embed_images(shifted)
    torch.testing.assert_close(moved_BE, before_BE, rtol=0, atol=1e-5)


def test_every_parameter_learns_also_from_a_blank(images, texts, khot):
    tower = build()
    sets, frequency = TokenSets.of(np.zeros(1, np.int64), np.ones(1, np.int64)), InverseFrequency(WORDS, CPU)
    blank = (PackedImages.blank(VisionSpec(), CPU), PackedTexts.blank(CPU), frequency.k_hot(sets))
    for inputs in ((images, texts, khot, FRAMES_B), blank):
        tower.zero_grad()
        sum(output.double().square().sum() for output in tower(*inputs)).backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tower.parameters())


def test_bf16_weights_give_fp32_outputs(images, texts, khot):
    outputs = build().bfloat16()(images, texts, khot, FRAMES_B)
    assert {output.dtype for output in outputs} == {torch.float32}
    torch.testing.assert_close(outputs[0].norm(dim=1), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("recompute", ["selective", "full", "replay"])
def test_recomputation_changes_no_gradient(images, texts, khot, recompute):
    gradients = []
    for mode in ("none", recompute):
        tower = build(mode)
        sum(output.square().sum() for output in tower(images, texts, khot, FRAMES_B)).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tower.parameters()]))
    assert torch.equal(*gradients)


def test_without_superclass_there_is_no_classifier_and_no_loss(images, texts):
    tower = build(superclass_weight=0.0)
    assert not any("classifier" in name for name, _ in tower.named_parameters())
    assert tower(images, texts, None, FRAMES_B)[4].tolist() == [0, 0, 0]


def test_nothing_is_read_back_from_the_device(images, texts, khot):
    outputs = build().to("meta")(*(to_meta(value) for value in (images, texts, khot, FRAMES_B)))
    sum(output.sum() for output in outputs).backward()
    assert [output.shape for output in outputs] == [(3, WIDTH), (3, WIDTH), (), (), (3,)]


def test_full_size_follows_the_report():
    """One embedding of 1280; beside the encoder's 532M an attention pool."""
    with torch.device("meta"):
        tower = ContrastiveTower(ViTConfig(), TextConfig(depth=1), ContrastiveConfig(), width=1280)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in tower.named_children()}
    assert count["encoder"] == 532_047_360 and 19e6 < count["pool"] < 20.5e6
    assert list(count) == ["encoder", "pool", "text", "contrastive"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"scale_init": 0.0}, "objective.contrastive.scale_init=0.0"),
        ({"superclass_weight": -1.0}, "objective.contrastive.superclass_weight=-1.0"),
        ({"siglip_weight": float("nan")}, "objective.contrastive.siglip_weight=nan"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(changes, sentence):
    with pytest.raises(ValueError) as refused:
        dataclasses.replace(CONFIG, **changes)
    assert sentence in str(refused.value)
