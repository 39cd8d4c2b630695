"""Whole runs of all recipes on one CUDA device in bf16 at toy size: training, resumes to the bit, evaluation.

    pytest --confcutdir=tests/gpu tests/gpu/test_loop.py

One process runs them all, as starting one takes longer than the steps.  The corpus is made once, or is that of
launch/make_shards.py in the folder TANDEM_CORPUS.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tandem.parallel.grid import destroy_grid
from tandem.train.build import local_device, start_world
from tandem.train.checkpoints.origins import open_origins
from tandem.train.config.checks import check_config
from tandem.train.input.dataset import open_data
from tandem.train.loop import run_in_world
from tandem.train.reliability.watchdog import Heartbeat
from tests.support import ROOT, make_corpus, read_metrics, settings

STEPS = 12
DETERMINISTIC = "train.deterministic=true"
LANGUAGE = {"stage0": "read", "stage1": "[cr]*", "stage2": "[cr]*"}
VISION = {"vit_mim": "*o*", "vit_contrastive": "*o*", "vit_omni": "sound"}  # photographs, and clips
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    given = os.environ.get("TANDEM_CORPUS")
    return Path(given) if given else make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module", autouse=True)
def device():
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as train.loop.run does in deterministic mode
    device = local_device()
    start_world(device)
    yield device
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


def start(corpus: Path, folder: Path, recipe: str, *overrides: str) -> list[dict]:
    """One run in this process; the lines of its metrics.jsonl."""
    vision = recipe in VISION
    shards = f"{corpus}/vision/train/{VISION[recipe]}" if vision else f"{corpus}/train/{LANGUAGE[recipe]}"
    config = settings(
        recipe,
        f"run.dir={folder}",
        f"data.sources.main.shards=['{shards}-*.tar']",
        f"data.tokenizer={corpus}/tokenizer.json",
        "logger.wandb=disabled",
        f"train.steps={STEPS}",
        "train.precision=bf16",
        "optim.lr=1e-3",
        *overrides,
    )
    layout, origins = check_config(config, 1), open_origins(config)
    try:
        assert run_in_world(config, layout, open_data(config), origins, local_device(), Heartbeat()) == "finished"
    finally:
        destroy_grid()
        torch.use_deterministic_algorithms(False)
    return read_metrics(folder)


def numbers(metrics: list[dict]) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in metrics]


@pytest.fixture(scope="module")
def stage1(corpus, runs) -> list[dict]:
    return start(corpus, runs / "stage1", "stage1", DETERMINISTIC, "checkpoint.every=5", "checkpoint.keep=9")


def test_stage1_learns(stage1):
    losses = [line["loss"] for line in stage1]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    assert all(line["applied"] and line["grad_norm"] > 0 for line in stage1)


def test_a_resume_goes_on_to_the_bit(corpus, runs, stage1):
    folder = runs / "resumed"
    step5 = "checkpoints/step-00000005"
    shutil.copytree(runs / "stage1" / step5, folder / step5)
    again = start(corpus, folder, "stage1", DETERMINISTIC, "checkpoint.every=5", "checkpoint.resume=true")
    assert numbers(again) == numbers(stage1)[5:]


@pytest.fixture(scope="module")
def plain(corpus, runs) -> list[dict]:
    return start(corpus, runs / "plain", "stage1", DETERMINISTIC, "parallel.compile=never")


def test_compilation_changes_rounding_alone(stage1, plain):
    """Of bf16, over twelve updates."""
    for compiled, eager in zip(stage1, plain, strict=True):
        assert compiled["loss"] == pytest.approx(eager["loss"], rel=2e-2)


@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
def test_recomputation_changes_rounding_alone(corpus, runs, plain, recompute):
    keys = (f"train.recompute={recompute}", f"parallel.encoder.recompute={recompute}", "parallel.compile=never")
    for mine, wanted in zip(start(corpus, runs / recompute, "stage1", DETERMINISTIC, *keys), plain, strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], rel=2e-2)


def test_the_checkpoint_is_scored(corpus, runs, stage1):
    heldout = f"data.sources.main.shards=['{corpus}/heldout/read-0000.tar']"
    command = [sys.executable, "launch/evaluate.py", str(runs / "stage1"), heldout]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    scores = json.loads((runs / "stage1" / "evaluation.json").read_text())
    assert 0 <= scores["images"]["all"]["exact_match"] <= 1


def test_stage2_starts_from_stage1(corpus, runs, stage1):
    lines = start(corpus, runs / "stage2", "stage2", f"checkpoint.load_from={runs}/stage1", "parallel.compile=never")
    assert lines[0]["loss"] < stage1[0]["loss"] - 0.3


def test_stage0_trains_the_adapter_alone(corpus, runs):
    lines = start(corpus, runs / "stage0", "stage0", "parallel.compile=never")
    assert all(line["grad_norm"] == pytest.approx(line["grad_norm_adapter"]) for line in lines)


@pytest.fixture(scope="module")
def contrastive(corpus, runs) -> list[dict]:
    return start(corpus, runs / "vit_contrastive", "vit_contrastive", "train.global_batch_size=16")


def test_vit_contrastive_trains(contrastive):
    assert contrastive[-1]["loss"] < contrastive[0]["loss"]


def test_vit_mim_trains_against_an_encoder_of_ours(corpus, runs, contrastive):
    teacher = f"objective.teacher={runs}/vit_contrastive"
    lines = start(corpus, runs / "vit_mim", "vit_mim", teacher, "train.global_batch_size=16", "parallel.compile=never")
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_vit_omni_trains_from_vit_contrastive(corpus, runs, contrastive):
    if not list((corpus / "vision" / "train").glob("sound-*.tar")):
        pytest.skip(f"{corpus} has no videos with sound")
    before = f"checkpoint.load_from={runs}/vit_contrastive"
    lines = start(corpus, runs / "vit_omni", "vit_omni", before, "parallel.compile=never")
    assert len(lines) == STEPS and all(line["loss"] == line["loss"] for line in lines)


def test_mfu_is_known_without_a_setting(stage1):
    assert torch.cuda.is_available() and all(0 < line["mfu"] < 1 for line in stage1)
