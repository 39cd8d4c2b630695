"""Five steps of each of the encoder's own recipes, as a real run, against the reference trainer.

Weights that have been moved off ones and zeros are written as a checkpoint; a run on each layout starts from it and
the reference follows it over the same patches and captions, in fp64.  Clipping is active, warm-up and cosine both lie
inside the five steps, and no constant is the toy's own.  Weights and moments are read from the last checkpoint.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tandem.data.planning.plan import AUDIO
from tandem.train.checkpoints import checkpoint
from tandem.train.checkpoints.saving import Saver
from tandem.train.config.checks import check_config
from tandem.train.input.dataset import open_data
from tandem.train.tasks import find
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.reference.vision import Followed, Teacher, follow
from tests.support import identity, read_metrics, settings

STEPS, SAMPLES = 5, 5
SHARDS = {"vit_mim": "photo", "vit_contrastive": "*o*", "vit_omni": "sound"}  # *o*: photographs, clips as many images
ALL = [
    f"train.steps={STEPS}",
    f"train.global_batch_size={SAMPLES}",
    "optim.lr=2e-3",
    "optim.min_lr=3e-4",
    "optim.warmup_steps=2",
    "optim.betas=[0.8,0.93]",
    "data.max_patches=128",
    "data.video.budget=64",
    "model.text.rope_base=300",
]
OWN = {
    "vit_contrastive": [
        "parallel.encoder.chunk_patches=200",
        "optim=lamb",
        "optim.eps=1e-5",
        "optim.weight_decay=0.2",
        "optim.clip_norm=8",
        "optim.ema=0.9",
        "optim.layer_decay=0.8",
        "model.encoder.drop_path=0.4",
        "model.encoder.norm_eps=1e-3",
        "model.encoder.rope_base=40",
        "model.text.norm_eps=1e-4",
        "model.embedding=40",
        "objective.contrastive.siglip_weight=0.7",
        "objective.contrastive.superclass_weight=0.3",
        "objective.contrastive.scale_init=7",
        "objective.contrastive.bias_init=-4",
    ],
    "vit_mim": [
        "parallel.encoder.chunk_patches=200",
        "optim.eps=1e-6",
        "optim.weight_decay=0.3",
        "optim.clip_norm=0.8",
        "optim.layer_decay=0.7",
        "model.encoder.drop_path=0.3",
        "model.encoder.norm_eps=1e-4",
        "model.encoder.rope_base=70",
        "objective.mim.mask_ratio=0.6",
        "train.seed=3",
    ],
    "vit_omni": [
        "parallel.encoder.chunk_patches=400",
        "optim.eps=1e-6",
        "optim.weight_decay=0.3",
        "optim.clip_norm=4",
        "model.encoder.norm_eps=1e-5",
        "model.encoder.rope_base=150",
        "model.text.norm_eps=1e-3",
        "objective.omni.scale_init=6",
        "objective.omni.bias_init=-5",
        "objective.omni.matching_weight=0.3",
        "objective.omni.caption_weight=0.6",
    ],
}
LAYOUTS = {
    "one": (1, []),
    "zero1": (2, ["parallel.encoder.zero_stage=1"]),
    "zero3": (2, ["parallel.encoder.zero_stage=3", "parallel.encoder.recompute=replay"]),
}
CASES = [(recipe, layout) for recipe in OWN for layout in LAYOUTS]

# Relative deviations from fp64.  In fp32 the reference itself deviates as much as the real run: losses by 1e-7, norms
# by 7e-7, weights by 6e-7, first and second moments by 3e-6, since a gradient passes through all layers in fp32.
LOSS, NORM, WEIGHT, MOMENT = 1e-6, 5e-6, 1e-5, 1e-5
# The gradients of a temperature and its bias are sums over all pairs whose terms nearly cancel; their rounding does not
# cancel and is 1.2e-5 of the sum.
TEMPERATURE, TEMPERATURE_MOMENT = ("log_scale_moved", "bias_moved"), 5e-5
# A bias of keys without rotary positions adds the same to all logits of a softmax: its gradient is zero in exact
# arithmetic, and AdamW would turn its rounding into whole steps.  The keys' half, the first, is left out.
KEYS_AND_VALUES = ("to_keys_values.bias", "cross_key_value.bias")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The reference's five steps, and the folders of the runs to compare with them, by layout."""

    followed: Followed
    runs: dict[str, Path]


