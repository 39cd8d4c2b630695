"""The encoder's own stages as whole runs.

Any world, ZeRO stage and chunk size does what one process does, goes on where it stopped, hands its encoder on, and
leaves out what it cannot read.
"""

import json
import os
import shutil

import pytest
import torch

from tandem.data.media.text import Tokenizer
from tandem.data.shards.index import load_index
from tandem.train.checkpoints import checkpoint
from tandem.train.tasks import find
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import read_metrics, settings

TASKS = {"vit_mim": "digit", "vit_contrastive": "*o*", "vit_omni": "sound"}  # photographs, and clips as many images
SMALL = ["train.global_batch_size=7", "train.steps=5", "optim.lr=1e-3", "optim.min_lr=1e-4", "data.max_patches=256"]
ROUNDING = 2e-5  # of fp32 sums in another order, over five steps of AdamW


def overrides(corpus, recipe: str, folder: str = "train") -> list[str]:
    shards = f"data.sources.main.shards=['{corpus}/vision/{folder}/{TASKS[recipe]}-*.tar']"
    return [*SMALL, shards, f"data.tokenizer={corpus}/tokenizer.json"]


def run(corpus, run_dir, recipe: str, world: int, *more: str) -> list[dict]:
    run_world(train_run, world, recipe, [*overrides(corpus, recipe), *more], str(run_dir), timeout=180)
    return read_metrics(run_dir)


def numbers(metrics: list[dict]) -> list[list[float]]:
    return [
        [line["loss"], line["grad_norm"], *line["losses"].values()]
        + [value for name, value in line.items() if name.startswith("grad_norm_")]
        for line in metrics
    ]


@pytest.fixture(scope="module")
def chain(corpus, tmp_path_factory):
    """A run of each stage in one process, each from the one before; the teacher is an encoder of random weights."""
    folder = tmp_path_factory.mktemp("chain")
    run(corpus, folder / "teacher", "vit_contrastive", 1, "train.steps=1", "optim.lr=0", "optim.min_lr=0")
    before = folder / "teacher"
    for recipe in TASKS:
        run(corpus, folder / recipe, recipe, 1, *start(folder, recipe, before), *extras(recipe))
        before = folder / recipe
    return folder


def start(folder, recipe: str, before=None) -> list[str]:
    """What stage `recipe` begins with."""
    before = (
        before or folder / {"vit_mim": "teacher", "vit_contrastive": "vit_mim", "vit_omni": "vit_contrastive"}[recipe]
    )
    return [f"objective.teacher={before}" if recipe == "vit_mim" else f"checkpoint.load_from={before}"]


def extras(recipe: str) -> list[str]:
    """Settings of the second stage that all must not depend on the world: drop path, layer-wise rates, an average."""
    extra = ["model.encoder.drop_path=0.3", "optim.layer_decay=0.7", "optim.ema=0.9"]
    return extra if recipe == "vit_contrastive" else []


