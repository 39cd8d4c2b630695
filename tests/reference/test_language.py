"""stage0, stage1 and stage2 against the reference trainer: five steps of the real loop, from the same weights and
batches, with clipping active, warm-up and cosine inside the five steps, and no constant at its default.

fp32: both sides round differently, and nothing else may differ.  Losses, norms and weights agree within 1e-5, and
moments within 1e-6 of their L2 norm per tensor.  Adam's eps is 1e-5, far above the rounding of a gradient that is
zero in exact arithmetic (the key biases of the encoder), so that no such rounding becomes a whole step and no entry has
to be left out.
"""

import shutil

import pytest
import torch

from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.reference import optim
from tests.reference.batches import language_start, plain_settings, relative, saved
from tests.reference.language import Trainer
from tests.support import corpus_overrides, read_metrics

COMMON = [
    "train.steps=5",
    "train.seq_length=256",
    "train.global_batch_size=8",
    "data.max_patches=64",
    "optim.lr=3e-3",
    "optim.min_lr=5e-4",
    "optim.warmup_steps=2",
    "optim.clip_norm=0.5",
    "optim.betas=[0.8,0.9]",
    "optim.eps=1e-5",
    "optim.weight_decay=0.3",
    "optim.layer_decay=0.7",
    "parallel.encoder.chunk_patches=256",
    "model.encoder.rope_base=30",
    "model.encoder.norm_eps=1e-3",
    "model.encoder.drop_path=0.3",
    "model.llm.rope_base=500",
    "model.llm.norm_eps=1e-3",
    "model.llm.aux_loss=0.1",
    "model.llm.z_loss=0.1",
    "model.llm.init_std=0.05",
]


def rates(**of_parts: float) -> str:
    """The override that sets these factors of the learning rate, and 1 for all else."""
    factors = {"encoder": 1.0, "adapter": 1.0, "llm": 1.0, "router": 1.0} | of_parts
    return f"optim.lr_scale={{{', '.join(f'{part}: {factor}' for part, factor in factors.items())}}}"


COMMON.append(rates(encoder=0.5, adapter=1.5, llm=0.8, router=1.25))
LAYOUTS = {
    "one": (1, []),
    "tp2.pp2.ep2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]),
    "cp2.pp2.vpp2": (4, ["parallel.cp=2", "parallel.pp=2", "parallel.vpp=2"]),
    "dp2.zero3": (2, ["parallel.encoder.zero_stage=3"]),
}
TP_CP = (4, ["parallel.tp=2", "parallel.cp=2", "parallel.ep=2", "parallel.cp_comm_type=all_gather"])
NUMBERS = ("loss", "grad_norm", "grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")
WITHIN = {"param": 1e-5, "exp_avg": 1e-6, "exp_avg_sq": 1e-6}


def follow(recipe, overrides, start, *, trainer=None):
    """(reference trainer after the last step, its numbers of every step)."""
    weights, batches = start
    trainer = trainer or Trainer(weights, plain_settings(recipe, overrides))
    return trainer, [trainer.step(step, batch) for step, batch in enumerate(batches)]


def real(recipe, overrides, layout, tmp_path_factory):
    """(metrics, tensors of the last checkpoint, run directory) of the real loop."""
    world, more = TP_CP if layout == "tp2.cp2" else LAYOUTS[layout]
    run_dir = tmp_path_factory.mktemp(f"{recipe}-{layout}")
    run_world(train_run, world, recipe, [*overrides, *more], str(run_dir), timeout=180)
    return read_metrics(run_dir), saved(run_dir), run_dir


@pytest.fixture(scope="module")
def overrides(corpus):
    return [*COMMON, *corpus_overrides(corpus)]


@pytest.fixture(scope="module")
def start(overrides):
    """Initial weights and batches of stage1, which no layout changes."""
    return run_world(language_start, 1, "stage1", overrides, 5)[0]


@pytest.fixture(scope="module")
def stage1(overrides, start):
    return follow("stage1", overrides, start)


@pytest.fixture(scope="module")
def run_of(overrides, tmp_path_factory):
    """run_of(layout): the real run of stage1, once."""
    done = {}

    def run(layout):
        if layout not in done:
            done[layout] = real("stage1", overrides, layout, tmp_path_factory)
        return done[layout]

    return run


