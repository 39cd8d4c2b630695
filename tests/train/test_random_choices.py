"""Masks and dropped branches in the steps that a stage prepares: different for every step, image and seed, and equal
after a resume and in another layout.

All pictures have one size, and every step holds the same few of them: only the draws can differ.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tandem.data.media.text import Tokenizer, build_byte_tokenizer
from tandem.data.shards.indexing import build_index
from tests.distributed.world import run_world
from tests.support import write_tar
from tests.train.followed import make_teacher, open_stage

STEPS, RESUMED_AT = 4, 2
SEED = "train.seed=1"
DEEP = ["model.encoder.width=16", "model.encoder.heads=2", "model.encoder.depth=24", "model.encoder.drop_path=0.9"]
ROWS = ["train.global_batch_size=4", "train.seq_length=128", "data.max_patches=64", "model.llm.layers=2"]
ELSEWHERE = ["data.workers=2", "parallel.encoder.chunk_patches=256"]
RECIPES = {  # recipe: (settings, settings of a world of two)
    "vit_mim": (DEEP, ELSEWHERE),
    "vit_contrastive": (DEEP, ["parallel.balance=false", *ELSEWHERE]),
    "stage1": ([*DEEP, *ROWS], ["parallel.pp=2", *ELSEWHERE]),
}
CHOICES = [("vit_mim", "mask"), ("vit_mim", "branches"), ("vit_contrastive", "branches"), ("stage1", "branches")]

Choices = dict[str, dict[tuple[int, int], bytes]]  # by "mask" or "branches", and by step and image of the step


@dataclass(frozen=True)
class Drawn:
    """choices: of this rank's images.  states: of the stream after each step."""

    choices: Choices
    states: list[dict]


@dataclass(frozen=True)
class Runs:
    """One run in a world of one, its second half after a resume, a run with another seed, and the run on two ranks."""

    whole: Choices
    resumed: Choices
    seeded: Choices
    ranks: list[Choices]


def draw(folder: str, recipe: str, overrides: list[str], steps: int, state: dict | None = None) -> Drawn:
    """Prepares steps as in training, from a state of the stream if one is given."""
    teacher = [f"objective.teacher={folder}/teacher"] if recipe == "vit_mim" else []
    _, stage, data = open_stage(recipe, folder, *RECIPES[recipe][0], *overrides, *teacher)
    if state is not None:
        data.stream.load_state(json.loads(json.dumps(state)))
    drawn = Drawn({"mask": {}, "branches": {}}, [])
    for prepared, batch in stage.steps(steps):
        image_ids = iter(prepared.rank_shard.image_ids.tolist())
        for images, mask_N in chunks_of(recipe, batch):
            lengths = images.segments.q_lengths_N
            masks = [None] * len(lengths) if mask_N is None else mask_N.split(list(lengths))
            for mask, kept_L in zip(masks, images.keep_LI.unbind(1), strict=True):
                place = prepared.plan.step, next(image_ids)
                drawn.choices["branches"][place] = kept_L.numpy().tobytes()
                if mask is not None:
                    drawn.choices["mask"][place] = mask.numpy().tobytes()
        assert next(image_ids, None) is None
        drawn.states.append(prepared.plan.state_after)
        prepared.release()
    data.reader.close()
    return drawn


def chunks_of(recipe: str, batch) -> list[tuple]:
    """(packed images, mask or None) of the chunks that are not blank."""
    if recipe == "stage1":
        return [(chunk, None) for chunk in batch.chunks if chunk.keep_LI is not None]
    held = [chunk[0] for chunk in batch.collated if chunk is not None]
    return [(chunk.images, chunk.mask_N) if recipe == "vit_mim" else (chunk, None) for chunk in held]


def draw_alone(folder: str) -> dict[str, list[Drawn]]:
    """In a world of one: the whole run, the resumed one, and the one with another seed."""
    found = {}
    for recipe in RECIPES:
        whole = draw(folder, recipe, [], STEPS)
        resumed = draw(folder, recipe, [], STEPS - RESUMED_AT, whole.states[RESUMED_AT - 1])
        found[recipe] = [whole, resumed, draw(folder, recipe, [SEED], STEPS)]
    return found


def draw_elsewhere(folder: str) -> dict[str, Drawn]:
    """On each rank of a world of two."""
    return {recipe: draw(folder, recipe, overrides, STEPS) for recipe, (_, overrides) in RECIPES.items()}


def write_corpus(folder: Path) -> None:
    """A tokenizer and two equal shards of four samples.  Pictures are noise of 8 x 8 patches; one sample has two."""
    build_byte_tokenizer(folder / "tokenizer.json")
    files, generator = [], np.random.default_rng(0)
    for number, pictures in enumerate((1, 1, 1, 2)):
        turns = [{"role": "user", "text": "<image>" * pictures}, {"role": "assistant", "text": f"number {number}"}]
        files.append((f"{number}.json", json.dumps({"turns": turns}).encode()))
        for place in range(pictures):
            file = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (112, 112, 3), np.uint8)).save(file, "PNG")
            files.append((f"{number}.{place}.png", file.getvalue()))
    for path in (folder / "train/all.tar", folder / "vision/train/photo-0.tar"):
        path.parent.mkdir(parents=True)
        build_index(write_tar(path, files), Tokenizer(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Choices by recipe and by run, see `Runs`."""
    folder = tmp_path_factory.mktemp("choices")
    write_corpus(folder)
    make_teacher(folder, folder / "teacher")
    [alone], ranks = run_world(draw_alone, 1, str(folder)), run_world(draw_elsewhere, 2, str(folder))
    return {
        recipe: Runs(*(run.choices for run in alone[recipe]), [rank[recipe].choices for rank in ranks])
        for recipe in RECIPES
    }


@pytest.mark.parametrize(("recipe", "kind"), CHOICES)
def test_no_two_images_draw_the_same(drawn, recipe, kind):
    """In different steps, in different samples of a step, or in one sample: equal draws would be a coincidence of less
    than one in a million."""
    choices = drawn[recipe].whole[kind]
    assert {step for step, _ in choices} == set(range(STEPS)) and len(choices) > 5 * STEPS
    assert len(set(choices.values())) == len(choices)


@pytest.mark.parametrize(("recipe", "kind"), CHOICES)
def test_another_seed_draws_other_choices(drawn, recipe, kind):
    whole, seeded = (set(choices[kind].values()) for choices in (drawn[recipe].whole, drawn[recipe].seeded))
    assert seeded and not whole & seeded


@pytest.mark.parametrize(("recipe", "kind"), CHOICES)
def test_a_resumed_run_draws_the_same(drawn, recipe, kind):
    whole, resumed = drawn[recipe].whole[kind], drawn[recipe].resumed[kind]
    assert resumed == {place: choice for place, choice in whole.items() if place[0] >= RESUMED_AT}


@pytest.mark.parametrize(("recipe", "kind"), CHOICES)
def test_another_layout_draws_the_same(drawn, recipe, kind):
    """On two ranks with other chunks and with loader workers, each image on one of the ranks."""
    first, second = (choices[kind] for choices in drawn[recipe].ranks)
    assert first and second and not first.keys() & second.keys()
    assert first | second == drawn[recipe].whole[kind]
