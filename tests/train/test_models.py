"""The encoder and the LLM as functions: their sizes, what may see what, and what recomputation must not change.

Equality to the bit where the same numbers are multiplied in the same shapes; 1e-6 or 1e-5 where a matrix product is cut
into other shapes, which rounds differently.
"""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from tandem.data.media.image import to_patches
from tandem.data.vision import VisionSpec
from tandem.parallel.engines.llm_shards import shards_of
from tandem.train.cost.flops import llm_parameters
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import SeedViT, ViTConfig, pool
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_recompute import RECOMPUTE as LLM_RECOMPUTE
from tandem.train.models.layers import blocks
from tandem.train.models.layers.blocks import RECOMPUTE
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import drop_path_factors
from tandem.train.models.layers.rotary import axis_angles, tables, turn
from tandem.train.models.towers.vision_tower import VisionTower
from tests.support import ROOT, settings
from tests.train.toys import LLM_KINDS, SWITCHED, packed, random_images

GRIDS = [[2, 4], [4, 4], [4, 4], [6, 2], [4, 4]]  # equal neighbours run as one batch, others alone
BORDERS = np.cumsum([0, *(down * across for down, across in GRIDS)]).tolist()

# ---- sizes ---------------------------------------------------------------------------------------------------------


def full_scale():
    return OmegaConf.load(ROOT / "recipes/model/seed_vl.yaml")


def test_full_size_encoder_has_the_parameters_of_the_report():
    with torch.device("meta"):
        encoder = SeedViT(ViTConfig(**full_scale().encoder))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 532_047_360


def test_full_size_llm_has_about_20b_active_parameters():
    everything, active = llm_parameters(LLMConfig(**full_scale().llm))
    assert 19.5e9 < active < 20.5e9 < everything


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_parameter_formula_counts_a_real_model(kind, build_llm):
    llm = build_llm(kind)
    counts = {shard.name: shard.local.numel() for shard in shards_of(llm.chunk)}
    idle = sum(
        count
        for name, count in counts.items()
        if "local_experts." in name and int(name.partition("local_experts.")[2].split(".")[0]) >= llm.config.top_k
    )
    assert llm_parameters(llm.config) == (sum(counts.values()), sum(counts.values()) - idle)
    assert (idle > 0) == (llm.config.num_experts > 0)


# ---- the encoder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tower():
    return toy_tower("none")


def toy_tower(recompute):
    tower = VisionTower(settings("stage1").model.encoder, ConnectorConfig(), 48, recompute)
    initialize(tower, seed=0)
    return tower


@pytest.fixture(scope="module")
def encode(tower):
    """encode(packed images) -> features of every patch, without autograd."""
    return torch.no_grad()(tower.encoder)


def test_attention_stays_inside_an_image(encode):
    """And reaches everywhere in it: its last patch moves the features of its first."""
    images = random_images(GRIDS)
    before_ND = encode(packed(images, GRIDS))
    for changed, (first, last) in enumerate(itertools.pairwise(BORDERS)):
        others = [image.copy() for image in images]
        others[changed][-1] = 255 - others[changed][-1]
        moved_N = (encode(packed(others, GRIDS)) != before_ND).any(dim=1)
        assert moved_N[first:last].all(), f"image {changed} does not see all of itself"
        assert not moved_N[:first].any() and not moved_N[last:].any(), f"image {changed} leaks"


def test_packing_is_one_image_at_a_time(encode):
    images = random_images(GRIDS)
    together_ND = encode(packed(images, GRIDS))
    alone_ND = torch.cat([encode(packed([image], [grid])) for image, grid in zip(images, GRIDS, strict=True)])
    torch.testing.assert_close(together_ND, alone_ND, rtol=0, atol=1e-6)


def test_packing_order_does_not_matter(encode):
    images, order = random_images(GRIDS), [4, 0, 3, 1, 2]
    features = encode(packed(images, GRIDS)).split([len(image) for image in images])
    shuffled_ND = encode(packed([images[i] for i in order], [GRIDS[i] for i in order]))
    torch.testing.assert_close(shuffled_ND, torch.cat([features[i] for i in order]), rtol=0, atol=1e-6)


