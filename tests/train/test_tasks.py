"""The registry of tasks: a module is a task, its name is its key, and the name of a recipe has no meaning."""

import shutil

import pytest

from tandem.train import tasks
from tandem.train.checkpoints.checkpoint import task_of
from tandem.train.config.checks import check_config
from tandem.train.config.settings import composed, read_config
from tests.support import ROOT, settings

OF_RECIPES = {
    "stage0": "language",
    "stage1": "language",
    "stage2": "language",
    "vit_mim": "mim",
    "vit_contrastive": "contrastive",
    "vit_omni": "omni",
}


def test_every_task_is_found_by_its_name():
    assert tasks.names() == ["contrastive", "language", "mim", "omni"]
    assert all(tasks.find(name).parts[0] == "encoder" for name in tasks.names())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("languge", "must be one of contrastive, language, mim, omni; did you mean language?"),
        ("base", "must be one of contrastive"),  # a module of the package, and no task
        ("os", "must be one of contrastive"),
        (None, "must be one of contrastive"),
    ],
)
def test_anything_else_is_refused(name, words):
    with pytest.raises(ValueError, match=f"task={name}: ") as refused:
        tasks.find(name)
    assert words in str(refused.value)


@pytest.mark.parametrize("recipe", OF_RECIPES)
def test_recipes_and_checkpoints_from_before_tasks_have_theirs(recipe):
    assert settings(recipe).task == task_of(recipe) == OF_RECIPES[recipe]


def test_a_renamed_recipe_trains_the_same(tmp_path):
    """Whatever the copy of a recipe is called."""
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    shutil.copy(ROOT / "recipes/recipe/vit_contrastive.yaml", tmp_path / "recipes/recipe/mine.yaml")
    mine = read_config(composed(["+recipe=mine", "scale=toy"], tmp_path / "recipes"))
    assert mine == settings("vit_contrastive")


def test_a_part_that_the_task_lacks_is_refused():
    with pytest.raises(ValueError, match=r"train.trainable=\['encoder', 'pool'\]: must name one or more of encoder, "):
        check_config(settings("stage1", "train.trainable=[encoder,pool]"), 1)


@pytest.mark.parametrize(
    ("recipe", "override", "why"),
    [
        ("stage0", "optim.lr_scale.llm=0.1", "trains no llm"),
        ("vit_contrastive", "optim.lr_scale.adapter=2", "trains no adapter"),
        ("stage1", "optim.lr_scale.router=0", "to freeze a part, leave it out of train.trainable"),
    ],
)
def test_a_factor_of_a_rate_that_nothing_has_is_refused(recipe, override, why):
    with pytest.raises(ValueError, match=why):
        check_config(settings(recipe, override), 1)


def test_a_dense_model_has_no_router_to_scale():
    dense = ("model.llm.num_experts=0", "model.llm.ffn_width=96")
    with pytest.raises(ValueError, match=r"optim.lr_scale.router=2.0: this run trains no router"):
        check_config(settings("stage1", *dense, "optim.lr_scale.router=2"), 1)
