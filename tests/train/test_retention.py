"""Which checkpoints stay, what a crash leaves behind, and what is never published."""

import numpy as np
import pytest
import torch

from tandem.train.checkpoints.checkpoint import Reader, checkpoints, file_of
from tandem.train.checkpoints.retention import clean, prune, superfluous
from tandem.train.checkpoints.saving import NotSavedError, publish
from tandem.train.checkpoints.tensors import write_file
from tests.train.folders import HALVES, STATE, WHOLE, write


@pytest.mark.parametrize(
    ("steps", "keep", "every", "damaged", "gone"),
    [
        ([10, 20, 30], 2, 0, [], [10]),
        ([10, 20, 30], 5, 0, [], []),
        ([10, 20, 30, 40], 1, 20, [], [10, 30]),
        ([10, 20, 30], 2, 0, [30], []),  # the damaged newest does not count, and is left to be looked at
        ([10, 20, 30], 1, 0, [30], [10]),
        ([10, 20, 30], 2, 0, [20], [20]),
        ([10, 20, 30], 1, 0, [10, 20, 30], []),
        ([], 1, 5, [], []),
    ],
)
def test_the_newest_good_ones_stay(steps, keep, every, damaged, gone):
    assert superfluous(steps, keep, every, damaged) == gone


@pytest.mark.parametrize("seed", range(20))
def test_no_policy_deletes_the_newest_good_one(seed):
    draw = np.random.default_rng(seed)
    steps = np.unique(draw.integers(0, 50, int(draw.integers(0, 12)))).tolist()
    damaged = [step for step in steps if draw.random() < 0.4]
    keep, every = int(draw.integers(0, 5)), int(draw.integers(0, 6))
    gone = superfluous(steps, keep, every, damaged)
    good = [step for step in steps if step not in damaged]
    assert len(set(good) - set(gone)) >= min(len(good), max(keep, 1))
    assert not good or good[-1] not in gone
    assert not any(every and step % every == 0 and step not in damaged for step in gone)


def test_pruning_touches_checkpoints_only(tmp_path):
    for step in (5, 7, 20, 100):
        write(tmp_path, HALVES, step=step)
    (tmp_path / "step-00000030").mkdir()
    (tmp_path / "step-40").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert [path.name for path in prune(tmp_path, 2, 5)] == ["step-00000007"]
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"step-{step:08d}" for step in (5, 20, 30, 100)),
        "step-40",
        "notes.txt",
    }


def test_what_a_crash_left_is_cleared_away(tmp_path):
    """Half written, half deleted, and between the two renames of a replacement."""
    kept = write(tmp_path, HALVES, step=10)
    lost = write(tmp_path, HALVES, step=20)
    lost.rename(tmp_path / ".step-00000020.replaced")
    for name in (".step-00000010.replaced", ".step-00000030.partial", ".step-00000005.deleted", ".step-7.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank-00000.safetensors").write_text("half")
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {kept.name, lost.name, ".step-7.partial"}
    assert torch.equal(Reader(lost).whole("w"), WHOLE)
    clean(tmp_path / "nowhere")


def reports_of(staging, **changes):
    staging.mkdir(parents=True)
    facts = write_file(staging / file_of(0), {"w/param/0,0": WHOLE})
    boxes = [("w", "param", (4, 6), (0, 0), (4, 6))]
    return [(changes.get("boxes", boxes), {**facts, **changes.get("facts", {})}, {"llm": 3}, None)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"facts": {"bytes": 7}}, "bytes long for rank 0, 7 for its rank"),
        ({"boxes": [("w", "param", (8, 6), (0, 0), (4, 6))]}, "24 of 48 entries of param of w were written"),
        ({"boxes": [("w", "param", (4, 6), (0, 0), (4, 6))] * 2}, "48 of 24 entries of param of w were written"),
    ],
)
def test_what_is_not_whole_is_not_published(changes, words, tmp_path):
    staging = tmp_path / ".step-00000003.partial"
    with pytest.raises(NotSavedError, match=words):
        publish(staging, tmp_path / "step-00000003", STATE, reports_of(staging, **changes))
    assert checkpoints(tmp_path) == []
