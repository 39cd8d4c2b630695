"""Connectors of models: what the program asks of each, and what it says of options that cannot work."""

from dataclasses import dataclass, field

import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLPatchMerger

from tandem.train.models import connectors
from tandem.train.models.connectors.base import Connector, ConnectorConfig, Sizes
from tandem.train.models.connectors.mlp import PooledMLP
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.vision import vision_spec
from tests.support import settings

SIZES = Sizes(width=8, llm_width=12, merge=3, norm_eps=1e-6)


@pytest.mark.parametrize("name", connectors.names())
def test_a_block_of_patches_becomes_one_row_whatever_the_others_are(name):
    kind = connectors.find(name)
    torch.manual_seed(0)
    module, features_ND = kind.build(SIZES, kind.read({})), torch.randn(5 * 9, 8)
    rows_VE = module(features_ND)
    assert rows_VE.shape == (5, 12)
    features_ND[9:] = torch.randn(36, 8)
    assert torch.equal(module(features_ND)[0], rows_VE[0])
    assert kind.parameters(SIZES, kind.read({})) == sum(parameter.numel() for parameter in module.parameters())


def test_the_reports_connector_by_hand():
    """2 x 12 x (8 + 12) operations a token; a norm of 8 and two products with their biases."""
    kind = PooledMLP()
    assert kind.token_flops(SIZES, None) == 2 * 12 * (8 + 12)
    assert kind.parameters(SIZES, None) == 2 * 8 + (8 + 1) * 12 + (12 + 1) * 12


def test_the_merger_is_that_of_qwen2_5_vl():
    """Within rounding, from the same weights; 2 x 72 x (72 + 12) operations a token."""
    theirs = Qwen2_5_VLPatchMerger(dim=12, context_dim=8, spatial_merge_size=3)
    kind = connectors.find("merger")
    ours = kind.build(SIZES, kind.read({"norm": "rms"}))
    names = {"norm.weight": "ln_q.weight"}
    names |= {f"{a}.{end}": f"mlp.{b}.{end}" for a, b in (("up", 0), ("down", 2)) for end in ("weight", "bias")}
    weights = theirs.state_dict()
    ours.load_state_dict({name: weights.pop(other) for name, other in names.items()})
    assert not weights
    features_ND = torch.randn(45, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(features_ND), theirs(features_ND), rtol=0, atol=1e-6)
    assert kind.token_flops(SIZES, None) == 2 * 72 * (72 + 12)
    with pytest.raises(ValueError, match=r"model.connector.options.norm=group: must be one of layer, rms"):
        kind.read({"norm": "group"})


@dataclass
class Options:
    hidden: int
    bias: bool = True
    scale: float | None = None
    widths: list[int] = field(default_factory=list)


class Picky(Connector):
    Options = Options
    build = token_flops = token_elements = None


Picky.__abstractmethods__ = frozenset()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hiden": 3}, "model.connector.options.hiden: there is no such option; did you mean hidden?"),
        ({"hidden": 3, "x": 1}, "model.connector.options.x: there is no such option"),
        ({"hidden": "wide"}, "model.connector.options.hidden=wide: Value 'wide' of type 'str' could not be converted"),
        ({"hidden": 3, "bias": "x"}, "model.connector.options.bias=x: "),
        ({"hidden": 3, "scale": "a"}, "model.connector.options.scale=a: "),
        ({}, "model.connector.options.hidden is missing"),
    ],
)
def test_options_that_cannot_work_are_refused(options, sentence):
    with pytest.raises(ValueError) as refusal:
        Picky().read(options)
    assert str(refusal.value).startswith(sentence) and "\n" not in str(refusal.value)


def test_options_have_their_types():
    assert Picky().read({"hidden": 3, "scale": 1, "widths": [2]}) == Options(3, True, 1.0, [2])


@pytest.mark.parametrize("name", connectors.names())
def test_norms_begin_as_norms_whatever_they_are_called(name):
    kind = connectors.find(name)
    module = kind.build(SIZES, kind.read({}))
    module.ln = torch.nn.LayerNorm(4)
    initialize(module, seed=0)
    norms = [part for part in module.modules() if isinstance(part, torch.nn.LayerNorm | torch.nn.RMSNorm)]
    assert len(norms) >= 2 and all((norm.weight == 1).all() for norm in norms)
    assert not any(norm.bias.any() for norm in norms if isinstance(norm, torch.nn.LayerNorm))


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"model.connector.kind=mpl: must be one of merger, mlp; did you mean mlp\?"):
        vision_spec(ViTConfig(), ConnectorConfig(kind="mpl"), llm_width=8)
    with pytest.raises(ValueError, match=r"model.connector.kind=base: must be one of merger, mlp"):
        connectors.find("base")


def test_options_come_from_the_settings():
    config = settings("stage1", "+model.connector.options.hidden=3")
    assert config.model.connector.options == {"hidden": 3}
    with pytest.raises(ValueError, match="model.connector.options.hidden: there is no such option"):
        _ = config.vision
