"""Checkpoint folders without engines: any box out of any boxes, and one sentence for every kind of damage."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tandem.train.checkpoints import checkpoint, tensors
from tandem.train.checkpoints.checkpoint import Reader, resolve
from tandem.train.config.checks import check_config
from tests.support import settings
from tests.train.folders import HALVES, STATE, WHOLE, flip, truncate, write

# ---- any box out of any boxes ---------------------------------------------------------------------------------------


def cut_at_random(generator, where):
    """Splits a box again and again, at random places along random dimensions."""
    dim = int(generator.integers(len(where)))
    begin, end = where[dim].start, where[dim].stop
    if end - begin < 2 or generator.random() < 0.25:
        return [where]
    middle = int(generator.integers(begin + 1, end))
    low, high = list(where), list(where)
    low[dim], high[dim] = slice(begin, middle), slice(middle, end)
    return cut_at_random(generator, tuple(low)) + cut_at_random(generator, tuple(high))


def box_at_random(generator, shape):
    begins = [int(generator.integers(size)) for size in shape]
    return tuple(
        slice(begin, int(generator.integers(begin + 1, size + 1))) for begin, size in zip(begins, shape, strict=True)
    )


@pytest.mark.parametrize("seed", range(12))
def test_any_box_is_cut_from_any_boxes(seed, tmp_path):
    """Three tensors, two of one name and one cut, cut at random over up to four files, read back in random boxes."""
    generator = np.random.default_rng(seed)
    pieces_of_rank = [[] for _ in range(int(generator.integers(1, 5)))]
    wholes = {}
    for name, kinds in (("a", ("param", "exp_avg")), ("b.weight", ("param",))):
        shape = generator.integers(1, 9, int(generator.integers(1, 4))).tolist()
        for kind in kinds:
            wholes[name, kind] = torch.from_numpy(generator.standard_normal(shape, np.float32))
        for where in cut_at_random(generator, tuple(slice(0, size) for size in shape)):
            rank = generator.integers(len(pieces_of_rank))
            pieces_of_rank[rank] += [(name, kind, wholes[name, kind], where) for kind in kinds]
    reader = Reader(write(tmp_path, pieces_of_rank))
    assert reader.state == STATE
    for (name, kind), whole in wholes.items():
        everything = tuple(slice(0, size) for size in whole.shape)
        for where in [everything, *(box_at_random(generator, whole.shape) for _ in range(15))]:
            start, size = [part.start for part in where], [part.stop - part.start for part in where]
            assert torch.equal(reader.read(name, kind, tuple(start), tuple(size)), whole[where])


def test_files_are_plain_safetensors(tmp_path):
    """Written here while they are summed, read by the library: every dtype, and what is empty or a number."""
    written = {
        "a": torch.randn(3, 5),
        "turned": torch.randn(4, 6).t(),
        "number": torch.tensor(7.0),
        "nothing": torch.zeros(0, 3),
        "random": torch.randint(0, 255, (11,), dtype=torch.uint8),
        "counts": torch.arange(5),
        "half": torch.randn(2, 3).bfloat16(),
        "long": torch.randn(tensors.BLOCK // 2 + 3),
    }
    facts = tensors.write_file(tmp_path / "some.safetensors", written, {"said": "so"})
    read = load_file(tmp_path / "some.safetensors")
    assert all(torch.equal(read[key], tensor) and read[key].dtype == tensor.dtype for key, tensor in written.items())
    assert facts == {
        "bytes": (tmp_path / "some.safetensors").stat().st_size,
        "crc32": tensors.crc32_of(tmp_path / "some.safetensors"),
    }


# ---- damage ---------------------------------------------------------------------------------------------------------


def read_all(folder):
    return Reader(folder).read("w", "param", (0, 0), (4, 6))


def edit_manifest(folder, change, sign=True):
    """Changes the manifest as another program would; `sign` keeps its digest right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign:
        manifest.pop("digest")
        path.write_text(checkpoint.manifest_text(manifest))
    else:
        path.write_text(json.dumps(manifest, sort_keys=True, separators=(",", ":")))


