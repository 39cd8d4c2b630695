"""Checkpoint folders without engines: any box out of any boxes, and one sentence for every kind of damage."""

import json

import numpy as np
import pytest
import torch

from parallel.state import StateChunk
from train import checkpoint
from train.checkpoint import Reader, TrainState, resolve

STATE = TrainState(step=3, data={"epoch": 1, "row": 7}, optimizer_steps={"llm": 3}, recipe="stage1")
WHOLE = torch.arange(24.0).view(4, 6)
HALVES = [[("w", "param", WHOLE, (slice(0, 2), slice(0, 6)))], [("w", "param", WHOLE, (slice(2, 4), slice(0, 6)))]]


def write(folder, pieces_of_rank, state=STATE):
    """Publishes `step-N` under `folder`; pieces_of_rank: for each rank (name, kind, whole tensor, slices of it)."""
    final = folder / f"step-{state.step:08d}"
    staging, boxes = folder / f".{final.name}.partial", []
    staging.mkdir(parents=True)
    for rank, pieces in enumerate(pieces_of_rank):
        file = f"rank-{rank:05d}.safetensors"
        chunks = [
            StateChunk(
                name=name,
                kind=kind,
                shape=tuple(whole.shape),
                start=tuple(part.start for part in where),
                tensor=whole[where],
                written_here=True,
            )
            for name, kind, whole, where in pieces
        ]
        boxes += checkpoint._write(staging / file, file, chunks)
    checkpoint._publish(staging, final, state, boxes)
    return final


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
    """Three tensors, two of one name, cut at random over up to four files, read back in random boxes."""
    generator = np.random.default_rng(seed)
    pieces_of_rank = [[] for _ in range(int(generator.integers(1, 5)))]
    wholes = {}
    for name, kind in (("a", "param"), ("a", "exp_avg"), ("b.weight", "param")):
        shape = generator.integers(1, 9, int(generator.integers(1, 4))).tolist()
        whole = wholes[name, kind] = torch.from_numpy(generator.standard_normal(shape, np.float32))
        for where in cut_at_random(generator, tuple(slice(0, size) for size in shape)):
            pieces_of_rank[generator.integers(len(pieces_of_rank))].append((name, kind, whole, where))
    reader = Reader(write(tmp_path, pieces_of_rank))
    assert reader.state == STATE
    for (name, kind), whole in wholes.items():
        everything = tuple(slice(0, size) for size in whole.shape)
        for where in [everything, *(box_at_random(generator, whole.shape) for _ in range(15))]:
            start, size = [part.start for part in where], [part.stop - part.start for part in where]
            assert torch.equal(reader.read(name, kind, tuple(start), tuple(size)), whole[where])


def test_only_what_is_marked_as_written_here_is_saved(tmp_path):
    (tmp_path / "staging").mkdir()
    chunks = [StateChunk("w", "param", (4, 6), (0, 0), WHOLE, written) for written in (True, False)]
    boxes = checkpoint._write(tmp_path / "staging/rank-00000.safetensors", "rank-00000.safetensors", chunks)
    assert [box["start"] for box in boxes] == [[0, 0]]


# ---- damage ---------------------------------------------------------------------------------------------------------


def read_all(folder):
    return Reader(folder).read("w", "param", (0, 0), (4, 6))