def begin(recipe: str, overrides: list[str], folder: str) -> tuple[dict, list[dict]]:
    """In a world of one: writes a checkpoint of moved weights; returns them and the batches of all steps."""
    config = settings(recipe, *overrides)
    data = open_data(config)
    stage = find(config.task).trainer(config, check_config(config, 1), torch.device("cpu"), data)
    engine, generator = stage.engines.encoder, torch.Generator().manual_seed(7)
    found = {c.name: c.tensor_N.view(c.shape) for c in engine.state() if c.kind == "param"}
    weights = {name: w + 0.05 * torch.randn(w.shape, generator=generator) for name, w in sorted(found.items())}
    engine.load(lambda name, *_: weights[name], optimizer=False)
    saver = Saver(Path(folder), stage.engines, **identity(config), keep=1, keep_every=0)
    saver.save(0, data.stream.state())
    assert saver.wait(), saver.poll()
    captions = {"vit_mim": 0, "vit_contrastive": 1, "vit_omni": 2}[recipe]
    batches = [plain(prepared, captions) for prepared, _ in stage.steps(STEPS)]
    data.reader.close()
    return weights, batches


def plain(prepared, captions: int) -> dict:
    """A prepared step of the only rank as the reference takes it."""
    plan, rank_shard = prepared.plan, prepared.rank_shard
    assert not prepared.skipped and np.array_equal(rank_shard.image_ids, np.arange(len(plan.patches_I)))
    rows = np.arange(plan.length_S.size)
    texts = []
    for number in range(captions):
        tokens_T, length_S = prepared.text.of(rows, number)
        texts.append([part.tolist() for part in np.split(tokens_T, np.cumsum(length_S)[:-1])])
    return {
        "patches_NP": torch.from_numpy(prepared.images.patches_NP.copy()),
        "grid_I2": torch.from_numpy(plan.grid_hw_I2.astype(np.int64).reshape(-1, 2)),
        "sample_I": torch.from_numpy(plan.image_sample_I.astype(np.int64)),
        "audio_I": torch.from_numpy(plan.time_I == AUDIO),
        "captions": [list(of_sample) for of_sample in zip(*texts, strict=True)],
    }


def teacher_of(run: Path, sizes: dict) -> Teacher:
    """The averaged encoder that a run saved."""
    reader = checkpoint.Reader(checkpoint.resolve(run))
    names = [name for name in reader.tensors if name.startswith("encoder.")]
    return Teacher({name: reader.whole(name, "ema").double() for name in names}, sizes)


@pytest.fixture(scope="module")
def comparisons(corpus, tmp_path_factory):
    """A comparison of each recipe; the contrastive run on one rank is the teacher of masked image modelling."""
    folder, made, teacher = tmp_path_factory.mktemp("reference"), {}, None
    for recipe, own in OWN.items():
        shards = f"data.sources.main.shards=['{corpus}/vision/train/{SHARDS[recipe]}-*.tar']"
        overrides = [*own, *ALL, shards, f"data.tokenizer={corpus}/tokenizer.json"]
        overrides += [f"objective.teacher={folder}/vit_contrastive-one"] if recipe == "vit_mim" else []
        start = folder / f"{recipe}-start"
        [(weights, batches)] = run_world(begin, 1, recipe, overrides, str(start))
        runs = {}
        for name, (ranks, layout) in LAYOUTS.items():
            runs[name] = folder / f"{recipe}-{name}"
            more = [*overrides, *layout, f"checkpoint.load_from={start}"]
            run_world(train_run, ranks, recipe, more, str(runs[name]))
        chosen = dataclasses.asdict(settings(recipe, *overrides))
        exact = {name: w.double() for name, w in weights.items()}
        made[recipe] = Comparison(follow(recipe, chosen, exact, batches, teacher), runs)
        if recipe == "vit_contrastive":
            teacher = teacher_of(runs["one"], chosen["model"]["encoder"])
    return made