def rename_file(name):
    """Puts `name` where the second rank's file stands."""

    def change(manifest):
        manifest["files"] = {"rank-00000.safetensors": manifest["files"]["rank-00000.safetensors"], name: FACTS}

    return lambda folder: edit_manifest(folder, change)


FACTS = {"bytes": 0, "crc32": "0"}


def edit_boxes(change):
    return lambda folder: edit_manifest(folder, lambda manifest: change(manifest["tensors"]["w"]["boxes"]))


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be used: [Errno 2] No such file"),
    "empty manifest": (lambda f: truncate(f / "manifest.json", 0), "manifest.json cannot be used"),
    "truncated manifest": (lambda f: truncate(f / "manifest.json", 200), "manifest.json cannot be used"),
    "manifest that is a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be used"),
    "manifest that is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json cannot be used"),
    "another format": (
        lambda f: edit_manifest(f, lambda manifest: manifest.update(format="tandem checkpoint 9")),
        "its format is 'tandem checkpoint 9', this version reads 'tandem checkpoint 2'",
    ),
    "no list of files": (lambda f: edit_manifest(f, lambda manifest: manifest.pop("files")), "it has no 'files'"),
    "no step": (lambda f: edit_manifest(f, lambda m: m["state"].pop("step")), "missing 1 required positional argument"),
    "changed by hand": (
        lambda f: edit_manifest(f, lambda manifest: manifest["state"].update(step=4), sign=False),
        "its digest does not match what it says",
    ),
    "written with spaces": (
        lambda f: (f / "manifest.json").write_text(json.dumps(json.loads((f / "manifest.json").read_text()))),
        "its digest does not match what it says",
    ),
    "missing file": (
        lambda f: (f / "rank-00001.safetensors").unlink(),
        "rank-00001.safetensors is missing or not 128 bytes long",
    ),
    "truncated file": (
        lambda f: truncate(f / "rank-00001.safetensors", 100),
        "rank-00001.safetensors is missing or not 128 bytes long",
    ),
    "damaged header of a file": (
        lambda f: flip(f / "rank-00001.safetensors", 0),
        "rank-00001.safetensors is damaged",
    ),
    "file name with a path": (
        rename_file("../outside.safetensors"),
        "../outside.safetensors, which is not a file name",
    ),
    "file name that is absolute": (rename_file("/etc/passwd"), "/etc/passwd, which is not a file name"),
    "box in a file that is not listed": (edit_boxes(lambda boxes: boxes[1].__setitem__(0, 2)), "a box of w cannot be"),
    "box in the last file but one": (edit_boxes(lambda boxes: boxes[1].__setitem__(0, -1)), "a box of w cannot be"),
    "box that is not in its file": (edit_boxes(lambda boxes: boxes[1].__setitem__(0, 0)), "is damaged"),
    "boxes that leave a hole": (edit_boxes(lambda boxes: boxes.pop()), "param of w is not complete"),
    "boxes that lie on each other": (edit_boxes(lambda b: b.__setitem__(1, b[0])), "param of w is not complete"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_sentence(kind, tmp_path):
    harm, words = DAMAGE[kind]
    folder = write(tmp_path, HALVES)
    assert torch.equal(read_all(folder), WHOLE)
    harm(folder)
    with pytest.raises(ValueError, match="checkpoint") as error:
        read_all(folder)
    assert words in str(error.value) and str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_no_flipped_bit_of_the_manifest_passes_as_something_else(tmp_path):
    """One bit in every byte is refused by the reader and named by `damage`."""
    folder = write(tmp_path, HALVES)
    raw = (folder / "manifest.json").read_bytes()
    for at in range(len(raw)):
        (folder / "manifest.json").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 8]) + raw[at + 1 :])
        with pytest.raises(ValueError, match="manifest.json cannot be used") as error:
            Reader(folder)
        assert checkpoint.damage(folder) == [str(error.value)]


