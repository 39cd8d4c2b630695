"""Encoders of Hugging Face in training: ZeRO on two ranks against one rank, and where weights come from.

Losses agree within 1e-5 and the norms of encoder, adapter and LLM, each on its own, within 1e-4: sums in another order.
"""

import contextlib
import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModel

from tandem.parallel.grid import destroy_grid
from tandem.train.checkpoints.checkpoint import Reader, resolve
from tandem.train.families import encoders
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import ROOT, corpus_overrides, read_metrics, settings
from tests.train.vision_models import saved

KINDS = ("siglip", "clip", "siglip2", "qwen2_5_vl")
SMALL = [
    "train.seq_length=128", "train.global_batch_size=4", "data.max_patches=64", "optim.lr=1e-3", "train.steps=3",
    "optim.warmup_steps=0", "parallel.encoder.chunk_patches=128", "model.encoder.drop_path=0.2",
]  # fmt: skip
ZERO = {"ZeRO-1": ["parallel.encoder.zero_stage=1"], "ZeRO-3": ["parallel.encoder.zero_stage=3", "parallel.tp=2"]}
MOVED = "qwen2_5_vl-ZeRO-1"  # a run whose weights are no longer the folder's
NORMS = ("grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")


def train_each(runs: list[tuple[list[str], str]], without: str | None = None) -> list[str]:
    """Runs of stage1 one after the other, the last one when the folder `without` is gone; what each said on rank 0's
    console."""
    said = []
    for overrides, run_dir in runs:
        destroy_grid()
        if without and len(said) == len(runs) - 1 and dist.get_rank() == 0:
            shutil.rmtree(without)
        with contextlib.redirect_stdout(io.StringIO()) as console:
            train_run("stage1", overrides, run_dir)
        said.append(console.getvalue())
    return said


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        saved(kind, root)
    shutil.copytree(root / "qwen2_5_vl", root / "going")
    return root


@pytest.fixture(scope="module")
def trained(folders, corpus, tmp_path_factory) -> tuple[Path, list[str]]:
    """(directories of all runs, what the last three on two ranks said: from a folder, from a checkpoint, resumed)."""
    root, common = tmp_path_factory.mktemp("runs"), [*SMALL, *corpus_overrides(corpus)]
    of = {kind: [*common, f"model.encoder.folder='{folders}/{kind}'"] for kind in KINDS}
    run_world(train_each, 1, [(of[kind], f"{root}/{kind}") for kind in KINDS], timeout=240)
    runs = [([*of[kind], *zero], f"{root}/{kind}-{name}") for kind in KINDS for name, zero in ZERO.items()]
    still = [*common, f"model.encoder.folder='{folders}/going'", "optim.lr=0", "optim.min_lr=0", "checkpoint.every=1"]
    still += ["train.steps=1"]
    runs += [
        (still, f"{root}/first"),
        ([*still, "train.seed=5", f"checkpoint.load_from={root}/{MOVED}"], f"{root}/other"),
        ([*still, "train.steps=2", "checkpoint.resume=true"], f"{root}/first"),
    ]
    return root, run_world(train_each, 2, runs, f"{folders}/going", timeout=300)[0][-3:]


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("kind", KINDS)
def test_zero_trains_as_one_rank(trained, kind, zero):
    root, _ = trained
    found, wanted = read_metrics(root / f"{kind}-{zero}"), read_metrics(root / kind)
    assert len(found) == len(wanted) == 3
    for mine, one in zip(found, wanted, strict=True):
        assert mine["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for norm in NORMS:
            assert one[norm] > 0 and mine[norm] == pytest.approx(one[norm], rel=1e-4), norm


def test_weights_come_from_the_folder_unless_a_checkpoint_has_them(trained, folders):
    root, (first, other, resumed) = trained
    assert f"encoder from {folders}/going; without merger.ln_q.weight" in first and "the merger, a connector" in first
    assert f"encoder, adapter, llm from {root}/{MOVED}" in other and f"{folders}/going" not in other
    assert "encoder from" not in resumed and len(read_metrics(root / "first")) == 2
    folder = folders / "qwen2_5_vl"
    found = encoders.open_folder(folder, settings("stage1", f"model.encoder.folder='{folder}'").model.encoder)
    of = {run: Reader(resolve(root / run)) for run in ("first", "other", MOVED)}
    for name in (name for name in of["first"].tensors if name.startswith("encoder.")):
        first, other, moved = (of[run].whole(name) for run in ("first", "other", MOVED))
        box = ((0,) * first.dim(), tuple(first.shape))
        assert torch.equal(first, found.read(name.removeprefix("encoder."), "param", *box)), name
        assert torch.equal(other, moved) and not torch.equal(moved, first), name


def test_the_command_writes_what_came_in(trained, folders, tmp_path):
    root, _ = trained
    command = [sys.executable, "launch/checkpoint.py", "export", str(root / "first"), str(tmp_path / "out")]
    options = ["--format", "hf", "--part", "encoder", "--file-gb", "0.0001"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "merger.ln_q.weight" in done.stdout, done.stderr
    again, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in AutoModel.from_pretrained(folders / "qwen2_5_vl").state_dict().items():
        assert name.startswith("merger.") or torch.equal(again.state_dict()[name], tensor), name