def test_features_depend_on_relative_positions_only(encode):
    """Moving a whole image changes nothing; the same patches as another shape are another image."""
    images = random_images(GRIDS)
    before_ND = encode(packed(images, GRIDS))
    moved_ND = encode(packed(images, GRIDS, shift_I2=[[7, 0], [0, 9], [30, 20], [1, 1], [0, 0]]))
    torch.testing.assert_close(moved_ND, before_ND, rtol=0, atol=1e-5)  # angles of larger positions round more
    reshaped_ND = encode(packed(images[1:2], [[2, 8]]))
    assert (reshaped_ND - before_ND[BORDERS[1] : BORDERS[2]]).abs().max() > 1e-2


def test_rotary_scores_depend_on_both_axes_of_the_difference():
    """The score of a query and a key turned at two places is that of any two places as far apart, on either axis."""
    encoder = SeedViT(settings("stage1").model.encoder)
    width = encoder.config.width // encoder.config.heads
    q_K, k_K = torch.randn(2, width, generator=torch.Generator().manual_seed(0))

    def score(query, key):
        cos_2K, sin_2K = encoder.rotary(torch.tensor([query, key]))
        turned_2K = turn(torch.stack([q_K, k_K])[:, None], cos_2K, sin_2K)[:, 0]
        return float(turned_2K[0] @ turned_2K[1])

    for dy, dx in ((0, 0), (3, 0), (0, 3), (-2, 5)):
        here, there = score((10, 10), (10 + dy, 10 + dx)), score((40, 17), (40 + dy, 17 + dx))
        assert here == pytest.approx(there, abs=1e-4)
    scores = [score((0, 0), key) for key in ((0, 0), (3, 0), (0, 3), (3, 3))]
    assert min(abs(a - b) for i, a in enumerate(scores) for b in scores[:i]) > 1e-2


def test_rotation_keeps_lengths_and_dtype():
    x_THK = torch.randn(5, 3, 8, dtype=torch.bfloat16)
    turned_THK = turn(x_THK, *tables(axis_angles(torch.arange(5), 8, 100.0)))
    assert turned_THK.dtype == torch.bfloat16 and torch.equal(turned_THK[0], x_THK[0])
    torch.testing.assert_close(turned_THK.float().norm(dim=-1), x_THK.float().norm(dim=-1), rtol=2e-2, atol=0)


def test_pooling_is_the_mean_over_2x2_neighbours_of_the_plain_grid():
    grids, width, generator = [[4, 6], [2, 2], [6, 4]], 5, torch.Generator().manual_seed(0)
    plain = [torch.randn(down, across, width, generator=generator) for down, across in grids]
    rows = [
        grid_HWD[VisionSpec().positions([grid])[:, 0], VisionSpec().positions([grid])[:, 1]]
        for grid_HWD, grid in zip(plain, grids, strict=True)
    ]
    wanted = [F.avg_pool2d(grid_HWD.permute(2, 0, 1), 2).flatten(1).T for grid_HWD in plain]
    torch.testing.assert_close(pool(torch.cat(rows), 2), torch.cat(wanted))


def test_positions_are_those_of_the_patches():
    """A picture that spells each patch's place in its pixels comes out with those places."""
    down, across = 6, 4
    picture_HW3 = np.zeros((down * 14, across * 14, 3), np.uint8)
    for y, x in np.ndindex(down, across):
        picture_HW3[y * 14 : (y + 1) * 14, x * 14 : (x + 1) * 14] = (y, x, 0)
    patches_NP = to_patches(picture_HW3, (down, across), VisionSpec())
    assert np.array_equal(patches_NP.reshape(-1, 14 * 14, 3)[:, 0, :2], VisionSpec().positions([[down, across]]))


def test_frozen_encoder_runs_without_autograd():
    tower = toy_tower("none")
    tower.encoder.requires_grad_(False)
    seen = []
    for block in tower.encoder.blocks:
        block.mlp_up.register_forward_hook(lambda module, inputs, output: seen.append(torch.is_grad_enabled()))
    rows_VD = tower(packed(random_images(GRIDS), GRIDS))
    rows_VD.sum().backward()
    assert seen == [False] * len(tower.encoder.blocks)
    assert all(parameter.grad is None for parameter in tower.encoder.parameters())
    assert all(parameter.grad is not None for parameter in tower.adapter.parameters())


