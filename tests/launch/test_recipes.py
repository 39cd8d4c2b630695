"""Every recipe composes at both scales into settings that a world can run, and says what the report's tables say."""

import dataclasses
import re
from dataclasses import MISSING, fields
from operator import attrgetter

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import OmegaConf

from tandem.data.planning.corpus import SourceSettings
from tandem.data.planning.stream import StreamConfig
from tandem.data.planning.view import Resolution
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config, DataConfig, SourceConfig, VideoConfig
from tandem.train.config.settings import composed as compose
from tandem.train.config.settings import read_config
from tandem.train.models.encoders.vit import ViTConfig
from tests.support import ROOT

RECIPES = sorted(path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml"))
WORLDS = {
    "toy": (4, ["parallel.pp=2", "parallel.ep=2"]),
    "full": (
        256,
        ["parallel.tp=4", "parallel.pp=8", "parallel.ep=8", "data.sources.main.shards=['corpus/{0000..0099}.tar']"],
    ),
}
VISION_STAGES = {  # samples, batch, warm-up, maximum rate, minimum rate
    "vit_mim": (2.2e9, 55_296, 1_692, 7.06e-3, 1.05e-5),
    "vit_contrastive": (4.8e9, 32_768, 2_000, 1.0e-4, 1.2e-6),
    "vit_omni": (65e6, 1_024, 12_800, 5.0e-5, 2.02e-7),
}
STAGES = {  # trained tokens, tokens of a row, what learns, tokens of a batch, warm-up, maximum rate, minimum, schedule
    "stage0": (16e9, 32_768, ["adapter"], 8.4e6, 100, 2.52e-4, 4.50e-5, "cosine"),
    "stage1": (3e12, 32_768, ["encoder", "adapter", "llm"], 71e6, 500, 5.22e-5, 5.22e-6, "cosine"),
    "stage2": (240e9, 131_072, ["encoder", "adapter", "llm"], 71e6, 0, 5.22e-6, 5.22e-6, "constant"),
}


def composed(*overrides):
    return compose(overrides)


def overrides_of(recipe, scale):
    """What a user adds to the recipe: the data, and the layout of the LLM or the teacher."""
    overrides = WORLDS[scale][1]
    if recipe in VISION_STAGES:
        overrides = [override for override in overrides if not override.startswith("parallel.")]
    return overrides + (["objective.teacher=folder"] if recipe == "vit_mim" else [])


def full(recipe):
    return read_config(composed(f"+recipe={recipe}", *overrides_of(recipe, "full")))


def test_there_is_a_recipe_for_every_stage_of_the_report():
    assert {*STAGES, *VISION_STAGES} == set(RECIPES)


@pytest.mark.parametrize("scale", WORLDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_composes_resolves_and_passes_its_checks(recipe, scale):
    world, overrides = WORLDS[scale][0], overrides_of(recipe, scale)
    settings = composed(f"+recipe={recipe}", f"scale={scale}", *overrides)
    OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    config = read_config(settings)
    assert isinstance(config, Config)
    layout = check_config(config, world)
    assert (config.label, config.scale["name"]) == (recipe, scale)
    rows = config.micro_batches(layout) * layout.dp * config.train.micro_batch_size
    assert recipe in VISION_STAGES or rows == config.train.global_batch_size  # samples need not divide by ranks


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_survive_the_file_of_a_run(recipe):
    """config.yaml, as a run writes it, reads back as the same settings."""
    config = full(recipe)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    assert read_config(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text))) == config


@pytest.mark.parametrize("stage", VISION_STAGES)
def test_full_scale_vision_recipe_says_what_the_report_says(stage):
    samples, batch, warmup, lr, min_lr = VISION_STAGES[stage]
    train, optim = full(stage).train, full(stage).optim
    assert (train.global_batch_size, optim.warmup_steps, optim.lr, optim.min_lr) == (batch, warmup, lr, min_lr)
    assert train.steps * batch == pytest.approx(samples, rel=0.001)
    assert optim.name == ("lamb" if stage == "vit_contrastive" else "adamw"), "EVA-CLIP's where images meet texts"


@pytest.mark.parametrize("stage", STAGES)
def test_full_scale_recipe_says_what_the_report_says(stage):
    tokens, seq_length, trainable, batch, warmup, lr, min_lr, schedule = STAGES[stage]
    config = full(stage)
    train, optim = config.train, config.optim
    assert (train.seq_length, train.trainable) == (seq_length, trainable)
    assert (optim.warmup_steps, optim.lr, optim.min_lr, optim.schedule) == (warmup, lr, min_lr, schedule)
    assert (optim.betas, optim.weight_decay) == ([0.9, 0.95], 0.1)
    batch_tokens = train.global_batch_size * train.seq_length
    assert batch_tokens == pytest.approx(batch, rel=0.005)
    assert train.steps * batch_tokens == pytest.approx(tokens, rel=0.001)
    assert config.checkpoint.load_optimizer == (stage == "stage2"), "stage 2 goes on with stage 1's Adam moments"