def assert_same_numbers(metrics, numbers, domains):
    assert len(metrics) == len(numbers)
    for step, (mine, reference) in enumerate(zip(metrics, numbers, strict=True)):
        for key in NUMBERS:
            assert mine[key] == pytest.approx(reference[key], rel=1e-5, abs=1e-12), f"{key} of step {step}"
        assert mine["lr"] == pytest.approx(reference["lr"], rel=1e-12), f"learning rate of step {step}"
        by_domain = {domains[number]: loss for number, loss in reference["loss_by_domain"].items()}
        assert mine["loss_by_domain"] == pytest.approx(by_domain, rel=1e-5), f"losses of step {step}"


def tensors_of(trainer):
    known = {"param": trainer.weights, "exp_avg": trainer.adam.exp_avg, "exp_avg_sq": trainer.adam.exp_avg_sq}
    return {(name, kind): tensor for kind, of_kind in known.items() for name, tensor in of_kind.items()}


def assert_same_tensors(tensors, expected, within=WITHIN):
    """Every tensor of `expected` and no other; `within` by kind, or by kind and part."""
    assert set(tensors) == set(expected)
    for (name, kind), tensor in tensors.items():
        off, most = relative(tensor, expected[name, kind]), within[kind]
        most = most[name.partition(".")[0]] if isinstance(most, dict) else most
        assert off <= most, f"{kind} of {name} is off by {off:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stage1_follows_the_reference(layout, run_of, stage1, start):
    metrics, tensors, _ = run_of(layout)
    trainer, numbers = stage1
    assert_same_numbers(metrics, numbers, start[1][0]["domains"])
    assert_same_tensors(tensors, tensors_of(trainer))


GEOMETRIES = {  # patches, blocks of patches that become a token, and normalisation that are not the default's
    "tp2.pp2.ep2": ["model.encoder.patch_size=16", "model.encoder.image_mean=[0.4,0.5,0.3]"],
    "dp2.zero3": ["model.connector.merge=3", "model.encoder.image_std=[0.2,0.5,0.4]"],
}


@pytest.mark.parametrize("layout", GEOMETRIES)
def test_other_geometries_follow_the_reference(layout, overrides, tmp_path_factory):
    three = [*overrides, *GEOMETRIES[layout], "train.steps=3"]
    start = run_world(language_start, 1, "stage1", three, 3)[0]
    metrics, tensors, _ = real("stage1", three, layout, tmp_path_factory)
    trainer, numbers = follow("stage1", three, start)
    assert_same_numbers(metrics, numbers, start[1][0]["domains"])
    within = WITHIN | {"exp_avg_sq": 2e-6}  # smaller deviations make larger pixels, whose gradients round more
    assert_same_tensors(tensors, tensors_of(trainer), within)


def test_the_five_steps_are_not_trivial(stage1, start, overrides):
    """Clipping changes updates, the schedule moves, several domains and both kinds of branches take part."""
    _, numbers = stage1
    clip_norm = plain_settings("stage1", overrides).optim.clip_norm
    assert all(step["grad_norm"] > clip_norm for step in numbers)
    assert len({step["lr"] for step in numbers}) >= 4
    assert all(len(step["loss_by_domain"]) > 1 for step in numbers)
    weights, batches = start
    keeps = [batch["images"]["keep_LI"] for batch in batches]
    assert all((keep == 0).any() and (keep > 0).any() for keep in keeps)
    assert {optim.is_matrix(w) for w in weights.values()} == {True, False}


def test_stage2_goes_on_with_the_moments_of_stage1(run_of, overrides, stage1, tmp_path_factory):
    """Constant learning rate, two rows per micro-batch, weights and moments of stage1's checkpoint.

    Ten steps of rounding instead of five are behind the second moments: twice the tolerance.
    """
    _, _, run_dir = run_of("one")
    second = [*overrides, "train.micro_batch_size=2", "optim.warmup_steps=0", f"checkpoint.load_from={run_dir}"]
    metrics, tensors, _ = real("stage2", second, "tp2.pp2.ep2", tmp_path_factory)
    _, batches = run_world(language_start, 1, "stage2", second, 5)[0]
    plain = plain_settings("stage2", second)
    assert plain.optim.schedule == "constant"
    trainer = Trainer(stage1[0].weights, plain)
    first = stage1[0].adam
    trainer.adam.steps, trainer.adam.exp_avg = first.steps, dict(first.exp_avg)
    trainer.adam.exp_avg_sq = dict(first.exp_avg_sq)
    _, numbers = follow("stage2", second, (None, batches), trainer=trainer)
    assert_same_numbers(metrics, numbers, batches[0]["domains"])
    assert_same_tensors(tensors, tensors_of(trainer), {kind: 2 * most for kind, most in WITHIN.items()})


