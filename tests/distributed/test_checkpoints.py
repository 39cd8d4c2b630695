"""Checkpoints across layouts: every tensor equal to the bit, training that goes on as if nothing had happened."""

import json
import re
import shutil

import pytest
import torch

from tandem.train.checkpoints import checkpoint
from tandem.train.checkpoints.saving import Saver
from tandem.train.input.dataset import open_data
from tandem.train.tasks.language import LanguageTask
from tests.distributed.runs import build_run, train_run, whole_state
from tests.distributed.world import run_world
from tests.support import corpus_overrides, identity, read_metrics
from tests.support import settings as toy_settings

SMALL = ["train.seq_length=256", "train.global_batch_size=8", "data.max_patches=64", "optim.lr=1e-3"]
LAYOUTS = {
    "one process": (1, []),
    "dp2": (2, ["parallel.encoder.zero_stage=2"]),
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
    """Tensors that differ, once loaded, from the checkpoint's; whether those are all it has; and Adam's counts."""
    _, engines, data, _ = build_run("stage1", overrides, steps=0)
    reader = checkpoint.Reader(path)
    checkpoint.load(reader, engines, optimizer=True)
    loaded = {("llm." + name, kind): tensor for (name, kind), tensor in whole_state(engines.llm).items()}
    loaded |= whole_state(engines.encoder)
    wrong = [key for key, tensor in loaded.items() if not torch.equal(tensor, reader.whole(*key))]
    saved = {(name, kind) for name, tensor in reader.tensors.items() for kind in tensor["kinds"]}
    steps = (engines.encoder.optimizer_steps, engines.llm.optimizer_steps)
    data.stream.load_state(reader.state.data)
    return wrong, set(loaded) == saved, steps


@pytest.fixture(scope="module")
def half_way(corpus, tmp_path_factory):
    """A run of three steps under tp2.pp2.ep2 and its checkpoint."""
    folder = tmp_path_factory.mktemp("half") / "run"
    run(corpus, folder, "tp2.pp2.ep2", "train.steps=3", "optim.schedule=constant", "optim.warmup_steps=0")
    return folder


def pass_on(overrides, source, folder):
    """Loads a checkpoint and saves what it became."""
    config, engines, _, _ = build_run("stage1", overrides, steps=0)
    reader = checkpoint.Reader(source)
    checkpoint.load(reader, engines, optimizer=True)
    saver = Saver(folder, engines, **identity(config), keep=1, keep_every=0)
    saver.save(reader.state.step, reader.state.data, reader.state.extra)
    return saver.wait(), saver.poll()


def test_tensors_stay_equal_to_the_bit_from_layout_to_layout(corpus, half_way, tmp_path):
    """tp2.pp2.ep2 under ZeRO 3 -> dp2 under ZeRO 2 -> pp2.vpp2 -> one process, the moments included."""
    first = checkpoint.Reader(checkpoint.resolve(half_way))
    source = first.path
    for place, layout in enumerate(("dp2", "pp2.vpp2", "one process")):
        world, sizes = LAYOUTS[layout]
        overrides = [*SMALL, *corpus_overrides(corpus), *sizes]
        results = run_world(pass_on, world, overrides, source, tmp_path / str(place), timeout=180)
        assert results == [(tmp_path / str(place) / first.path.name, None)] * world
        source = results[0][0]
        assert checkpoint.damage(source) == []
        there = checkpoint.Reader(source)
        assert there.tensors.keys() == first.tensors.keys()
        for name, tensor in first.tensors.items():
            assert set(tensor["kinds"]) == set(there.tensors[name]["kinds"]) == {"param", "exp_avg", "exp_avg_sq"}
            for kind in tensor["kinds"]:
                assert torch.equal(there.whole(name, kind), first.whole(name, kind)), (layout, name, kind)
        assert there.state.layout["world"] == world
        for key in ("step", "data", "optimizer_steps", "task", "extra"):
            assert getattr(there.state, key) == getattr(first.state, key)


TIMES = ("tokens_per_s", "step_time_s", "mfu", "phase_s", "effective_time")  # what two runs may differ in


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(corpus, tmp_path, precision):
    """Losses, norms, files of weights, moments and random states; the same samples in the same order."""
    settings = ("train.deterministic=true", f"train.precision={precision}", "checkpoint.keep=9")
    settings += ("optim.schedule=constant", "optim.warmup_steps=0", "checkpoint.every=2")
    whole = run(corpus, tmp_path / "whole", "tp2.pp2.ep2", *settings, "train.steps=4")
    shutil.copytree(tmp_path / "whole/checkpoints/step-00000002", tmp_path / "resumed/checkpoints/step-00000002")
    resumed = run(corpus, tmp_path / "resumed", "tp2.pp2.ep2", *settings, "train.steps=4", "checkpoint.resume=true")
    assert [line["step"] for line in resumed] == [2, 3]
    assert without_times(resumed) == without_times(whole[2:])
    one, other = (
        checkpoint.read_manifest(tmp_path / name / "checkpoints/step-00000004") for name in ("whole", "resumed")
    )
    assert one["files"] == other["files"] and len(one["files"]) == 4, "checksums of all that is saved"
    assert one["state"] == other["state"]
    position = checkpoint.read_manifest(tmp_path / "whole/checkpoints/step-00000002")["state"].data
    straight, again = (open_data(toy_settings("stage1", *SMALL, *corpus_overrides(corpus))).stream for _ in range(2))
    plans = [straight.next_step() for _ in range(4)]
    again.load_state(position)
    assert [again.next_step().digest() for _ in range(2)] == [plan.digest() for plan in plans[2:]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_state_is_equal_to_the_bit_in_any_layout(corpus, half_way, layout):
    world, sizes = LAYOUTS[layout]
    overrides = [*SMALL, *corpus_overrides(corpus), *sizes]
    for wrong, all_there, steps in run_world(
        differences_after_loading, world, overrides, checkpoint.resolve(half_way), timeout=180
    ):
        assert wrong == []
        assert all_there
        assert steps == (3, 3)


def test_resuming_in_another_layout_continues_the_run(corpus, half_way, tmp_path):
    """Three steps on four ranks and twenty on two equal 23 on one, but for the order of sums."""
    constant = ("train.steps=23", "optim.schedule=constant", "optim.warmup_steps=0")
    whole = run(corpus, tmp_path / "whole", "one process", *constant)
    shutil.copytree(half_way / "checkpoints", tmp_path / "resumed/checkpoints")
    resumed = run(corpus, tmp_path / "resumed", "pp2.vpp2", *constant, "checkpoint.resume=true")
    assert [line["step"] for line in resumed] == list(range(3, 23))
    for mine, other in zip(resumed, whole[3:], strict=True):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert mine["grad_norm_encoder"] == pytest.approx(other["grad_norm_encoder"], rel=1e-4)
        assert mine["grad_norm_llm"] == pytest.approx(other["grad_norm_llm"], rel=1e-4)


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


def load_parts(overrides, source, modules):
    """Which modules hold the checkpoint's weights after loading `modules`, and which what they had before."""
    _, engines, _, _ = build_run("stage1", overrides, steps=0)
    reader = checkpoint.Reader(source)

    def weights():
        llm = {"llm." + name: tensor for (name, kind), tensor in whole_state(engines.llm).items() if kind == "param"}
        return llm | {name: tensor for (name, kind), tensor in whole_state(engines.encoder).items() if kind == "param"}

    before = weights()
    checkpoint.load(reader, engines, optimizer=False, modules=modules)
    after = weights()
    loaded, untouched = set(LanguageTask.parts), set(LanguageTask.parts)
    for name, tensor in after.items():
        module = name.partition(".")[0]
        if not torch.equal(tensor, reader.whole(name)):
            loaded.discard(module)
        if not torch.equal(tensor, before[name]):
            untouched.discard(module)
    return loaded, untouched


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("modules", [["encoder"], ["adapter", "llm"]], ids="+".join)
def test_parts_are_loaded_alone(corpus, half_way, modules, stage):
    overrides = [*SMALL, *corpus_overrides(corpus), f"parallel.encoder.zero_stage={stage}", "train.seed=5"]
    for loaded, untouched in run_world(load_parts, 2, overrides, checkpoint.resolve(half_way), modules, timeout=180):
        assert loaded == set(modules)
        assert untouched == set(LanguageTask.parts) - set(modules)


def test_moments_that_were_never_saved_are_refused(corpus, tmp_path):
    run(corpus, tmp_path / "0", "one process", "train.steps=1", recipe="stage0")
    with pytest.raises(RuntimeError, match="has no optimizer state of the llm"):
        run(corpus, tmp_path / "2", "one process", f"checkpoint.load_from={tmp_path}/0", recipe="stage2")


def test_a_resume_behind_the_last_step_has_finished(half_way, corpus, tmp_path):
    """And stops nowhere: a job that is requeued for what was stopped would be requeued for ever."""
    shutil.copytree(half_way, tmp_path / "run")
    run(corpus, tmp_path / "run", "one process", "train.steps=2", "checkpoint.resume=true")
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps_this_run"] == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.llm.layers=2", "its llm has 4 layers, this model 2"),
        ("model.llm.num_experts=2", "llm.decoder.layers.0.mlp.router.weight has shape [4, 64], in this model [2, 64]"),
        ("model.llm.expert_width=32", "linear_fc1.weight has shape [128, 64], in this model [64, 64]"),
        (
            "model.llm.vocab_size=400",
            "llm.embedding.word_embeddings.weight has shape [384, 64], in this model [400, 64]",
        ),
        ("model.llm.qk_norm=true", "it has no llm.decoder.layers.0.self_attention."),
        ("model.encoder.depth=1", "it has encoder.blocks.1."),
        ("model.encoder.depth=3", "it has no encoder.blocks.2."),
        ("model.encoder.mlp_ratio=3.0", "encoder.blocks.0.mlp_up.weight has shape [256, 64], in this model [192, 64]"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_on_all_ranks(half_way, corpus, tmp_path, override, words):
    """Smaller matrices are no corners of larger ones, whatever settings may differ."""
    allowed = f"checkpoint.allow_changed=[{override.partition('=')[0]}]"
    start = [f"checkpoint.load_from={half_way}", override, allowed, "parallel.pp=2", "train.steps=1"]
    with pytest.raises(RuntimeError, match=re.escape(words)):
        run_world(train_run, 2, "stage1", [*SMALL, *corpus_overrides(corpus), *start], str(tmp_path / "run"))
