"""Every number of metrics.jsonl and summary.json against one worked out here from weights, batches and clocks.

FLOPs are counted from the shapes of the weights in the checkpoint: a matrix costs two operations an entry for each row
that it meets, attention four a pair and channel, and training three times the forward.
"""

import json
import math
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

from tandem.parallel.engines.balance import ExpertLoad
from tandem.parallel.hybrid_step import StepOutput
from tandem.train import metrics
from tandem.train.checkpoints.checkpoint import Reader, resolve
from tandem.train.config.schema import Config
from tandem.train.metrics import Logger, StepMetrics, console_line
from tandem.train.reliability.guards import Record
from tandem.train.start import Position, RunPaths
from tandem.train.tasks.base import StepFacts
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.reference.batches import language_start
from tests.support import corpus_overrides, read_metrics, settings
from tests.train.followed import data_of

STEPS, WORLD, PEAK = 3, 2, 1e12  # FLOP/s of a rank, as `train_run` sets it
ROWS, SEQ = 6, 256
LANGUAGE = [
    f"train.steps={STEPS}",
    f"train.global_batch_size={ROWS}",
    f"train.seq_length={SEQ}",
    "train.micro_batch_size=1",
    "data.max_patches=64",
    "parallel.balance=false",
]
CONTRASTIVE = [f"train.steps={STEPS}", "data.max_patches=64"]


def ran(recipe: str, overrides: list[str], run_dir):
    run_world(train_run, WORLD, recipe, overrides, str(run_dir), timeout=180)
    return read_metrics(run_dir), json.loads((run_dir / "summary.json").read_text()), run_dir


@pytest.fixture(scope="module")
def language(corpus, tmp_path_factory):
    """(metrics, summary, run directory) of stage1 on two replicas."""
    return ran("stage1", [*LANGUAGE, *corpus_overrides(corpus)], tmp_path_factory.mktemp("language") / "run")


@pytest.fixture(scope="module")
def batches(corpus):
    """What the run of `language` reads, as plain tensors."""
    return run_world(language_start, 1, "stage1", [*LANGUAGE, *corpus_overrides(corpus)], STEPS)[0][1]


@pytest.fixture(scope="module")
def contrastive(corpus, tmp_path_factory):
    overrides = [*data_of("vit_contrastive", str(corpus)), *CONTRASTIVE]
    return ran("vit_contrastive", overrides, tmp_path_factory.mktemp("contrastive") / "run")


def matrices(run_dir, prefix: str) -> int:
    """Entries of all weight matrices of a part, those of an expert as often as a token meets them on average."""
    llm, entries = settings("stage1").model.llm, 0
    for name, facts in Reader(resolve(run_dir)).tensors.items():
        if name.startswith(prefix) and len(facts["shape"]) == 2 and "word_embeddings" not in name:
            share = llm.top_k / llm.num_experts if ".local_experts." in name else 1
            entries += round(math.prod(facts["shape"]) * share)
    return entries


def samples_of(batch) -> list[list[int]]:
    """Lengths of the samples of every row, the padding at its end left out."""
    return [
        [length for length, domain in zip(row["lengths"], first_domains(row), strict=True) if domain >= 0]
        for row in batch["rows"]
    ]


def first_domains(row) -> list[int]:
    begins = [0, *torch.tensor(row["lengths"]).cumsum(0).tolist()[:-1]]
    return row["domain"][begins].tolist()


def test_what_a_step_holds(language, batches):
    """Images, visual tokens, trained tokens and how full the rows are."""
    for line, batch in zip(language[0], batches, strict=True):
        patches = sum(batch["images"]["lengths"])
        assert line["images"] == len(batch["images"]["lengths"]) > 0
        assert line["visual_tokens"] == patches // 4 == sum(len(row["at_V"]) for row in batch["rows"])
        assert line["trained_tokens"] == sum(int(row["mask"].sum()) for row in batch["rows"])
        assert line["tokens"] == ROWS * SEQ
        filled = sum(sum(lengths) for lengths in samples_of(batch))
        assert line["fill"] == pytest.approx(filled / (ROWS * SEQ)) and 0.5 < line["fill"] < 1
        assert line["skipped"] == line["cut"] == line["refused"] == 0 and line["bytes_read"] > 1000


