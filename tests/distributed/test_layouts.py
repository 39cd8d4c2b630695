"""Layout parity: every kind of parallelism against one process on the same global batch, five steps, fp32.

Losses agree within 1e-5 and the gradient norms of encoder, adapter and LLM, each on its own, within 1e-4 relative: sums
in another order, and nothing else, may differ.  (A gradient wrong by a factor of two hardly moves a loss.)
"""

import pytest

from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, read_metrics

COMMON = [
    "train.steps=5",
    "train.seq_length=256",
    "train.global_batch_size=8",
    "data.max_patches=64",
    "optim.lr=1e-3",
    "optim.warmup_steps=0",
    "parallel.encoder.chunk_patches=256",
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


LAYOUTS = {
    "tp2": (2, ["parallel.tp=2"]),
    "pp2": (2, ["parallel.pp=2"]),
    "pp2.vpp2": (2, ["parallel.pp=2", "parallel.vpp=2"]),
    "ep2": (2, ["parallel.ep=2"]),
    "cp2": (2, ["parallel.cp=2"]),
    "tp2.ep2.etp2": (4, ["parallel.tp=2", "parallel.ep=2", "parallel.etp=2"]),
    "tp2.pp2.ep2": (4, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]),
    "tp2.pp2.ep2.dp2": (8, ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]),
    "tp2.cp2.pp2.vpp2.ep2": (8, ["parallel.tp=2", "parallel.cp=2", "parallel.pp=2", "parallel.vpp=2", "parallel.ep=2"]),
    "dp4.zero1": (4, ["parallel.encoder.zero_stage=1"]),
    "dp2.zero2": (2, ["parallel.encoder.zero_stage=2"]),
    "pp2.dp2.zero3": (4, ["parallel.pp=2", "parallel.encoder.zero_stage=3"]),
    "unbalanced": (2, ["parallel.balance=false"]),
    "dp4.groups-of-2": (4, ["parallel.balance_group_size=2"]),
    "replay.zero3": (2, ["parallel.encoder.recompute=replay", "parallel.encoder.zero_stage=3"]),
    "recompute": (2, ["parallel.pp=2", "parallel.encoder.recompute=full", "train.recompute=true"]),
    "recompute.zero3": (2, ["parallel.encoder.recompute=selective", "parallel.encoder.zero_stage=3"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_like_one_process(name, trained):
    world, overrides = LAYOUTS[name]
    assert_same_training(trained(world, *overrides), trained(1))