def test_recomputation_changes_memory_and_no_gradient():
    gradients, kept_bytes = {}, {}
    for recompute in RECOMPUTE:
        tower, kept = toy_tower(recompute), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, kept=kept: kept.append(x.nbytes) or x, lambda x: x):
            rows_VD = tower(packed(random_images(GRIDS), GRIDS))
        rows_VD.square().sum().backward()
        gradients[recompute] = torch.cat([parameter.grad.flatten() for parameter in tower.parameters()])
        kept_bytes[recompute] = sum(kept)
    assert gradients["none"].abs().sum() > 0
    for recompute in RECOMPUTE:
        assert torch.equal(gradients[recompute], gradients["none"]), recompute
    assert kept_bytes["full"] < kept_bytes["selective"] < kept_bytes["none"] == kept_bytes["replay"]


# ---- dropped branches ------------------------------------------------------------------------------------------------

DEPTH = 2


def with_factors(keep_LI, images=None):
    return dataclasses.replace(packed(images or random_images(GRIDS), GRIDS), keep_LI=torch.from_numpy(keep_LI))


def test_factors_of_one_change_nothing(encode):
    ones_LI = np.ones((2 * DEPTH, len(GRIDS)), np.float32)
    assert torch.equal(encode(with_factors(ones_LI)), encode(packed(random_images(GRIDS), GRIDS)))


def test_an_image_without_branches_is_its_embedding(tower, encode):
    """And its neighbours are what they were, to the bit."""
    keep_LI = np.ones((2 * DEPTH, len(GRIDS)), np.float32)
    keep_LI[:, 1] = 0
    before_ND, after_ND = encode(packed(random_images(GRIDS), GRIDS)), encode(with_factors(keep_LI))
    first, last = BORDERS[1:3]
    with torch.no_grad():
        embedded_ND = tower.encoder.final_norm(tower.encoder.embed(packed(random_images(GRIDS), GRIDS).patches_NP))
    assert torch.equal(after_ND[first:last], embedded_ND[first:last])
    before_ND[first:last] = after_ND[first:last]
    assert torch.equal(after_ND, before_ND)


def test_each_factor_is_of_one_branch_of_one_block(tower, encode):
    """Attention and MLP of each block in turn: a factor is as good as a scaled output matrix."""
    outputs = [matrix for block in tower.encoder.blocks for matrix in (block.projection, block.mlp_down)]
    images = packed(random_images(GRIDS), GRIDS)
    for branch, matrix in enumerate(outputs):
        keep_LI = np.ones((2 * DEPTH, len(GRIDS)), np.float32)
        keep_LI[branch] = 2.0  # a power of two scales without rounding
        found_ND = encode(with_factors(keep_LI))
        with torch.no_grad():
            for parameter in matrix.parameters():
                parameter.mul_(2.0)
            wanted_ND = encode(images)
            for parameter in matrix.parameters():
                parameter.mul_(0.5)
        torch.testing.assert_close(found_ND, wanted_ND, rtol=0, atol=1e-6)
        assert (found_ND - encode(images)).abs().max() > 1e-3


def test_recomputation_drops_the_same_branches():
    keep_LI, gradients = drop_path_factors(DEPTH, 0.6, np.arange(len(GRIDS))[:, None]), {}
    assert (keep_LI == 0).any() and (keep_LI > 1).any()
    for recompute in RECOMPUTE:
        tower = toy_tower(recompute)
        tower(with_factors(keep_LI)).square().sum().backward()
        gradients[recompute] = torch.cat([parameter.grad.flatten() for parameter in tower.parameters()])
        assert torch.equal(gradients[recompute], gradients["none"]), recompute


