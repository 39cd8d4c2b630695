"""The commands of the README, run as a person runs them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tandem.launch import evaluate, plot
from tests.distributed.world import HOST, run_torchrun
from tests.support import ROOT, corpus_overrides, read_metrics

KEYS = {
    "step",
    "loss",
    "lr",
    "grad_norm",
    "grad_norm_encoder",
    "grad_norm_adapter",
    "grad_norm_llm",
    "tokens",
    "tokens_per_s",
    "step_time_s",
    "mfu",
    "encoder_load_max_over_mean",
    "images",
    "skipped",
    "loss_by_domain",
    "phase_s",
}
HELDOUT = "data.sources.main.shards=['{}/heldout/read-*.tar']"
PHASES = {"wait", "encode", "dispatch", "llm", "combine", "encoder_backward", "update"}


@pytest.fixture(scope="module")
def toy_run(corpus, tmp_path_factory):
    """The job of `make toy`, three steps long; with offline wandb, as users have it."""
    run_dir = tmp_path_factory.mktemp("toy") / "run"
    job = ["launch/pretrain.py", "+recipe=stage2", "scale=toy", "parallel.pp=2", "parallel.ep=2", "optim.lr=1e-3"]
    done = run_torchrun(4, [*job, "train.steps=3", f"run.dir={run_dir}", *corpus_overrides(corpus)], timeout=240)
    assert done.returncode == 0, done.stderr
    return run_dir, done.stdout


def test_the_main_job_runs_to_the_end(toy_run):
    run_dir, console = toy_run
    lines = read_metrics(run_dir)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert set(lines[0]) >= KEYS
    assert set(lines[0]["phase_s"]) >= PHASES
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["steps_this_run"]) == ("finished", 3)
    assert (run_dir / "config.yaml").is_file()
    assert list((run_dir / "wandb").glob("offline-run-*"))
    assert "step 3/3" in console


def test_a_checkpoint_is_scored_and_drawn(toy_run, corpus, tmp_path):
    run_dir, _ = toy_run
    command = [sys.executable, "launch/evaluate.py", str(run_dir), HELDOUT.format(corpus)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    scores = json.loads((run_dir / evaluate.RESULT).read_text())
    assert scores["images"]["all"]["samples"] == scores["exchanged images"]["all"]["samples"] > 10
    failing = subprocess.run([*command, "--at-least", "0.99"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert failing.returncode == 1
    assert "exact match" in failing.stderr
    plot.main([str(run_dir), "--out", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_scores_do_not_depend_on_the_layout(toy_run, corpus):
    """The same checkpoint scored in one process and under tensor parallelism."""
    run_dir, _ = toy_run
    arguments = ["launch/evaluate.py", str(run_dir), HELDOUT.format(corpus)]
    scores = []
    for ranks, layout in ((1, "parallel.tp=1"), (2, "parallel.tp=2")):
        done = run_torchrun(ranks, [*arguments, layout], timeout=120)
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((run_dir / evaluate.RESULT).read_text())["images"]["all"])
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_ends_cleanly(corpus, tmp_path, number):
    """The signal goes to torchrun alone, as from a terminal; all ranks end after the same step, with a checkpoint."""
    run_dir = tmp_path / "run"
    job = ["launch/pretrain.py", "+recipe=stage1", "scale=toy", "parallel.pp=2", "train.steps=100000"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--local-addr={HOST}"]
    command += ["--nproc-per-node=2", *job, f"run.dir={run_dir}", "logger.wandb=disabled", *corpus_overrides(corpus)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    launcher = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not ((run_dir / "metrics.jsonl").is_file() and len(read_metrics(run_dir)) > 1):
            assert time.monotonic() < deadline, "the run did not start"
            assert launcher.poll() is None, launcher.stdout.read()
            time.sleep(0.2)
        launcher.send_signal(number)
        launcher.communicate(timeout=60)
    finally:
        launcher.kill()
        launcher.wait()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "stopped"
    steps = len(read_metrics(run_dir))
    assert summary["last"]["step"] == steps - 1
    assert (run_dir / "checkpoints" / f"step-{steps:08d}" / "manifest.json").is_file()