def test_losses_of_domains_make_up_the_loss(language, batches):
    """Each domain's mean, weighted by its trained tokens."""
    for line, batch in zip(language[0], batches, strict=True):
        count = dict.fromkeys(batch["domains"], 0)
        for row in batch["rows"]:
            for number in row["domain"][row["mask"] > 0].tolist():
                count[batch["domains"][number]] += 1
        trained = {name: tokens for name, tokens in count.items() if tokens}
        assert set(line["loss_by_domain"]) == set(trained) and len(trained) > 1
        total = sum(line["loss_by_domain"][name] * tokens for name, tokens in trained.items())
        assert line["loss"] == pytest.approx(total / sum(trained.values()), rel=1e-6)


def test_flops_are_those_of_the_weights(language, batches):
    lines, _, run_dir = language
    encoder, llm = (getattr(settings("stage1").model, name) for name in ("encoder", "llm"))
    for line, batch in zip(lines, batches, strict=True):
        patches_I = batch["images"]["lengths"]
        of_encoder = 2 * matrices(run_dir, "encoder.") * sum(patches_I)
        of_encoder += sum(4 * n * n * encoder.width * encoder.depth for n in patches_I)
        of_adapter = 2 * matrices(run_dir, "adapter.") * sum(patches_I) // 4
        pairs = sum(n * (n + 1) // 2 for lengths in samples_of(batch) for n in lengths)
        of_llm = 2 * matrices(run_dir, "llm.") * ROWS * SEQ + 4 * llm.heads * llm.head_width * llm.layers * pairs
        flops = 3 * (of_encoder + of_adapter + of_llm)
        assert line["mfu"] * line["step_time_s"] * PEAK * WORLD == pytest.approx(flops, rel=1e-9)
        assert line["encoder_flops_share"] == pytest.approx(3 * of_encoder / flops, rel=1e-9)


def test_flops_of_the_encoders_own_recipe(contrastive):
    """The encoder's share of a contrastive step is that of its matrices and its attention over all patches."""
    lines, _, run_dir = contrastive
    encoder = settings("vit_contrastive").model.encoder
    for line in lines:
        flops = line["mfu"] * line["step_time_s"] * PEAK * WORLD
        linear = 6 * matrices(run_dir, "encoder.") * line["tokens"]
        attention = line["encoder_flops_share"] * flops - linear  # 12 n² d L summed over images of 4 to 64 patches
        per_patch = 12 * encoder.width * encoder.depth * line["tokens"]
        assert 4 * per_patch < attention <= 64 * per_patch
        assert line["loss"] == pytest.approx(line["losses"]["siglip"] + line["losses"]["superclass"], rel=1e-6)
        assert line["samples"] == 6 - line["skipped"]


@pytest.mark.parametrize("run", ["language", "contrastive"])
def test_speed_is_tokens_over_time(run, request):
    for line in request.getfixturevalue(run)[0]:
        assert line["tokens_per_s"] * line["step_time_s"] == pytest.approx(line["tokens"], rel=1e-9)
        assert 0 < sum(line["phase_s"].values()) <= line["step_time_s"] * 1.001


def test_load_is_the_largest_rank_over_the_mean(language, batches):
    """Without balancing a rank encodes the images of its own replica's rows, which are dealt in turn."""
    encoder = settings("stage1").model.encoder
    for line, batch in zip(language[0], batches, strict=True):
        cost_W, row_I = [0.0] * WORLD, row_of_images(batch)
        for patches, row in zip(batch["images"]["lengths"], row_I, strict=True):
            n, d = patches, encoder.width
            cost_W[row % WORLD] += 24 * n * d * d + 4 * n * n * d
        assert line["encoder_load_max_over_mean"] == pytest.approx(max(cost_W) / (sum(cost_W) / WORLD), rel=1e-6)
        assert line["encoder_load_max_over_mean"] > 1


def row_of_images(batch) -> list[int]:
    """Row in which the visual tokens of each image stand."""
    rows_V = torch.full((sum(batch["images"]["lengths"]) // 4,), -1)
    for number, row in enumerate(batch["rows"]):
        rows_V[row["rows_V"]] = number
    begins = torch.tensor(batch["images"]["lengths"]).cumsum(0) // 4 - 1
    return rows_V[begins].tolist()


def test_norms_of_parts_make_up_the_norm(language, contrastive):
    for line in (*language[0], *contrastive[0]):
        parts = [norm for name, norm in line.items() if name.startswith("grad_norm_")]
        assert len(parts) >= 2 and line["grad_norm"] == pytest.approx(math.hypot(*parts), rel=1e-6)


def test_the_summary_ends_as_the_metrics_do(language):
    lines, summary, run_dir = language
    assert summary["last"] == lines[-1]
    assert (summary["status"], summary["label"], summary["steps_this_run"]) == ("finished", "stage1", STEPS)
    assert summary["checkpoint"] == str(resolve(run_dir))
    assert summary["elapsed_s"] > sum(line["step_time_s"] for line in lines)
    assert 0 < summary["effective_time"] < 1 and summary["unreadable"] == []


# ---- by hand, without a world ----------------------------------------------------------------------------------------


def test_numbers_of_a_step(monkeypatch):
    """24 ranks of 2 TFLOP/s; a step of 4 s with 1,000 tokens and 48 TFLOP is a quarter of what they can do."""
    grid = SimpleNamespace(device=torch.device("cpu"), layout=SimpleNamespace(world=24))
    factors = [f"optim.lr_scale.{name}" for name in ("adapter=2", "llm=0.5", "router=0.5")]
    made = StepMetrics(settings("stage1", "logger.peak_tflops=2", *factors), grid)
    plan = SimpleNamespace(tokens_I=[3, 4, 5], state_after={"refused": {"a": 2, "b": 1}})
    prepared = SimpleNamespace(plan=plan, skipped=[1, 2], bytes_read=77)
    output = StepOutput(None, 0.5, 5.0, {"encoder": 3.0, "llm": 4.0}, True, False, memory_bytes=3 * 2**29)
    facts = StepFacts(1000, 48 * 10**12, 12 * 10**12, 1.25, {"cut": 9})
    for skipped_so_far in (2, 4):
        assert made.numbers(7, 0.01, 4.0, prepared, output, facts) == {
            "step": 7,
            "loss": 0.5,
            "lr": 0.01,
            "lr_encoder": 0.01,
            "lr_adapter": 0.02,
            "lr_llm": 0.005,
            "lr_router": 0.0025,
            "grad_norm": 5.0,
            "grad_norm_encoder": 3.0,
            "grad_norm_llm": 4.0,
            "applied": True,
            "tokens": 1000,
            "tokens_per_s": 250.0,
            "step_time_s": 4.0,
            "mfu": 0.25,
            "encoder_flops_share": 0.25,
            "encoder_load_max_over_mean": 1.25,
            "images": 3,
            "refused": 3,
            "bytes_read": 77,
            "skipped": skipped_so_far,
            "gpu_memory_gib": 1.5,
            "cut": 9,
        }
    measured = StepMetrics(settings("stage1"), grid)
    assert measured.numbers(0, 0.0, 1.0, prepared, output, facts)["mfu"] > 0


NUMBERS = {
    "step": 4,
    "loss": 1.25,
    "grad_norm": 2.5,
    "lr": 2.5e-4,
    "step_time_s": 2.0,
    "tokens_per_s": 12345.6,
    "mfu": 0.4321,
    "encoder_load_max_over_mean": 1.02,
    "applied": True,
}


def test_a_line_of_the_console():
    """On a GPU, of a model with experts; 3 steps of 40 s are left."""
    line = console_line(NUMBERS | {"expert_load_highest": 1.375, "gpu_memory_gib": 61.04}, 8, 40.0)
    assert line == (
        "step 5/8  loss 1.2500  grad norm 2.500  lr 2.50e-04  2.00 s  12,346 tokens/s  MFU 43.2%  "
        "load 1.02 encoder, 1.38 experts  61.0 GiB  0:02:00 left"
    )
    assert console_line(NUMBERS | {"applied": False}, 5, 1.0).endswith("load 1.02 encoder  0:00:00 left  skipped")


@pytest.mark.parametrize("terminal", [True, False])
def test_every_line_is_printed_with_and_without_a_terminal(terminal, tmp_path, clock, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if terminal else "0")
    logger = logger_of(settings("stage1", "logger.wandb=disabled", "train.steps=4"), tmp_path)
    for step in range(4):
        log(logger, step, 10.0)
    logger.finish("finished", 4, None)
    printed = capsys.readouterr().out
    assert "0:00:30 left" in printed and all(f"step {step}/4  loss 1.0000" in printed for step in range(1, 5))


def test_the_time_left_follows_the_newest_steps(tmp_path, clock, capsys):
    logger = logger_of(settings("stage1", "logger.wandb=disabled", "train.steps=1000"), tmp_path)
    for step, seconds in enumerate([100.0] * 3 + [2.0] * metrics.PACE_STEPS):
        log(logger, step, seconds)
    assert f"{timedelta(seconds=2 * (1000 - step - 1))} left" in capsys.readouterr().out.splitlines()[-1]


def test_numbers_of_the_experts():
    """Layer 1 is dense; what wandb draws has a name for each layer."""
    load = ExpertLoad({"all": [1.5, None, 2.0]}, {"all": [0.0, None, 0.25]}, 1.1, None)
    found = metrics._of_experts(load)
    assert found["expert_load_highest"] == 2.0 and found["dead_experts"] == {"all": [0.0, None, 0.25]}
    assert metrics._charts(found) == {
        "expert_load_max_over_mean": {"all": {"layer_000": 1.5, "layer_002": 2.0}},
        "dead_experts": {"all": {"layer_000": 0.0, "layer_002": 0.25}},
        "expert_load_highest": 2.0,
        "aux_loss": 1.1,
    }


@pytest.fixture
def clock(monkeypatch):
    """Seconds that the logger and its history read; the process began at 100."""
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(metrics.time, "time", lambda: now.s)
    monkeypatch.setattr(metrics.history, "process_began", lambda: now.s)
    monkeypatch.setattr(metrics.dist, "get_world_size", lambda: 1)
    return now


def logger_of(config: Config, run_dir, step: int = 0, attempt: int = 0, cause: str = "first start") -> Logger:
    return Logger(config, RunPaths(run_dir, run_dir, attempt, cause), 0, Position(step, {}, Record()))


def log(logger: Logger, step: int, seconds: float, applied: bool = True) -> None:
    numbers = {"step": step, "loss": 1.0, "grad_norm": 1.0, "tokens_per_s": 1.0, "lr": 0.1, "mfu": 0.5}
    numbers["encoder_load_max_over_mean"] = 1.0
    logger.log(numbers | {"step_time_s": seconds, "applied": applied}, {"llm": 0.1234567})


def test_effective_time_is_kept_steps_over_all_time(tmp_path, clock):
    """Steps of 10 s: one refused, one lost by a crash and taken again; 60 s until somebody started again."""
    config = settings("stage1", "logger.wandb=disabled", "train.steps=4")
    first = logger_of(config, tmp_path)
    for step, applied in enumerate([True, False, True]):
        clock.s += 20.0
        log(first, step, 10.0, applied)
    assert [line["effective_time"] for line in read_metrics(tmp_path)] == [10 / 20, 10 / 40, 20 / 60]
    assert read_metrics(tmp_path)[-1]["phase_s"] == {"llm": 0.123457}
    clock.s += 60.0  # died without a word after step 2, whose checkpoint is of step 2
    second = logger_of(config, tmp_path, step=2, attempt=1, cause="rank 0 killed")
    for step in (2, 3):
        clock.s += 15.0
        log(second, step, 10.0)
    second.finish("finished", 4, None)
    assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
    last, summary = read_metrics(tmp_path)[-1], json.loads((tmp_path / "summary.json").read_text())
    assert last["effective_time"] == summary["effective_time"] == 30 / 150
    for found in (last, summary):
        assert (found["restarts"], found["lost_steps"], found["rollbacks"]) == (1, 1, 0)
    assert summary["causes"] == ["rank 0 killed"]
    assert (summary["steps_this_run"], summary["elapsed_s"]) == (2, 30.0)