def deviation(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """L2 norm of the difference, relative to that of the reference; 0 for two zeros."""
    difference = (ours.double() - exact).norm().item()
    return difference / exact.norm().item() if difference else 0.0


def learnt(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The entries whose gradient is not zero in exact arithmetic."""
    return tensor.chunk(2)[1] if name.endswith(KEYS_AND_VALUES) else tensor


@pytest.mark.parametrize("recipe", OWN)
def test_steps_cover_clipping_and_the_schedule(comparisons, recipe):
    """Clipping in most of the steps, all of warm-up, peak and cosine, and a zero gradient exactly where named."""
    followed = comparisons[recipe].followed
    assert sum(line["clip"] < 0.95 for line in followed.lines) >= 3
    assert [line["lr"] for line in followed.lines] == pytest.approx([1e-3, 2e-3, 2e-3, 1.15e-3, 3e-4])
    for name, moment in followed.optimizer.exp_avg.items():
        if name.endswith(KEYS_AND_VALUES):
            keys, values = moment.chunk(2)
            assert keys.norm() < 1e-10 * values.norm(), name
        else:
            assert moment.norm() > 0, name


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_metrics_match_the_reference(comparisons, recipe, layout):
    """Loss and its terms, gradient norms by part and the learning rate in force, step by step."""
    comparison = comparisons[recipe]
    seen = read_metrics(comparison.runs[layout])
    assert len(seen) == STEPS
    for line, exact in zip(seen, comparison.followed.lines, strict=True):
        assert line["applied"] and line["lr"] == pytest.approx(exact["lr"], rel=1e-12)
        assert line["loss"] == pytest.approx(exact["loss"], rel=LOSS)
        assert line["losses"] == pytest.approx(exact["losses"], rel=LOSS)
        norms = {name: norm for name, norm in exact.items() if name.startswith("grad_norm")}
        assert {name: norm for name, norm in line.items() if name.startswith("grad_norm")} == pytest.approx(
            norms, rel=NORM
        )


@pytest.mark.parametrize(("recipe", "layout"), CASES)
def test_checkpoint_matches_the_reference(comparisons, recipe, layout):
    """Weights, both moments, the average of the weights and the counts of words, of the last checkpoint."""
    comparison = comparisons[recipe]
    reader, end = checkpoint.Reader(checkpoint.resolve(comparison.runs[layout])), comparison.followed.optimizer
    assert reader.state.step == reader.state.optimizer_steps["encoder"] == STEPS
    exact = {"param": end.weights, "exp_avg": end.exp_avg, "exp_avg_sq": end.exp_avg_sq}
    if end.ema:
        exact["ema"] = end.average
    assert set(reader.tensors) == set(end.weights)
    far = {}
    for name, tensor in reader.tensors.items():
        assert set(tensor["kinds"]) == set(exact)
        for kind in exact:
            allowed = (
                WEIGHT if kind in ("param", "ema") else TEMPERATURE_MOMENT if name.endswith(TEMPERATURE) else MOMENT
            )
            found = deviation(learnt(name, reader.whole(name, kind)), learnt(name, exact[kind][name]))
            if not found <= allowed:
                far[name, kind] = found
    assert not far


@pytest.mark.parametrize("layout", LAYOUTS)
def test_word_counts_match_the_reference(comparisons, layout):
    """Captions seen and captions that hold each word, whichever rank has them."""
    comparison = comparisons["vit_contrastive"]
    kept, seen = (
        checkpoint.Reader(checkpoint.resolve(comparison.runs[layout])).task_tensors(),
        comparison.followed.seen,
    )
    assert kept["samples"].item() == seen.captions == STEPS * SAMPLES
    assert {token: count for token, count in enumerate(kept["counts"].tolist()) if count} == dict(seen.holding)
