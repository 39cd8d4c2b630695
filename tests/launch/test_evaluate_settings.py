"""What an evaluation reads: the shards it names, each sample once, whatever the mixture was trained on."""

import pytest
from omegaconf import OmegaConf

from tandem.launch.evaluate import settings_of
from tandem.train.config.checks import check_config
from tests.support import settings


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint's place in a run that was trained on two weighted sources."""
    mixture = ["data.sources.main.weight=9", "+data.sources.clips.shards=[clips.tar]", "+data.sources.clips.weight=1"]
    config = settings("stage1", *mixture, "data.sources.main.entity_cap=2", "parallel.tp=2")
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return tmp_path / "checkpoints" / "step-00000001"


def test_a_source_that_is_named_is_scored_alone_and_once(checkpoint):
    config = settings_of(checkpoint, ["data.sources.main.shards=[heldout.tar]"])
    assert list(config.data.sources) == ["main"]
    main = config.data.sources["main"]
    assert (main.shards, main.weight, main.entity_cap, main.repeat) == (["heldout.tar"], None, None, 1.0)
    assert config.parallel.tp == 1


def test_without_shards_all_sources_are_scored_by_size(checkpoint):
    config = settings_of(checkpoint, [])
    assert {name: source.weight for name, source in config.data.sources.items()} == {"main": None, "clips": None}


def test_settings_that_a_run_did_not_know_take_their_defaults(checkpoint):
    """And what the backward would keep does not matter, in whichever words the run said it."""
    file = checkpoint.parents[1] / "config.yaml"
    saved = OmegaConf.load(file)
    for group, key in (("optim", "name"), ("parallel", "kernels"), ("parallel", "attention"), ("parallel", "compile")):
        del saved[group][key]
    saved.train.recompute = True
    file.write_text(OmegaConf.to_yaml(saved))
    config = settings_of(checkpoint, [])
    check_config(config, 1)
    assert (config.optim.name, config.parallel.attention, config.train.recompute) == ("adamw", "auto", "none")
