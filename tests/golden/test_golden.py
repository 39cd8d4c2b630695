"""Every recipe gives the losses, norms and learning rates in losses.json; a checkpoint of an earlier version resumes.

To the bit on the machine that recorded, elsewhere within the tolerances of compare.py.  The runs are those of runs.py.
"""

import json

import pytest

from tandem.launch.evaluate import settings_of
from tandem.train.checkpoints import checkpoint
from tests.golden import compare
from tests.golden.runs import CHECKPOINT, RUNS, SMALL, numbers_of_world
from tests.support import settings

RECORDED_BY, GOLDEN = compare.golden()


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """numbers(ranks): fingerprint and numbers of all runs with so many ranks, made once."""
    made = {}

    def numbers_of(ranks):
        if ranks not in made:
            made[ranks] = numbers_of_world(ranks, tmp_path_factory.mktemp(f"ranks-{ranks}"))
        return made[ranks]

    return numbers_of


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_numbers_are_golden(run, numbers):
    fingerprint, found = numbers(run.ranks)
    assert compare.differences(found[run.name], GOLDEN[run.name], exact=fingerprint == RECORDED_BY) == []


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_recorded_steps_are_not_trivial(run):
    """Images in every step, a limit that clips, a learning rate that moves, several domains or terms of the loss."""
    lines, config = GOLDEN[run.name]["steps"], settings(run.recipe, *run.overrides)
    assert all(line["applied"] and line["images"] for line in lines)
    assert any(line["grad_norm"] > config.optim.clip_norm for line in lines)
    assert run.resumes or len({line["lr"] for line in lines}) == 2
    parts = [line.get("losses") or line["loss_by_domain"] for line in lines]
    assert run.recipe == "vit_mim" or all(len(part) > 1 for part in parts)


def test_golden_runs_are_those_of_this_version():
    assert list(GOLDEN) == [run.name for run in RUNS]


def test_stored_checkpoint_is_read_to_the_bit():
    """Weights and moments, by name; the runs called resumed go on from them."""
    path = checkpoint.resolve(CHECKPOINT)
    assert checkpoint.damage(path) == []
    assert compare.digests(path) == json.loads(compare.DIGESTS.read_text())


def test_stored_settings_are_read():
    """config.yaml of the run that wrote the checkpoint, as an evaluation reads it."""
    found, wanted = settings_of(checkpoint.resolve(CHECKPOINT), []), settings("stage1", *SMALL)
    assert (found.label, found.model, found.train, found.optim) == ("stage1", wanted.model, wanted.train, wanted.optim)