@pytest.mark.parametrize(
    ("recipe", "world", "layout"),
    [
        ("vit_mim", 4, ["parallel.encoder.zero_stage=3", "parallel.encoder.chunk_patches=256"]),
        ("vit_mim", 2, ["parallel.encoder.zero_stage=2", "parallel.balance=false"]),
        ("vit_contrastive", 4, ["parallel.encoder.zero_stage=2", "parallel.encoder.chunk_patches=256"]),
        ("vit_contrastive", 3, ["parallel.encoder.zero_stage=3", "parallel.encoder.recompute=replay"]),
        ("vit_omni", 4, ["parallel.encoder.zero_stage=3", "parallel.encoder.chunk_patches=600"]),
        ("vit_omni", 2, ["parallel.encoder.zero_stage=1", "parallel.encoder.recompute=full"]),
        ("vit_omni", 3, ["parallel.encoder.zero_stage=2"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_any_world_does_what_one_process_does(corpus, chain, tmp_path, recipe, world, layout):
    """Losses, gradient norms, weights, moments and averages, with seven samples on two to four ranks."""
    seen = run(corpus, tmp_path / "run", recipe, world, *start(chain, recipe), *extras(recipe), *layout)
    torch.testing.assert_close(numbers(seen), numbers(read_metrics(chain / recipe)), rtol=ROUNDING, atol=0)
    ours, one = (checkpoint.Reader(checkpoint.resolve(folder)) for folder in (tmp_path / "run", chain / recipe))
    assert set(ours.tensors) == set(one.tensors) and one.modules == set(find(settings(recipe).task).parts)
    for name, tensor in one.tensors.items():
        assert ("ema" in tensor["kinds"]) == (recipe == "vit_contrastive")
        learnt = one.whole(name, "exp_avg_sq") > 1e-14  # keys' biases move no softmax: AdamW blows up their rounding
        for kind in set(tensor["kinds"]) - {"exp_avg_sq"}:
            mine, wanted = (reader.whole(name, kind)[learnt] for reader in (ours, one))
            torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=3e-5, msg=name)
    for name, tensor in one.task_tensors().items():
        assert torch.equal(ours.task_tensors()[name], tensor), "counts of whole numbers are exact"
    assert all(line["samples"] == 7 and line["skipped"] == 0 for line in seen)


@pytest.mark.parametrize(("recipe", "zero_stage"), [("vit_mim", 3), ("vit_contrastive", 1), ("vit_omni", 2)])
def test_bf16_stays_close(corpus, chain, tmp_path, recipe, zero_stage):
    """The precision of full scale: losses within what eight bits of weights and activations allow."""
    bf16 = ["train.precision=bf16", f"parallel.encoder.zero_stage={zero_stage}", "train.steps=3"]
    seen = run(corpus, tmp_path / "run", recipe, 2, *start(chain, recipe), *extras(recipe), *bf16)
    wanted = [line["loss"] for line in read_metrics(chain / recipe)[:2]]  # the schedule of three steps differs after
    assert [line["loss"] for line in seen[:2]] == pytest.approx(wanted, rel=0.05)
    assert all(line["applied"] for line in seen)


def test_each_stage_starts_from_the_last(chain):
    """The encoder of each is as the stage before left it; parts that it lacks keep their initial weights."""
    for recipe, before in (("vit_contrastive", "vit_mim"), ("vit_omni", "vit_contrastive")):
        mine, last = (checkpoint.Reader(checkpoint.resolve(chain / name)) for name in (recipe, before))
        names = [name for name in mine.tensors if name.startswith("encoder.") and name.endswith("qkv.weight")]
        for name in names:
            moved = (mine.whole(name) - last.whole(name)).abs().max()
            assert 0 < moved < 0.02 < last.whole(name).abs().max(), "five small steps away"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(corpus, chain, tmp_path):
    """Counts of words and averages of weights included."""
    same = [
        *start(chain, "vit_contrastive"),
        *extras("vit_contrastive"),
        "train.deterministic=true",
        "checkpoint.every=3",
    ]
    world, both = 2, []
    run(corpus, tmp_path / "whole", "vit_contrastive", world, *same)
    run(corpus, tmp_path / "part", "vit_contrastive", world, *same)
    shutil.rmtree(tmp_path / "part/checkpoints/step-00000005")
    run(corpus, tmp_path / "part", "vit_contrastive", world, *same, "checkpoint.resume=true")
    for folder in ("whole", "part"):
        both.append(checkpoint.Reader(checkpoint.resolve(tmp_path / folder)))
        assert both[-1].state.step == 5
    for name, tensor in both[0].tensors.items():
        for kind in tensor["kinds"]:
            assert torch.equal(both[0].whole(name, kind), both[1].whole(name, kind)), (name, kind)
    for name, tensor in both[0].task_tensors().items():
        assert torch.equal(both[1].task_tensors()[name], tensor)
    assert numbers(read_metrics(tmp_path / "whole")) == numbers(read_metrics(tmp_path / "part"))
    with pytest.raises(RuntimeError, match="the moments of .* are of optim.name=lamb, not adamw; set optim=lamb"):
        run(corpus, tmp_path / "part", "vit_contrastive", 1, *same, "optim=adamw", "checkpoint.resume=true")


def test_stage0_takes_the_encoder(corpus, chain, tmp_path):
    """And nothing else: adapter and LLM begin with initial weights, the encoder stays frozen and drops no branch."""
    shards = f"data.sources.main.shards=['{corpus}/train/read-*.tar']"
    small = [shards, f"data.tokenizer={corpus}/tokenizer.json", "train.steps=1", "train.seq_length=256"]
    small += [f"checkpoint.load_from={chain}/vit_omni", "data.max_patches=64"]
    for folder, rate in (("run", 0.0), ("dropping", 0.5)):
        stage0 = [*small, f"model.encoder.drop_path={rate}"]
        run_world(train_run, 2, "stage0", stage0, str(tmp_path / folder), timeout=180)
    assert read_metrics(tmp_path / "run")[0]["loss"] == read_metrics(tmp_path / "dropping")[0]["loss"]
    ours, theirs = (checkpoint.Reader(checkpoint.resolve(folder)) for folder in (tmp_path / "run", chain / "vit_omni"))
    assert ours.modules == {"encoder", "adapter", "llm"}
    for name in theirs.tensors:
        if name.startswith("encoder."):
            assert torch.equal(ours.whole(name), theirs.whole(name))


def damage_pixels(corpus, sample: int) -> None:
    """Overwrites the medium of one sample with zeros."""
    shard = next(iter((corpus / "vision/train").glob("photo-*.tar")))
    index = load_index(str(shard), Tokenizer(corpus / "tokenizer.json").sha256)
    record = index.media[int(index.samples[sample]["first_media"])]
    with shard.open("r+b") as file:
        file.seek(int(record["offset"]))
        file.write(bytes(int(record["size"])))
    os.utime(f"{shard}.index")  # an index must not be older than its shard


def test_a_damaged_sample_is_left_out_on_all_ranks(corpus, chain, tmp_path):
    """Counted, named, and the same losses whichever rank should have read it."""
    shutil.copytree(corpus / "vision", tmp_path / "vision")
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    damage_pixels(tmp_path, 3)
    shards = f"data.sources.main.shards=['{tmp_path}/vision/train/photo-*.tar']"
    more = [*start(chain, "vit_contrastive"), shards, "train.steps=10", "data.max_skip_rate=1"]
    one, three = (run(corpus, tmp_path / f"on-{n}", "vit_contrastive", n, *more) for n in (1, 3))
    torch.testing.assert_close(numbers(three), numbers(one), rtol=ROUNDING, atol=0)
    assert three[-1]["skipped"] >= 1 and {line["samples"] for line in three} == {6, 7}
    summary = json.loads((tmp_path / "on-3/summary.json").read_text())
    assert summary["unreadable"][0]["shard"].endswith("photo-0000.tar")
