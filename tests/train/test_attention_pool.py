"""Attention pooling against torch's own attention, one image at a time."""

import pytest
import torch
import torch.nn.functional as F

from tandem.parallel.kernels.attention import Segments
from tandem.train.models.layers.attention_pool import AttentionPool
from tandem.train.models.layers.initial import initialize

PATCHES = [8, 16, 16, 4, 12]


def build(out_width=32):
    pool = AttentionPool(32, 4, out_width, 1e-6)
    initialize(pool, seed=0)
    return pool


@pytest.fixture
def features_ND():
    return torch.randn(sum(PATCHES), 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("out_width", [32, 20])
def test_one_embedding_an_image(features_ND, out_width):
    pool = build(out_width)
    plain = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(torch.cat([pool.to_query.weight, pool.to_keys_values.weight]))
        plain.in_proj_bias.copy_(torch.cat([pool.to_query.bias, pool.to_keys_values.bias]))
        plain.out_proj.load_state_dict(pool.projection.state_dict())
        wanted = []
        for image_ND in features_ND.split(PATCHES):
            y_1D = plain(pool.query, image_ND, image_ND)[0]
            y_1D = y_1D + pool.mlp_down(F.gelu(pool.mlp_up(pool.mlp_norm(y_1D)), approximate="tanh"))
            wanted.append(pool.out(y_1D))
        pooled_IE = pool(features_ND, Segments.of(PATCHES))
    assert pooled_IE.shape == (len(PATCHES), out_width)
    torch.testing.assert_close(pooled_IE, torch.cat(wanted), rtol=0, atol=1e-6)


def test_an_image_is_pooled_from_its_own_patches(features_ND):
    pool, segments = build(), Segments.of(PATCHES)
    with torch.no_grad():
        before_IE = pool(features_ND, segments)
        other_ND = features_ND.clone()
        other_ND[8:24] += 1.0
        moved_I = (pool(other_ND, segments) != before_IE).any(1)
    assert moved_I.tolist() == [False, True, False, False, False]


def test_the_first_query_is_close_to_a_mean(features_ND):
    """Attention starts nearly even, and everything learns."""
    pool = build()
    q_K = pool.to_query(pool.query).detach().view(4, 8)
    k_NHK = pool.to_keys_values(features_ND).detach()[:, :32].view(-1, 4, 8)
    scores_NH = (k_NHK * q_K).sum(-1) * 8**-0.5
    assert scores_NH.abs().max() < 1.5
    pool(features_ND, Segments.of(PATCHES)).square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in pool.parameters() if parameter is not pool.query)
    assert pool.query.grad.abs().sum() > 0