@pytest.mark.parametrize("layout", ["one", "tp2.pp2.ep2"])
def test_stage0_trains_the_adapter_alone(layout, overrides, start, tmp_path_factory):
    zeros = [*overrides, "model.encoder.drop_path=0", rates(adapter=2.0)]
    metrics, tensors, _ = real("stage0", zeros, layout, tmp_path_factory)
    weights, batches = start
    still = [{**batch, "images": {**batch["images"], "keep_LI": None}} for batch in batches]
    trainer, numbers = follow("stage0", zeros, (weights, still))
    assert_same_numbers(metrics, [step | {"grad_norm_llm": 0} for step in numbers], batches[0]["domains"])
    for name, weight in weights.items():
        if not name.startswith("adapter."):
            assert torch.equal(tensors[name, "param"], weight), f"{name} is frozen"
    assert_same_tensors(tensors, tensors_of(trainer))


BALANCED = {  # layout and more settings, by ways of balancing
    "bias": ("cp2.pp2.vpp2", ["train.recompute=full"]),
    "bias.by_modality.seq_aux_loss": ("tp2.pp2.ep2", ["train.recompute=selective"]),
    "seq_aux_loss": ("tp2.cp2", []),
}
FEW_TOKENS = {kind: 3 * most for kind, most in WITHIN.items()}  # of an expert with few, gradients round more
LOADS = ("expert_load_max_over_mean", "dead_experts")


def balance(name: str) -> list[str]:
    """The overrides of a way of balancing; a rate so high that experts soon have no token."""
    uneven = ["model.llm.init_std=0.1", f"train.steps={BALANCED_STEPS}"]
    return uneven + [
        f"model.llm.balance.{setting}"
        for word, setting in (
            ("bias", "bias_update=0.1"),
            ("by_modality", "by_modality=true"),
            ("seq_aux_loss", "aux_loss_type=seq_aux_loss"),
        )
        if word in name.split(".")
    ]


BALANCED_STEPS = 3


@pytest.fixture(scope="module")
def uneven_start(overrides):
    return run_world(language_start, 1, "stage1", [*overrides, *balance("bias.by_modality")], BALANCED_STEPS)[0]


def start_of(name: str, uneven_start):
    """Initial weights and batches of a way of balancing, which has none, one or two biases per layer."""
    weights, batches = uneven_start
    lacking = (".expert_bias_visual",) if "by_modality" not in name else ()
    lacking += (".expert_bias",) if "bias" not in name.split(".") else ()
    return {key: w for key, w in weights.items() if not key.endswith(lacking)}, batches


@pytest.fixture(scope="module")
def balanced(overrides, uneven_start, tmp_path_factory):
    """balanced(name): what the reference and the real run give, once."""
    done = {}

    def run(name):
        if name not in done:
            layout, more = BALANCED[name]
            settings = [*overrides, *balance(name), *more, "checkpoint.every=2", "checkpoint.keep=2"]
            done[name] = (
                follow("stage1", settings, start_of(name, uneven_start)),
                real("stage1", settings, layout, tmp_path_factory),
            )
        return done[name]

    return run


@pytest.mark.parametrize("name", BALANCED)
def test_balanced_experts_follow_the_reference(name, balanced, uneven_start):
    """Biases to the bit, and what the metrics say of the experts: choices of all ranks, without padding."""
    (trainer, numbers), (metrics, tensors, _) = balanced(name)
    assert_same_numbers(metrics, numbers, uneven_start[1][0]["domains"])
    assert_same_tensors(tensors, tensors_of(trainer), FEW_TOKENS)
    biases = [key for key in tensors if "expert_bias" in key[0]]
    assert len(biases) == 4 * sum(word in name.split(".") for word in ("bias", "by_modality"))
    for key in biases:
        assert torch.equal(tensors[key], trainer.weights[key[0]]) and tensors[key].any(), key[0]
    for mine, reference in zip(metrics, numbers, strict=True):
        for key in LOADS:
            for group, loads in reference[key].items():
                assert mine[key][group] == pytest.approx(loads, rel=1e-9), (key, group)
        for key in ("aux_loss", "z_loss"):
            assert mine[key] == pytest.approx(reference[key], rel=1e-4), key
    dead = max(max(step["dead_experts"]["visual"]) for step in numbers)
    assert dead > 0 or name != "bias", "no expert is dead, nothing is tested"