def test_stage2_begins_at_the_rate_where_stage1_ends():
    assert full("stage2").optim.lr == full("stage1").optim.min_lr


@pytest.mark.parametrize("recipe", RECIPES)
def test_full_scale_encoder_is_the_reports(recipe):
    config = full(recipe)
    assert config.model.encoder == ViTConfig()
    assert config.train.precision == "bf16"


@pytest.mark.parametrize("recipe", RECIPES)
def test_toy_scale_shrinks_sizes_and_nothing_else(recipe):
    """The same architecture and rates: experts, grouped heads and what learns stay."""
    toy, whole = read_config(composed(f"+recipe={recipe}", "scale=toy")), full(recipe)
    assert toy.train.trainable == whole.train.trainable
    assert (toy.optim.lr, toy.optim.min_lr, toy.optim.schedule) == (
        whole.optim.lr,
        whole.optim.min_lr,
        whole.optim.schedule,
    )
    assert toy.model.llm.num_experts > toy.model.llm.top_k > 1
    assert toy.model.llm.heads > toy.model.llm.kv_heads
    assert (toy.model.llm.aux_loss, toy.model.llm.z_loss) == (whole.model.llm.aux_loss, whole.model.llm.z_loss)


PROMISED = {
    "parallel": "tp pp vpp ep etp cp sequence_parallel balance balance_group_size encoder",
    "parallel.encoder": "zero_stage chunk_patches recompute",
    "train": "steps global_batch_size micro_batch_size seq_length seed deterministic",
    "checkpoint": "dir every keep resume load_from",
    "run": "dir name",
}


@pytest.mark.parametrize("group", PROMISED)
def test_promised_keys_exist_and_are_typed(group):
    section = attrgetter(group)(read_config(composed("+recipe=stage1", "scale=toy")))
    assert set(PROMISED[group].split()) <= {field.name for field in dataclasses.fields(section)}


@pytest.mark.parametrize("override", ["train.stepz=3", "parallel.encoder.zero=1", "data.sources.main.shard=[a]"])
def test_unknown_keys_are_refused_by_name(override):
    with pytest.raises(ConfigCompositionException) as error:
        composed("+recipe=stage1", "scale=toy", override)
    assert override.partition("=")[0] in f"{error.value} {error.value.__cause__}"


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=many",
        "train.steps=1.5",
        "optim.lr=fast",
        "train.deterministic=perhaps",
        "train.trainable=adapter",
        "model.llm.layers=null",
        "data.sources.main.weight=heavy",
        "+data.sources.more.shard=[a]",
    ],
)
def test_wrong_types_are_refused_by_name(override):
    with pytest.raises(ValueError) as error:
        read_config(composed("+recipe=stage1", "scale=toy", override))
    assert str(error.value).startswith(override.strip("+").partition("=")[0])


def test_sources_can_be_added_on_the_command_line():
    more = ["+data.sources.more.shards=[a.tar]", "+data.sources.more.weight=2", "data.sources.main.weight=1"]
    sources = read_config(composed("+recipe=stage1", "scale=toy", *more)).data.sources
    assert list(sources) == ["main", "more"] and sources["more"].weight == 2.0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("+train.stepz=3", "train.stepz: there is no such setting; did you mean train.steps?"),
        ("+extra=1", "extra: there is no such setting"),
        ("~model.llm", "model.llm.vocab_size is missing: model.text.vocab_size takes its value"),
    ],
)
def test_unknown_keys_that_hydra_would_add_are_refused_too(override, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        read_config(composed("+recipe=stage1", "scale=toy", override))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+recipe=stage9"], ("recipe/stage9", *RECIPES)),
        (["+recipe=stage1", "scale=huge"], ("scale/huge", "toy", "full")),
        (["+recipe=stage1", "model=gpt"], ("model/gpt", "seed_vl")),
    ],
)
def test_unknown_choices_are_refused_with_those_there_are(overrides, words):
    with pytest.raises(MissingConfigException) as error:
        composed(*overrides)
    assert all(word in str(error.value) for word in words)


def test_a_forgotten_recipe_is_asked_for():
    with pytest.raises(ValueError, match="task is missing; choose a recipe, as in"):
        read_config(composed("scale=toy"))


def test_a_default_of_the_data_stands_in_one_place():
    """In recipes/data; for the keys of a source, which a recipe may leave out, in SourceSettings."""
    settings = {field.name for part in (DataConfig, VideoConfig) for field in fields(part)}
    settings |= {f"video_{field.name}" for field in fields(VideoConfig)}
    for part in (DataConfig, VideoConfig, StreamConfig, Resolution):
        for field in fields(part):
            assert field.default is MISSING or field.name not in settings, f"{part.__name__}.{field.name}"
    composed_source = OmegaConf.to_object(OmegaConf.merge(SourceConfig, {"shards": ["a.tar"]}))
    for field in fields(SourceConfig):
        if field.name not in ("shards", "train_roles"):
            assert getattr(composed_source, field.name) == getattr(SourceSettings, field.name)
