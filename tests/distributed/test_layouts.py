"""Layout parity: every kind of parallelism against one process on the same global batch, five steps, fp32.

Losses agree within 1e-5 and the gradient norms of encoder, adapter and LLM, each on its own, within 1e-4 relative: sums
in another order, and nothing else, may differ.  (A gradient wrong by a factor of two hardly moves a loss.)
"""

import numpy as np
import pytest

from tandem.parallel.plan.routes import place_of
from tandem.train.config.checks import check_config
from tandem.train.input.batch import visual_plan
from tandem.train.input.dataset import open_data
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, read_metrics, settings

COMMON = [
    "train.steps=5",
    "train.seq_length=256",
    "train.global_batch_size=8",
    "data.max_patches=64",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "parallel.encoder.chunk_patches=256",
    "model.llm.aux_loss=0.1",  # strong enough for a wrong scale of the router's losses to show in the norms
    "model.llm.z_loss=0.1",
]
NORMS = ("grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """Trains once a setting and remembers: trained(world, overrides) -> metrics of all steps."""
    done = {}

    def run(world, *overrides, recipe="stage1", shards="*"):
        key = (world, overrides, recipe, shards)
        if key not in done:
            run_dir = tmp_path_factory.mktemp("run")
            arguments = [*COMMON, *corpus_overrides(corpus, shards), *overrides]
            run_world(train_run, world, recipe, arguments, str(run_dir), timeout=180)
            done[key] = read_metrics(run_dir)
        return done[key]

    return run


def assert_same_training(ours, reference):
    assert len(ours) == len(reference) == 5
    for step, (mine, other) in enumerate(zip(ours, reference, strict=True)):
        assert mine["trained_tokens"] == other["trained_tokens"]
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5), f"loss of step {step}"
        assert mine["loss_by_domain"] == pytest.approx(other["loss_by_domain"], rel=1e-4)
        for norm in NORMS:
            assert mine[norm] == pytest.approx(other[norm], rel=1e-4), f"{norm} of step {step}"


TRADE, GATHER = "parallel.cp_comm_type=a2a", "parallel.cp_comm_type=all_gather"
HEADS = "model.llm.kv_heads=4"  # so many that four ranks share them; its reference has them too
LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2.vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "ep2": (2, ["parallel.ep=2"]),
    "tp2.ep2.etp2": (4, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"]),
    "tp2.pp2.ep2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]),
    "tp2.pp2.ep2.dp2": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]),
    "tp2.cp2.pp2.vpp2.ep2": (8, ["parallel.tp=2", "parallel.cp=2", "parallel.pp=2", "parallel.vpp=2", "parallel.ep=2"]),
    "pp4": (4, ["parallel.pp=4"]),
    "tp2.pp2.vpp2.ep4": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.vpp=2", "parallel.ep=4"]),
    "dp4.zero1": (4, ["parallel.encoder.zero_stage=1"]),
    "dp2.zero2": (2, ["parallel.encoder.zero_stage=2"]),
    "pp2.dp2.zero3": (4, ["parallel.pp=2", "parallel.encoder.zero_stage=3"]),
    "cp2.two-rows.selective": (2, ["parallel.cp=2", "train.micro_batch_size=2", "train.recompute=selective"]),
    "cp2.a2a": (2, ["parallel.cp=2", TRADE]),
    "cp2.all_gather": (2, ["parallel.cp=2", GATHER]),
    "cp4.a2a": (4, ["parallel.cp=4", TRADE, HEADS]),
    "cp4.all_gather": (4, ["parallel.cp=4", GATHER]),
    "tp2.cp2.a2a": (4, ["parallel.tp=2", "parallel.cp=2", TRADE, HEADS]),
    "tp2.cp2.all_gather": (4, ["parallel.tp=2", "parallel.cp=2", GATHER]),
    "cp2.pp2.ep2.a2a": (4, ["parallel.cp=2", "parallel.pp=2", "parallel.ep=2", TRADE]),
    "cp2.pp2.ep2.all_gather": (4, ["parallel.cp=2", "parallel.pp=2", "parallel.ep=2", GATHER]),
    "unbalanced": (2, ["parallel.balance=false"]),
    "deterministic": (2, ["train.deterministic=true"]),
    "dp4.groups-of-2": (4, ["parallel.balance_group_size=2"]),
    "replay.zero3": (2, ["parallel.encoder.recompute=replay", "parallel.encoder.zero_stage=3"]),
    "recompute": (2, ["parallel.pp=2", "parallel.encoder.recompute=full", "train.recompute=full"]),
    "recompute.zero3": (2, ["parallel.encoder.recompute=selective", "parallel.encoder.zero_stage=3"]),
    "selective": (2, ["parallel.tp=2", "parallel.ep=2", "train.recompute=selective"]),
    "offload": (2, ["parallel.pp=2", "parallel.encoder.recompute=offload", "train.recompute=offload"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(name, trained):
    world, overrides = LAYOUTS[name]
    same = [override for override in overrides if override.startswith(("train.micro_batch_size", "model."))]
    assert_same_training(trained(world, *overrides), trained(1, *same))


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "cp" in name and "two-rows" not in name])
def test_images_of_the_runs_cross_borders_of_cp(name, corpus):
    world, overrides = LAYOUTS[name]
    config = settings("stage1", *COMMON, *corpus_overrides(corpus), *overrides)
    layout, stream, crossing = check_config(config, world), open_data(config).stream, 0
    for plan in (stream.next_step() for _ in range(5)):
        visual = visual_plan(plan, layout, config.train.micro_batch_size, config.vision, 256)
        ends = visual.start_I, visual.start_I + visual.tokens_I - 1
        first_I, last_I = (place_of(at_I, layout, visual.row_tokens)[0] for at_I in ends)
        crossing += np.count_nonzero(first_I != last_I)
    assert crossing > 0, "the corpus no longer has such an image"


@pytest.mark.parametrize("name", ["pp2.dp2.zero3", "tp2", "ep2"])
def test_stage0_trains_like_one_process(name, trained):
    """The adapter alone learns; the frozen LLM only passes gradients on."""
    world, overrides = LAYOUTS[name]
    ours, reference = (trained(w, *o, recipe="stage0") for w, o in ((world, overrides), (1, [])))
    for mine, other in zip(ours, reference, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm_adapter"] == pytest.approx(other["grad_norm_adapter"], rel=1e-4)
        assert mine["grad_norm_encoder"] == mine["grad_norm_llm"] == 0


def test_replicas_without_images(trained, corpus):
    """Rows of text alone: a replica of one row has no image, and the step is the same as in one process."""
    short = ("train.seq_length=128", "train.global_batch_size=4")
    shards = "{text,read}-*"
    config = settings("stage1", *COMMON, *corpus_overrides(corpus, shards), *short)
    stream = open_data(config).stream
    rows = [set(stream.next_step().row_I.tolist()) for _ in range(5)]
    assert any(0 < len(with_images) < 4 for with_images in rows), "the corpus no longer has such a step"
    reference = trained(1, *short, shards=shards)
    assert_same_training(trained(4, *short, shards=shards), reference)
    assert_same_training(trained(4, *short, "parallel.encoder.zero_stage=3", shards=shards), reference)


def test_steps_without_any_image(trained):
    overrides = ("parallel.pp=2", "parallel.encoder.zero_stage=3")
    ours, reference = trained(2, *overrides, shards="text-*"), trained(1, shards="text-*")
    for mine, other in zip(ours, reference, strict=True):
        assert mine["images"] == 0
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert mine["grad_norm_llm"] == pytest.approx(other["grad_norm_llm"], rel=1e-4)


def test_bf16_trains_and_layouts_agree_within_its_rounding(trained):
    """bf16 weights and activations, fp32 master weights and gradients; 8 bits of mantissa bound the agreement."""
    ours, reference = (trained(*run, "train.precision=bf16") for run in ((2, "parallel.pp=2"), (1,)))
    for mine, other in zip(ours, reference, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=5e-3)
        assert mine["grad_norm_llm"] == pytest.approx(other["grad_norm_llm"], rel=5e-2)