def test_biases_go_on_in_another_layout(balanced, overrides, tmp_path_factory):
    """From the checkpoint after step 2 of four ranks, one rank takes the third step."""
    name = "bias.by_modality.seq_aux_loss"
    (trainer, numbers), (*_, run_dir) = balanced(name)
    resumed = tmp_path_factory.mktemp("resumed")
    shutil.copytree(run_dir / "checkpoints" / "step-00000002", resumed / "checkpoints" / "step-00000002")
    run_world(train_run, 1, "stage1", [*overrides, *balance(name), "checkpoint.resume=true"], str(resumed))
    (last,), tensors = read_metrics(resumed), saved(resumed)
    loads = numbers[-1]["expert_load_max_over_mean"]["visual"]
    assert last["expert_load_max_over_mean"]["visual"] == pytest.approx(loads, rel=1e-9)
    assert_same_tensors(tensors, tensors_of(trainer), FEW_TOKENS)
    for (key, _), tensor in tensors.items():
        assert "expert_bias" not in key or torch.equal(tensor, trainer.weights[key]), key


FROZEN = {  # what learns, where, and the factors of its rates; nothing goes back to a frozen encoder and adapter
    "llm": ("tp2.pp2.ep2", rates(llm=0.5)),
    "encoder": ("dp2.zero3", rates(encoder=0.5)),
}


@pytest.mark.parametrize("part", FROZEN)
def test_any_part_may_be_frozen(part, overrides, start, tmp_path_factory):
    """Only its own weights move, as in the reference."""
    layout, factors = FROZEN[part]
    three = [*overrides, "model.encoder.drop_path=0", "train.steps=3", f"train.trainable=[{part}]", factors]
    metrics, tensors, _ = real("stage1", three, layout, tmp_path_factory)
    weights, batches = start
    still = [{**batch, "images": {**batch["images"], "keep_LI": None}} for batch in batches[:3]]
    trainer, numbers = follow("stage1", three, (weights, still))
    assert_same_numbers(metrics, numbers, batches[0]["domains"])
    for name, weight in weights.items():
        assert torch.equal(tensors[name, "param"], weight) != name.startswith(f"{part}."), name
    assert_same_tensors(tensors, tensors_of(trainer))


def test_bf16_sums_gradients_in_fp32(overrides, start, tmp_path_factory):
    """One step, at the learning rate's peak.

    Layouts that differ in the data-parallel sum alone: had it been in bf16, moments of the LLM would be off by 2e-3; in
    fp32 they are off by 2e-6.  Gradients of the encoder meet in bf16 within a chunk, and another layout has other
    chunks: 3e-2 for the smallest biases, which are nothing but their first update, and twice that for squares.

    The reference, in fp32 from weights rounded to bf16, does not round activations: losses by 2e-5, norms by 1e-3,
    moments by 8e-2 for an expert that sees few tokens.
    """
    once = [*overrides, "train.steps=1", "optim.warmup_steps=0", "train.precision=bf16"]
    (one, tensors, _), (two, split, _) = (real("stage1", once, name, tmp_path_factory) for name in ("one", "dp2.zero3"))
    means = {"llm": 5e-6, "adapter": 2e-2, "encoder": 6e-2}
    squares = {part: 2 * most for part, most in means.items()}
    assert_same_tensors(split, tensors, {"param": means | {"llm": 1e-6}, "exp_avg": means, "exp_avg_sq": squares})
    weights, batches = start
    rounded = {name: weight.bfloat16().float() for name, weight in weights.items()}
    trainer = Trainer(rounded, plain_settings("stage1", [*overrides, "train.steps=1", "optim.warmup_steps=0"]))
    reference = trainer.step(0, batches[0])
    for metrics in (one[0], two[0]):
        for key in NUMBERS:
            assert metrics[key] == pytest.approx(reference[key], rel=1e-4 if key == "loss" else 2e-3), key
    assert_same_tensors(tensors, tensors_of(trainer), {"param": 0.15, "exp_avg": 0.15, "exp_avg_sq": 0.3})