def test_factors_stay_fp32_beside_bf16_weights():
    """bf16 would round 1 / (1 - p), and so be biased; the sum is rounded once."""
    x_ND, branch_ND = torch.randn(2, 100, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    keep_N = torch.full((100,), 1 / 0.9)
    added_ND = blocks._AddKept.apply(x_ND, branch_ND, keep_N)
    assert added_ND.dtype == torch.bfloat16
    assert torch.equal(added_ND, (x_ND.float() + branch_ND.float() * keep_N[:, None]).bfloat16())


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_impossible_drop_rates_are_refused(rate):
    with pytest.raises(ValueError, match=rf"model.encoder.drop_path={rate}"):
        ViTConfig(drop_path=rate)


# ---- the LLM -------------------------------------------------------------------------------------------------------

LENGTHS = [10, 16, 6, 2, 14]
SPANS = list(zip(np.cumsum([0, *LENGTHS[:-1]]).tolist(), np.cumsum(LENGTHS).tolist(), strict=True))


@pytest.fixture
def row_T():
    return torch.randint(0, 384, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_samples_of_a_row_do_not_see_each_other(kind, build_llm, row_T):
    """Experts hold tokens of all samples, and other tokens make their matrices other shapes: to 1e-6 with experts."""
    llm = build_llm(kind)
    tolerance = 1e-6 if llm.config.num_experts else 0
    with torch.no_grad():
        before_T = llm.losses(row_T, LENGTHS)
        for first, last in SPANS:
            other_T = row_T.clone()
            other_T[first:last] = (row_T[first:last] + 1) % llm.config.vocab_size
            moved_T = (llm.losses(other_T, LENGTHS) - before_T).abs()
            assert (moved_T[first:last] > 1e-3).all()
            moved_T[first:last] = 0
            assert moved_T.max() <= tolerance


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_packed_row_is_its_samples_alone(kind, build_llm, row_T):
    llm = build_llm(kind)
    with torch.no_grad():
        alone = [llm.losses(row_T[first:last], [last - first]) for first, last in SPANS]
        torch.testing.assert_close(llm.losses(row_T, LENGTHS), torch.cat(alone), rtol=0, atol=1e-5)


def test_visual_rows_take_the_place_of_the_word_and_are_seen_from_there_on(build_llm, row_T):
    llm = build_llm("dense")
    first, last = SPANS[1]
    at_U = torch.tensor([first + 3, first + 4, first + 5])
    rows_UD = torch.randn(3, llm.config.width, generator=torch.Generator().manual_seed(0)) * 0.06
    with torch.no_grad():
        plain_T, shown_T = llm.losses(row_T, LENGTHS), llm.losses(row_T, LENGTHS, rows_UD, at_U)
        words_UD = llm.chunk.embedding.word_embeddings.weight[row_T[at_U]]
        assert torch.equal(llm.losses(row_T, LENGTHS, words_UD, at_U), plain_T)
    changed_T = shown_T != plain_T
    assert changed_T[first + 3 : last].all()
    assert not changed_T[: first + 3].any() and not changed_T[last:].any()


@pytest.mark.parametrize("kind", [*LLM_KINDS, *SWITCHED])
def test_recomputing_layers_changes_no_gradient(kind, build_llm, row_T):
    gradients = []
    for recompute in LLM_RECOMPUTE:
        llm = build_llm(kind, recompute=recompute)
        leaf_UD = torch.full((3, llm.config.width), 0.05, requires_grad=True)
        llm.losses(row_T, LENGTHS, leaf_UD, torch.arange(3)).sum().backward()
        wanted = [leaf_UD.grad, *(parameter.grad for parameter in llm.chunk.parameters())]
        gradients.append(torch.cat([gradient.flatten() for gradient in wanted]))
    assert gradients[0].abs().sum() > 0
    assert all(torch.equal(gradients[0], others) for others in gradients[1:])


@pytest.mark.parametrize("recompute", LLM_RECOMPUTE)
def test_layers_hold_nothing_of_a_step_that_is_over(recompute, build_llm, row_T):
    """A tensor with its graph, held until the next forward, would hold a layer's activations that were made again."""
    llm = build_llm("experts", recompute=recompute)
    llm.losses(row_T, LENGTHS).sum().backward()
    holders = list(llm.chunk.modules())
    holders += [module.token_dispatcher for module in holders if hasattr(module, "token_dispatcher")]
    held = [(holder, name) for holder in holders for name, value in vars(holder).items() if hasattr(value, "grad_fn")]
    assert len(holders) > len(list(llm.chunk.modules()))
    assert not [(type(holder).__name__, name) for holder, name in held if getattr(holder, name).grad_fn is not None]


def test_initial_weights_depend_on_seed_and_name_alone(build_llm):
    """The same tensor of a smaller model is the same numbers; another one of the same shape is not."""
    one, other = build_llm("experts"), build_llm("experts and a shared one")
    shared = dict(other.chunk.named_parameters())
    for name, parameter in one.chunk.named_parameters():
        assert torch.equal(parameter, shared[name]), name
    towers = [toy_tower("none"), toy_tower("full")]
    for (name, mine), theirs in zip(towers[0].named_parameters(), towers[1].parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    first, second = (block.qkv.weight for block in towers[0].encoder.blocks)
    assert not torch.equal(first, second)


def test_heads_that_two_axes_cannot_share_are_refused():
    sizes = dataclasses.asdict(settings("stage1").model.encoder)
    with pytest.raises(ValueError, match=r"model.encoder.width=66 over model.encoder.heads=4"):
        ViTConfig(**{**sizes, "width": 66})
