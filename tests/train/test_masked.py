"""Masked image modelling, both readings: what is seen, what is predicted, what it costs.

Equality to the bit where shapes are the same; 1e-5 where a matrix product is cut into other shapes.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from tandem.data.vision import VisionSpec
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import drop_path_factors, mask_images
from tandem.train.models.towers.masked import READINGS, MaskedImages, MimConfig, MimTower
from tests.train.toys import CPU, packed, random_images, to_meta

GRIDS = [[2, 4], [4, 4], [4, 4], [6, 2], [4, 4]]
PATCHES = [down * across for down, across in GRIDS]
BORDERS = np.cumsum([0, *PATCHES]).tolist()
ENCODER = ViTConfig(width=32, depth=2, heads=4, rope_base=100.0)
MASK_N = mask_images(PATCHES, 0.75, np.arange(len(GRIDS))[:, None])
MASKED = int(MASK_N.sum())
TEACHER_WIDTH = 20


def build(masked, recompute="none"):
    config = MimConfig(masked=masked, decoder_width=16, decoder_depth=1, decoder_heads=2)
    tower = MimTower(ENCODER, config, TEACHER_WIDTH, recompute)
    initialize(tower, seed=0)
    return tower


def masked_images(images=None, mask_N=MASK_N, **changes):
    return MaskedImages.of(dataclasses.replace(packed(images or random_images(GRIDS), GRIDS), **changes), mask_N)


@pytest.fixture
def target_MC():
    return torch.randn(MASKED, TEACHER_WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=READINGS)
def tower(request):
    return build(request.param)


def predict(tower, masked):
    with torch.no_grad():
        return tower.predict(masked)


def test_one_loss_a_masked_patch_and_it_is_one_minus_cosine(tower, target_MC):
    (loss_M,) = tower(masked_images(), target_MC)
    predicted_MC = predict(tower, masked_images()).double()
    assert loss_M.shape == (MASKED,) and loss_M.dtype == torch.float32
    for loss, mine_C, theirs_C in zip(loss_M.detach(), predicted_MC, target_MC.double(), strict=True):
        wanted = 1 - float(mine_C @ theirs_C / (mine_C @ mine_C).sqrt() / (theirs_C @ theirs_C).sqrt())
        assert float(loss) == pytest.approx(wanted, abs=1e-6)


def test_the_loss_is_fp32_and_learns_under_bf16_weights(tower, target_MC):
    tower = tower.bfloat16()
    (loss_M,) = tower(masked_images(), target_MC)
    predicted_MC = predict(tower, masked_images())
    wanted_M = 1 - torch.cosine_similarity(predicted_MC.double(), target_MC.double())
    assert predicted_MC.dtype == torch.bfloat16 and loss_M.dtype == torch.float32
    torch.testing.assert_close(loss_M.double(), wanted_M, rtol=0, atol=1e-6)
    loss_M.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tower.parameters())


def test_every_parameter_learns_also_from_a_blank(tower, target_MC):
    for masked, target in (
        (masked_images(), target_MC),
        (MaskedImages.blank(VisionSpec(), CPU), torch.zeros(3, TEACHER_WIDTH)),
    ):
        tower.zero_grad()
        (loss_M,) = tower(masked, target)
        loss_M.sum().backward()
        assert len(loss_M) == len(target) and loss_M.isfinite().all()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in tower.parameters())


def test_masked_pixels_are_not_seen_and_visible_ones_are(tower):
    images = random_images(GRIDS)
    before_MC = predict(tower, masked_images(images))
    for seen in (False, True):
        others = [image.copy() for image in images]
        first, last = BORDERS[1:3]
        place = int(np.flatnonzero(MASK_N[first:last] != seen)[0])
        others[1][place] = 255 - others[1][place]
        moved_N = np.zeros(len(MASK_N), bool)
        moved_N[MASK_N] = (predict(tower, masked_images(others)) != before_MC).any(1)
        assert moved_N[first:last][MASK_N[first:last]].all() if seen else not moved_N.any()
        assert not moved_N[:first].any() and not moved_N[last:].any(), "an image leaks"


def test_packing_is_one_image_at_a_time(tower):
    images, alone = random_images(GRIDS), []
    for image, grid, (first, last) in zip(images, GRIDS, itertools.pairwise(BORDERS), strict=True):
        alone.append(predict(tower, MaskedImages.of(packed([image], [grid]), MASK_N[first:last])))
    torch.testing.assert_close(predict(tower, masked_images(images)), torch.cat(alone), rtol=0, atol=1e-5)


def test_dropped_patches_take_no_part_in_the_encoder():
    """Neither in its embedding nor in its trunk; the decoder has all places and answers at the masked ones."""
    tower, rows = build("drop"), []
    blocks = [block.mlp_up for block in (*tower.encoder.blocks, *tower.mim.decoder.blocks)]
    watched = (tower.encoder.patch_embedding, *blocks, tower.mim.head)
    for module in watched:
        module.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    predict(tower, masked_images())
    visible = len(MASK_N) - MASKED
    assert rows == [visible, visible, visible, len(MASK_N), MASKED]


def test_dropping_is_the_encoder_on_images_of_the_visible_patches(target_MC):
    tower, masked, mask_N = build("drop"), masked_images(), torch.from_numpy(MASK_N)
    images = masked.images
    of_visible = dataclasses.replace(
        images,
        patches_NP=images.patches_NP[~mask_N],
        positions_N2=images.positions_N2[~mask_N],
        segments=masked.visible,
    )
    features = []
    tower.encoder.final_norm.register_forward_hook(lambda module, inputs, output: features.append(output))
    predict(tower, masked)
    with torch.no_grad():
        tower.encoder(of_visible)
    assert torch.equal(*features)


def test_places_count_where_patches_are_dropped():
    """Only relative to each other: moving a whole image changes nothing; masked places differ from each other."""
    tower, images = build("drop"), random_images(GRIDS)
    before_MC = predict(tower, masked_images(images))
    shifted = packed(images, GRIDS, shift_I2=[[7, 0], [0, 9], [30, 20], [1, 1], [0, 0]])
    torch.testing.assert_close(predict(tower, MaskedImages.of(shifted, MASK_N)), before_MC, rtol=0, atol=1e-5)
    for part_mC in before_MC.split(np.add.reduceat(MASK_N, BORDERS[:-1]).tolist()):
        assert (torch.cdist(part_mC, part_mC) + 9 * torch.eye(len(part_mC))).min() > 1e-3


def test_masked_places_of_an_image_are_one_and_the_same_to_tokens_without_rotation():
    """What that reading of the report comes to: the same token, not turned, sees the same, wherever it is."""
    tower, images = build("token"), random_images(GRIDS)
    before_MC = predict(tower, masked_images(images))
    for part_mC in before_MC.split(np.add.reduceat(MASK_N, BORDERS[:-1]).tolist()):
        torch.testing.assert_close(part_mC, part_mC[:1].expand_as(part_mC), rtol=0, atol=1e-6)
    moved = packed(images, GRIDS).positions_N2 + 5 * torch.from_numpy(MASK_N)[:, None]
    assert torch.equal(predict(tower, masked_images(images, positions_N2=moved)), before_MC)


@pytest.mark.parametrize("reading", READINGS)
def test_recomputation_changes_no_gradient_with_branches_dropped(reading, target_MC):
    keep_LI = torch.from_numpy(drop_path_factors(ENCODER.depth, 0.5, np.arange(len(GRIDS))[:, None]))
    assert (keep_LI == 0).any()
    gradients = []
    for recompute in ("none", "selective", "full", "replay"):
        tower = build(reading, recompute)
        (loss_M,) = tower(masked_images(keep_LI=keep_LI), target_MC)
        loss_M.sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in tower.parameters()]))
    assert gradients[0].abs().sum() > 0
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients[1:])


def test_nothing_is_read_back_from_the_device(tower, target_MC):
    """Counts and places all come from the host."""
    keep_LI = torch.ones(2 * ENCODER.depth, len(GRIDS))
    (loss_M,) = tower.to("meta")(to_meta(masked_images(keep_LI=keep_LI)), target_MC.to("meta"))
    loss_M.sum().backward()
    assert loss_M.shape == (MASKED,)


def test_mask_tokens_start_small_and_not_at_zero():
    """A norm of a zero row has a gradient of 1 / sqrt(eps)."""
    for token in (build("token").mim.mask.token, build("drop").mim.decoder.mask.token):
        assert 0.5 < float(token.detach().norm()) < 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"mask_ratio": 1.0}, "objective.mim.mask_ratio=1.0"),
        ({"masked": "both"}, "objective.mim.masked=both: must be one of drop, token"),
        ({"decoder_depth": 0}, "objective.mim.decoder_depth=0"),
        ({"decoder_width": 36, "decoder_heads": 6}, "mim.decoder_width=36 over objective.mim.decoder_heads=6"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(changes, sentence):
    with pytest.raises(ValueError) as refused:
        MimConfig(**changes)
    assert sentence in str(refused.value)
