"""What a user names outranks presets: defaults, then recipe, then scale, then groups and files, then single keys."""

import shutil
import subprocess
import sys

import pytest
import yaml

from tandem.train.config.settings import composed, keys, one_sentence, read_config
from tests.support import ROOT

MIXED = """
defaults: [default]
sources:
  web: {shards: [web.tar], weight: 3, fps: 4.0}
  clips: {shards: [clips.tar], weight: 1}
tokenizer: mine.json
max_patches: 640
video: {budget: 200}
"""


@pytest.fixture
def folder(tmp_path):
    """Recipes with files of a user's."""
    recipes = shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (recipes / "data/mixed.yaml").write_text(MIXED)
    (recipes / "data/broken.yaml").write_text("sources: [a\n tokenizer: x")
    (recipes / "scale/small.yaml").write_text("name: small\nvalues: {train: {steps: 7}, optim: {lr: 0.5}}\n")
    return recipes


def of(folder, *overrides):
    return read_config(composed(overrides, folder))


def test_a_file_of_data_outranks_recipe_and_scale(folder):
    """All sources are those of the file; what it leaves open stays the scale's."""
    data = of(folder, "+recipe=vit_omni", "scale=toy", "data=mixed").data
    assert list(data.sources) == ["web", "clips"]
    assert (data.sources["web"].shards, data.sources["web"].fps) == (["web.tar"], 4.0)
    assert (data.tokenizer, data.max_patches, data.video.budget) == ("mine.json", 640, 200)
    assert (data.video.levels, data.block_samples, data.audio_seconds) == ([16], 512, 2.0)


def test_a_single_key_outranks_everything(folder):
    """Wherever it stands on the command line."""
    words = ["data.tokenizer=key.json", "+recipe=stage2", "scale=toy", "data=mixed", "train.steps=9"]
    words += ["data.sources.web.weight=8", "~data.sources.clips"]
    for order in (words, words[::-1]):
        config = of(folder, *order)
        assert (config.data.tokenizer, config.train.steps) == ("key.json", 9)
        assert list(config.data.sources) == ["web"] and config.data.sources["web"].weight == 8.0
        assert config.train.seq_length == 1024


@pytest.mark.parametrize(
    ("overrides", "width", "precision"),
    [([], 64, "fp32"), (["model=seed_vl"], 1280, "fp32"), (["model=toy"], 64, "fp32")],
)
def test_a_named_model_outranks_the_scales(folder, overrides, width, precision):
    config = of(folder, "+recipe=stage1", "scale=toy", *overrides)
    assert (config.model.encoder.width, config.train.precision) == (width, precision)


def test_a_scale_outranks_the_recipe_and_yields_to_an_optimizer(folder):
    config = of(folder, "+recipe=vit_contrastive", "scale=small", "optim=adamw")
    assert (config.train.steps, config.train.global_batch_size, config.optim.lr) == (7, 32768, 0.5)
    assert (config.optim.name, config.optim.betas) == ("adamw", [0.9, 0.95])


def test_a_recipe_needs_no_entry_of_its_own_in_a_scale(folder):
    shutil.copy(folder / "recipe/stage1.yaml", folder / "recipe/mine.yaml")
    assert of(folder, "+recipe=mine", "scale=toy") == of(folder, "+recipe=stage1", "scale=toy")


def test_printed_settings_are_those_of_the_run():
    words = ["+recipe=vit_omni", "scale=toy", "optim=lamb"]
    for command in (["--cfg", "job", *words], [*words, "--cfg", "job"]):
        done = subprocess.run(
            [sys.executable, "launch/pretrain.py", *command], cwd=ROOT, capture_output=True, text=True
        )
        printed = yaml.safe_load(done.stdout)
        assert (printed["optim"]["name"], printed["data"]["video"]["budget"]) == ("lamb", 64)
        assert printed["scale"] == {"name": "toy"}


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.stpes=3", "train.stpes: there is no such setting; did you mean train.steps?"),
        ("trian.steps=3", "trian.steps: there is no such setting; did you mean train.steps?"),
        ("nothing.like.it=3", "nothing.like.it: there is no such setting"),
        ("data.sources.main.shards=[a{0..1}.tar]", "quote braces and brackets twice"),
        ("train.steps", "Error parsing override 'train.steps' missing EQUAL"),
        ("data=broken", "broken.yaml, line 2: expected ',' or ']'"),
    ],
)
def test_mistakes_end_with_one_sentence(folder, override, sentence):
    with pytest.raises(Exception) as error:
        composed(["+recipe=stage1", "scale=toy", override], folder)
    said = one_sentence(error.value)
    assert sentence in said and len(said.splitlines()) == 1


def test_keys_are_those_of_the_configuration():
    assert {"task", "train.steps", "data.sources.*.shards", "parallel.encoder.zero_stage"} <= set(keys())
