"""Checkpoints across layouts: every tensor equal to the bit, training that goes on as if nothing had happened."""

import pytest
import torch

from tests.distributed.runs import build_run, train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, read_metrics
from train import checkpoint

SMALL = ["train.seq_length=256", "train.global_batch_size=8", "data.max_patches=64", "optim.lr=1e-3"]
LAYOUTS = {
    "one process": (1, []),
    "tp2.pp2.ep2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2", "parallel.encoder.zero_stage=3"]),
    "pp2.vpp2": (2, ["parallel.pp=2", "parallel.vpp=2", "parallel.encoder.zero_stage=2"]),
    "tp2.ep2.etp2": (4, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"]),
}


def run(corpus, folder, layout, *overrides, recipe="stage1"):
    world, sizes = LAYOUTS[layout]
    arguments = [*SMALL, *corpus_overrides(corpus), *sizes, *overrides]
    run_world(train_run, world, recipe, arguments, str(folder), timeout=180)
    return read_metrics(folder)


def differences_after_loading(overrides, path):
    """Boxes of the state, once loaded, that differ from the checkpoint's, and how many were compared."""
    _, engines, data, _ = build_run("stage1", overrides, steps=0)
    reader = checkpoint.Reader(path)
    checkpoint.load(reader, engines, optimizer=True)
    wrong, count = [], 0
    for chunk in [*engines.encoder.state(), *engines.llm.state()]:
        count += 1
        if not torch.equal(chunk.tensor, reader.read(chunk.name, chunk.kind, chunk.start, tuple(chunk.tensor.shape))):
            wrong.append((chunk.name, chunk.kind, chunk.start))
    steps = (engines.encoder.optimizer_steps, engines.llm.optimizer_steps)
    data.stream.load_state(reader.state.data)
    return wrong, count, steps


@pytest.fixture(scope="module")
def half_way(corpus, tmp_path_factory):
    """A run of three steps under tp2.pp2.ep2 and its checkpoint."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run(corpus, folder, "tp2.pp2.ep2", "train.steps=3", "optim.schedule=constant", "optim.warmup_steps=0")
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_equal_to_the_bit_in_any_layout(corpus, half_way, layout):
    world, sizes = LAYOUTS[layout]
    overrides = [*SMALL, *corpus_overrides(corpus), *sizes]
    for wrong, count, steps in run_world(
        differences_after_loading, world, overrides, checkpoint.resolve(half_way), timeout=180
    ):
        assert wrong == []
        assert count > 50
        assert steps == (3, 3)


def test_resuming_in_another_layout_continues_the_run(corpus, half_way, tmp_path):
    """Three steps on four ranks and three on two equal six on one, within rounding; the data goes on where it was."""
    constant = ("train.steps=6", "optim.schedule=constant", "optim.warmup_steps=0")
    whole = run(corpus, tmp_path / "whole", "one process", *constant)
    resumed = run(
        corpus,
        tmp_path / "resumed",
        "pp2.vpp2",
        *constant,
        "checkpoint.resume=true",
        f"checkpoint.dir={half_way}/checkpoints",
        "checkpoint.keep=9",
    )
    assert [line["step"] for line in resumed] == [3, 4, 5]
    for mine, other in zip(resumed, whole[3:], strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm_encoder"] == pytest.approx(other["grad_norm_encoder"], rel=1e-3)
        assert mine["grad_norm_llm"] == pytest.approx(other["grad_norm_llm"], rel=1e-3)


def test_stages_chain_across_layouts_and_lengths(corpus, tmp_path):
    """stage0 -> stage1 -> stage2; the last one takes the optimizer state along and goes to longer rows."""
    run(corpus, tmp_path / "0", "pp2.vpp2", "train.steps=2", recipe="stage0")
    first = run(corpus, tmp_path / "1", "tp2.pp2.ep2", "train.steps=4", f"checkpoint.load_from={tmp_path}/0")
    second = run(
        corpus,
        tmp_path / "2",
        "one process",
        "train.steps=2",
        "train.seq_length=512",
        f"checkpoint.load_from={tmp_path}/1",
        recipe="stage2",
    )
    assert second[0]["loss"] < first[0]["loss"] - 0.3
    state = checkpoint.Reader(checkpoint.resolve(tmp_path / "2")).state
    assert state.optimizer_steps == {"encoder": 6, "llm": 6}


def test_moments_that_were_never_saved_are_refused(corpus, tmp_path):
    run(corpus, tmp_path / "0", "one process", "train.steps=1", recipe="stage0")
    with pytest.raises(RuntimeError, match="has no optimizer state of the llm"):
        run(corpus, tmp_path / "2", "one process", f"checkpoint.load_from={tmp_path}/0", recipe="stage2")
