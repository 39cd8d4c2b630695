"""What storage does wrong: a full disk, a rank that cannot write, damaged bytes.  Training goes on.

The full disk is a small tmpfs where this process may mount one; everywhere, a file-size limit of the kernel on one rank
makes a write fail half-way.
"""

import resource
import subprocess

import pytest
import torch.distributed as dist

from tandem.train.checkpoints import checkpoint, saving
from tandem.train.checkpoints.saving import Saver
from tandem.train.metrics import Logger
from tests.distributed.runs import build_run, train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, identity, read_metrics
from tests.train.folders import flip, truncate

SMALL = ["train.seq_length=256", "train.global_batch_size=8", "data.max_patches=64"]
LAYOUT = ["parallel.pp=2", "parallel.ep=2"]
NOT_SAVED = "WAS NOT SAVED"


@pytest.fixture
def small_disk(tmp_path):
    """mount(megabytes) -> folder of a tmpfs of that size; again, to give the same one another size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(megabytes: float):
        options = f"{'remount,' if mounted else ''}size={int(megabytes * 1024)}k"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a tmpfs is not permitted here")
        mounted.append(folder)
        return folder

    yield mount
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def train_and_listen(recipe, overrides, run_dir):
    """One run; returns what it told the person who watches."""
    said, say = [], Logger.say

    def listen(self, text):
        said.append(text)
        say(self, text)

    Logger.say = listen
    train_run(recipe, overrides, run_dir)
    return "\n".join(said)


def steps_in(folder):
    return [checkpoint.step_of(path) for path in checkpoint.checkpoints(folder)]


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(corpus, tmp_path, small_disk):
    """Room for one and a half: step 1 is saved, 2 and 3 are not; training ends, and with more room goes on from 1."""
    arguments = [*SMALL, *corpus_overrides(corpus), *LAYOUT, "checkpoint.every=1", "logger.every=1"]
    run_world(train_run, 4, "stage1", [*arguments, "train.steps=1"], str(tmp_path / "probe"), timeout=180)
    probe = checkpoint.resolve(tmp_path / "probe")
    size = sum(path.stat().st_size for path in probe.iterdir()) / 2**20
    disk = small_disk(1.5 * size)
    arguments += [f"checkpoint.dir={disk}", "checkpoint.resume=true", "checkpoint.keep=9"]
    run = (4, "stage1", [*arguments, "train.steps=3"], str(tmp_path / "run"))
    said = run_world(train_and_listen, *run, timeout=180)[0]
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert steps_in(disk) == [1] and checkpoint.damage(disk / "step-00000001") == []
    assert [path.name for path in disk.iterdir()] == ["step-00000001"], "what was half written is gone"
    assert said.count(NOT_SAVED) == 2 and "No space left on device" in said
    assert "CHECKPOINT step-00000002 WAS NOT SAVED, step-00000001 stays the newest" in said
    small_disk(10 * size)
    run_world(train_run, *run, timeout=180)
    assert steps_in(disk) == [1, 2, 3]
    assert all(checkpoint.damage(path) == [] for path in checkpoint.checkpoints(disk))


def train_with_a_failing_rank(recipe, overrides, run_dir):
    """Rank 2's file of step 2 may not grow beyond 4,096 bytes."""
    write_file = saving.write_file

    def limited(path, tensors, metadata=None):
        if "step-00000002" not in str(path) or dist.get_rank() != 2:
            return write_file(path, tensors, metadata)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            return write_file(path, tensors, metadata)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    saving.write_file = limited
    return train_and_listen(recipe, overrides, run_dir)


def test_one_rank_that_cannot_write_leaves_the_previous_checkpoint(corpus, tmp_path):
    arguments = [*SMALL, *corpus_overrides(corpus), *LAYOUT, "checkpoint.every=1", "train.steps=3", "checkpoint.keep=9"]
    run = (4, "stage1", arguments, str(tmp_path / "run"))
    said = run_world(train_with_a_failing_rank, *run, timeout=180)[0]
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000003"]
    assert said.count(NOT_SAVED) == 1
    assert (
        "step-00000002 WAS NOT SAVED, step-00000001 stays the newest: rank 2: OSError: [Errno 27] File too large"
        in said
    )
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]


# ---- damaged bytes --------------------------------------------------------------------------------------------------

HARM = {
    "flipped": lambda path: flip(path, path.stat().st_size * 2 // 3),
    "first byte flipped": lambda path: flip(path, 0),
    "truncated": lambda path: truncate(path, path.stat().st_size - 1),
    "empty": lambda path: truncate(path, 0),
    "missing": lambda path: path.unlink(),
}


def resume_from_damage(overrides, folder):
    """For every file of the newest of two checkpoints and every harm: what all ranks would resume from, and why."""
    config, engines, _, _ = build_run("stage1", overrides, steps=0)
    saver = Saver(folder, engines, **identity(config), keep=9, keep_every=0)
    for step in (1, 2):
        saver.save(step, {})
    newest, results = saver.wait(), {}
    before = saver.newest_valid()
    for name in sorted(path.name for path in newest.iterdir()):
        for kind, harm in HARM.items():
            dist.barrier()
            if dist.get_rank() == 0:
                whole = (newest / name).read_bytes()
                harm(newest / name)
            dist.barrier()
            results[name, kind] = saver.newest_valid()
            dist.barrier()
            if dist.get_rank() == 0:
                (newest / name).write_bytes(whole)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in folder.glob("step-*/rank-00001.safetensors"):
            path.unlink()
    dist.barrier()
    try:
        saver.newest_valid()
    except ValueError as error:
        return before, results, str(error)


def test_any_damaged_file_is_named_and_the_previous_checkpoint_used(corpus, tmp_path):
    overrides = [*SMALL, *corpus_overrides(corpus), *LAYOUT]
    folder = tmp_path / "checkpoints"
    ranks = run_world(resume_from_damage, 4, overrides, folder, timeout=180)
    assert all(rank == ranks[0] for rank in ranks)
    before, results, refusal = ranks[0]
    assert before == (folder / "step-00000002", [])
    assert {name for name, _ in results} == {"manifest.json", *(checkpoint.file_of(rank) for rank in range(4))}
    for (name, _), (path, sentences) in results.items():
        assert path == folder / "step-00000001"
        assert len(sentences) == 1 and f"{folder}/step-00000002: {name} " in sentences[0]
    assert f"every checkpoint in {folder} is damaged" in refusal
    assert all(f"step-0000000{step}: rank-00001.safetensors is missing" in refusal for step in (1, 2))


def test_a_damaged_newest_checkpoint_is_trained_again(corpus, tmp_path):
    arguments = [*SMALL, *corpus_overrides(corpus), *LAYOUT, "checkpoint.every=1", "checkpoint.keep=2"]
    run_world(train_run, 4, "stage1", [*arguments, "train.steps=2"], str(tmp_path / "run"), timeout=180)
    folder = tmp_path / "run/checkpoints"
    flip(folder / "step-00000002/rank-00003.safetensors", 3000)
    (folder / ".step-00000003.partial").mkdir()
    resumed = [*arguments, "train.steps=3", "checkpoint.resume=true"]
    said = run_world(train_and_listen, 4, "stage1", resumed, str(tmp_path / "run"), timeout=180)[0]
    assert "step-00000002: rank-00003.safetensors is damaged" in said
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    assert all(checkpoint.damage(path) == [] for path in folder.iterdir())
