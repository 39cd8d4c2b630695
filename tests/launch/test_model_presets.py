"""Presets of `model/llm`: parameters as published, at toy size the same architecture, and nothing of another model."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from tandem.train.config.checks import check_config
from tandem.train.config.settings import composed, read_config
from tandem.train.cost.flops import llm_parameters
from tandem.train.families.base import OFF
from tandem.train.models.language.llm_config import NOT_OF_THE_MODEL, LLMConfig
from tests.support import ROOT

FOLDER = ROOT / "recipes/model/llm"
PUBLISHED = {  # (all, active) parameters: of the models' folders, and the active ones as their reports count them
    "qwen3_0_6b": (596_049_920, 596_049_920),
    "qwen3_8b": (8_190_735_360, 8_190_735_360),
    "qwen3_30b_a3b": (30_532_122_624, 3_353_032_704),
    "llama3_8b": (8_030_261_248, 8_030_261_248),
    "mixtral_8x7b": (46_702_792_704, 12_879_925_248),
    "moe_7b_a1b": (6_880_827_392, 1_243_682_816),
}
SIZES = {field.name for field in dataclasses.fields(LLMConfig) if field.default is dataclasses.MISSING}


def model(*overrides: str) -> LLMConfig:
    return read_config(composed(["+recipe=stage1", *overrides])).model.llm


def test_every_preset_is_counted():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == {*PUBLISHED, "plain"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_parameters(name):
    assert llm_parameters(model(f"model/llm={name}")) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_passes_the_checks_at_both_scales(name):
    sizes = ["parallel.tp=2", "parallel.pp=2", "data.sources.main.shards=['{0000..0009}.tar']"]
    check_config(read_config(composed(["+recipe=stage1", f"model/llm={name}", *sizes])), 8)
    check_config(read_config(composed(["+recipe=stage1", f"model/llm={name}", "scale=toy", *sizes])), 4)


@pytest.mark.parametrize("name", PUBLISHED)
def test_toy_scale_shrinks_a_preset_and_keeps_its_architecture(name):
    toy, whole = model(f"model/llm={name}", "scale=toy"), model(f"model/llm={name}")
    assert llm_parameters(toy)[0] < 1e6
    for key in toy.architecture.keys() - SIZES:
        assert getattr(toy, key) == getattr(whole, key), key
    assert (toy.rope_base, toy.norm_eps, bool(toy.num_experts)) == (
        whole.rope_base,
        whole.norm_eps,
        bool(whole.num_experts),
    )


def test_a_preset_outranks_the_model_and_a_key_outranks_the_preset():
    words = ["model=seed_vl", "model/llm=qwen3_8b", "scale=toy", "model.llm.layers=6"]
    for order in (words, words[::-1]):
        llm = model(*order)
        assert (llm.layers, llm.width, llm.num_experts, llm.qk_norm) == (6, 64, 0, True)


def test_plain_names_every_switch_and_turns_it_off():
    """So that none of another model is left in a preset."""
    plain = OmegaConf.to_container(OmegaConf.load(FOLDER / "plain.yaml"))
    assert plain == OFF
    required = SIZES - NOT_OF_THE_MODEL - plain.keys()
    for name in PUBLISHED:
        assert required <= OmegaConf.load(FOLDER / f"{name}.yaml").keys(), name