def edit_manifest(folder, change, sign=True):
    """Changes the manifest as another program would; `sign` keeps its digest right."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    if sign:
        manifest["digest"] = checkpoint._digest(manifest)
    path.write_text(json.dumps(manifest))


def rename_file(folder, name):
    def change(manifest):
        manifest["files"][name] = manifest["files"].pop("rank-00001.safetensors")
        manifest["boxes"][1]["file"] = name

    edit_manifest(folder, change)


def set_box(key, value, place=1):
    return lambda folder: edit_manifest(folder, lambda manifest: manifest["boxes"][place].update({key: value}))


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGE = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json cannot be used: [Errno 2] No such file"),
    "empty manifest": (lambda f: truncate(f / "manifest.json", 0), "manifest.json cannot be used"),
    "truncated manifest": (lambda f: truncate(f / "manifest.json", 200), "manifest.json cannot be used"),
    "manifest that is a list": (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json cannot be used"),
    "manifest that is no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff"), "manifest.json cannot be used"),
    "another format": (
        lambda f: edit_manifest(f, lambda manifest: manifest.update(format="tandem checkpoint 9")),
        "its format is 'tandem checkpoint 9', this version reads 'tandem checkpoint 1'",
    ),
    "no list of files": (lambda f: edit_manifest(f, lambda manifest: manifest.pop("files")), "it has no 'files'"),
    "no step": (lambda f: edit_manifest(f, lambda manifest: manifest.pop("step")), "it has no 'step'"),
    "changed by hand": (
        lambda f: edit_manifest(f, lambda manifest: manifest.update(step=4), sign=False),
        "its digest does not match what it says",
    ),
    "missing file": (
        lambda f: (f / "rank-00001.safetensors").unlink(),
        "rank-00001.safetensors is missing or not 120 bytes long",
    ),
    "truncated file": (
        lambda f: truncate(f / "rank-00001.safetensors", 100),
        "rank-00001.safetensors is missing or not 120 bytes long",
    ),
    "damaged header of a file": (
        lambda f: flip(f / "rank-00001.safetensors", 0),
        "rank-00001.safetensors is damaged",
    ),
    "file name with a path": (lambda f: rename_file(f, "../outside.safetensors"), "../outside.safetensors is missing"),
    "file name that is absolute": (lambda f: rename_file(f, "/etc/passwd"), "/etc/passwd is missing"),
    "box in a file that is not listed": (
        set_box("file", "../outside.safetensors"),
        "its boxes lie in ../outside.safetensors, which it does not list",
    ),
    "box under an unknown key": (set_box("key", "9"), "rank-00001.safetensors is damaged"),
    "boxes that leave a hole": (
        lambda f: edit_manifest(f, lambda manifest: manifest["boxes"].pop()),
        "param of w is not complete",
    ),
    "boxes that lie on each other": (set_box("start", [0, 0]), "param of w is not complete"),
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
    """One bit in every byte: either it is refused, or what is read is what was written (a space became a tab, say)."""
    folder = write(tmp_path, HALVES)
    raw, refused = (folder / "manifest.json").read_bytes(), 0
    for at in range(len(raw)):
        (folder / "manifest.json").write_bytes(raw[:at] + bytes([raw[at] ^ 1 << at % 7]) + raw[at + 1 :])
        try:
            reader = Reader(folder)
            assert reader.state == STATE and torch.equal(reader.read("w", "param", (0, 0), (4, 6)), WHOLE), at
        except ValueError as error:
            assert str(folder) in str(error)
            refused += 1
    assert refused > 0.9 * len(raw)


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


def state_of(step):
    return TrainState(step=step, data={}, optimizer_steps={}, recipe="stage1")


@pytest.fixture
def run_dir(tmp_path):
    """A run with checkpoints of steps 5 and 20, a half-written one of step 25 and a folder without a manifest."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (20, 5):
        write(folder, HALVES, state_of(step))
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


def test_pruning_keeps_the_newest_and_touches_nothing_else(run_dir):
    folder = run_dir / "checkpoints"
    for step in (100, 7):
        write(folder, HALVES, state_of(step))
    others = {path.name for path in folder.iterdir()} - {path.name for path in checkpoint.checkpoints(folder)}
    checkpoint._prune(folder, keep=2)
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-00000020", "step-00000100"]
    checkpoint._prune(folder, keep=5)
    assert len(checkpoint.checkpoints(folder)) == 2
    checkpoint._prune(folder, keep=1)
    assert {path.name for path in folder.iterdir()} == others | {"step-00000100"}


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, HALVES)
    doubled = [[(name, kind, 2 * whole, where) for name, kind, whole, where in pieces] for pieces in HALVES]
    assert torch.equal(read_all(write(tmp_path, doubled)), 2 * WHOLE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]
