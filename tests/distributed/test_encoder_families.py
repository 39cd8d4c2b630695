"""Encoders of Hugging Face in training: ZeRO on several ranks against one rank, and where weights come from.

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
    "train.seq_length=128", "train.global_batch_size=4", "data.max_patches=64", "optim.lr=1e-3",
    "optim.warmup_steps=0", "parallel.encoder.chunk_patches=128", "model.encoder.drop_path=0.2",
]  # fmt: skip
WORLDS = {1: [], 2: ["parallel.encoder.zero_stage=1"], 4: ["parallel.encoder.zero_stage=3", "parallel.tp=2"]}
NORMS = ("grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")


def train_each(runs: list[tuple[list[str], str]]) -> list[str]:
    """Runs of stage1 one after the other; what each said on rank 0's console."""
    said = []
    for overrides, run_dir in runs:
        destroy_grid()
        with contextlib.redirect_stdout(io.StringIO()) as console:
            train_run("stage1", overrides, run_dir)
        said.append(console.getvalue())
    return said


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        saved(kind, root)
    return root


def test_zero_trains_as_one_rank(folders, corpus, tmp_path):
    common = [*SMALL, *corpus_overrides(corpus), "train.steps=3"]
    metrics = {}
    for world, sizes in WORLDS.items():
        runs = [
            ([*common, *sizes, f"model.encoder.folder='{folders}/{kind}'"], f"{tmp_path}/{kind}-{world}")
            for kind in KINDS
        ]
        run_world(train_each, world, runs, timeout=240)
        metrics |= {(kind, world): read_metrics(tmp_path / f"{kind}-{world}") for kind in KINDS}
    for (kind, world), found in metrics.items():
        for mine, one in zip(found, metrics[kind, 1], strict=True):
            assert mine["loss"] == pytest.approx(one["loss"], rel=1e-5), (kind, world)
            for norm in NORMS:
                assert one[norm] > 0 and mine[norm] == pytest.approx(one[norm], rel=1e-4), (kind, world, norm)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = Reader(resolve(run_dir))
    return {name: reader.whole(name) for name in reader.tensors if name.startswith("encoder.")}


def test_where_weights_come_from(folders, corpus, tmp_path):
    """From the folder, unless a checkpoint replaces them; a run that goes on does without the folder."""
    folder = Path(shutil.copytree(folders / "qwen2_5_vl", tmp_path / "folder"))
    own = [*SMALL, *corpus_overrides(corpus), f"model.encoder.folder='{folder}'"]
    still = [*own, "optim.lr=0", "optim.min_lr=0", "checkpoint.every=1"]
    first, other = str(tmp_path / "first"), str(tmp_path / "other")
    said = run_world(
        train_each,
        2,
        [
            ([*still, "train.steps=1"], first),
            ([*still, "train.steps=1", "train.seed=5", f"checkpoint.load_from={first}"], other),
        ],
        timeout=180,
    )[0]
    found = encoders.open_folder(folder, settings("stage1", f"model.encoder.folder='{folder}'").model.encoder)
    for name, tensor in weights(tmp_path / "first").items():
        bare = name.removeprefix("encoder.")
        assert torch.equal(tensor, found.read(bare, "param", (0,) * tensor.dim(), tuple(tensor.shape))), name
    assert f"encoder from {folder}; without merger.ln_q.weight" in said[0] and "the merger, a connector" in said[0]
    command = [sys.executable, "launch/checkpoint.py", "export", first, str(tmp_path / "out")]
    options = ["--format", "hf", "--part", "encoder", "--file-gb", "0.0001"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "merger.ln_q.weight" in done.stdout, done.stderr
    again, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for name, tensor in AutoModel.from_pretrained(folder).state_dict().items():
        assert name.startswith("merger.") or torch.equal(again.state_dict()[name], tensor), name
    assert said[1].index(f"encoder from {folder}") < said[1].index(f"encoder, llm from {first}")
    shutil.rmtree(folder)
    resumed = [*still, "train.steps=2", "checkpoint.resume=true", f"run.dir={first}"]
    (said,) = run_world(train_each, 2, [(resumed, first)], timeout=180)[0]
    assert "encoder from" not in said and len(read_metrics(tmp_path / "first")) == 2