@pytest.mark.parametrize("file", ["rank-00000.safetensors", "rank-00001.safetensors"])
def test_a_flipped_bit_of_any_byte_of_a_file_is_named(file, tmp_path):
    folder = write(tmp_path, HALVES)
    assert checkpoint.damage(folder) == []
    for at in range((folder / file).stat().st_size):
        flip(folder / file, at)
        found = checkpoint.damage(folder)
        assert found == [f"checkpoint {folder}: {file} is damaged: its checksum is not that of the manifest"]
        flip(folder / file, at)
    truncate(folder / file, 50)
    assert checkpoint.damage(folder) == [f"checkpoint {folder}: {file} is 50 bytes long, not 128"]
    (folder / file).unlink()
    assert checkpoint.damage(folder) == [f"checkpoint {folder}: {file} is missing"]


def test_shares_of_the_check_are_the_whole_of_it(tmp_path):
    folder = write(tmp_path, HALVES)
    for name in ("rank-00000.safetensors", "rank-00001.safetensors"):
        flip(folder / name, 100)
    for world in range(1, 5):
        shares = [checkpoint.damage(folder, rank, world) for rank in range(world)]
        assert sorted(sentence for share in shares for sentence in share) == sorted(checkpoint.damage(folder))
        assert max(len(share) for share in shares) == (2 if world == 1 else 1)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (("v", "param", (0, 0), (4, 6)), "has no param of v"),
        (("w", "exp_avg", (0, 0), (4, 6)), "has no exp_avg of w"),
        (("w", "param", (0, 0), (4, 7)), r"w has shape \[4, 6\], the model wants \(4, 7\)"),
        (("w", "param", (3, 0), (2, 6)), r"w has shape \[4, 6\], the model wants \(2, 6\) from \(3, 0\)"),
        (("w", "param", (0,), (4,)), r"w has shape \[4, 6\], the model wants \(4,\)"),
    ],
)
def test_what_is_not_there_is_named(wanted, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        Reader(write(tmp_path, HALVES)).read(*wanted)


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 5 and 20, a half-written one of step 25 and a folder without a manifest."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (20, 5):
        write(folder, HALVES, step=step)
    (folder / ".step-00000025.partial").mkdir()
    (folder / ".step-00000025.partial" / "manifest.json").write_text("{}")
    (folder / "step-00000030").mkdir()
    (folder / "step-40").mkdir()
    (folder / "step-40" / "manifest.json").write_text("{}")
    return tmp_path / "run"


def test_a_path_means_the_newest_whole_checkpoint_under_it(run_dir):
    folder = run_dir / "checkpoints"
    newest = folder / "step-00000020"
    assert resolve(run_dir) == resolve(folder) == resolve(str(run_dir)) == resolve(newest) == newest
    assert resolve(folder / "step-00000005") == folder / "step-00000005"
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-00000005", "step-00000020"]


@pytest.mark.parametrize("where", ["nowhere", "run/checkpoints/step-00000030", "run/checkpoints/step-00000020/more"])
def test_a_path_to_nothing_is_named(where, run_dir):
    with pytest.raises(ValueError, match=r"there is no checkpoint at .*: give a run directory or a step-") as error:
        resolve(run_dir.parent / where)
    assert str(run_dir.parent / where) in str(error.value)


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, HALVES)
    doubled = [[(name, kind, 2 * whole, where) for name, kind, whole, where in pieces] for pieces in HALVES]
    assert torch.equal(read_all(write(tmp_path, doubled)), 2 * WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


# ---- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "override", "words"),
    [
        ("stage1", "checkpoint.load_modules=[encoder,head]", "must name one or more of encoder, adapter, llm"),
        ("stage1", "checkpoint.load_modules=[]", "must name one or more of encoder, adapter, llm"),
        ("stage2", "checkpoint.load_modules=[llm]", "must name all of train.trainable"),
        ("stage1", "checkpoint.keep_every=-1", "checkpoint.keep_every=-1: must be at least 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(recipe, override, words):
    with pytest.raises(ValueError, match=words):
        check_config(settings(recipe, override), 1)
