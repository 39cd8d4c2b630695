"""benchmarks/gpu.py: that all of it runs, at toy size on the CPU, and what it does with rows that cannot."""

import importlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from benchmarks import gpu, gpu_memory, gpu_moe, gpu_report, results
from benchmarks.gpu_measure import Effort, Missing, Place, Result, Variant, Work, relative, run_all
from benchmarks.workloads.language import SLICE, slice_flops
from benchmarks.workloads.tower import draw_pack
from tandem.train.cost.flops import causal_pairs, encoder_flops, llm_flops
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.language.llm_config import LLMConfig
from tests.support import ROOT

NEED_PACKAGES = ("Transformer Engine", "flash-attn")  # words of rows that a CPU installation lacks something for
CPU = Place(torch.device("cpu"), torch.float32, full=False, peak_tflops=1.0)


def test_everything_that_can_runs_and_is_right(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--size", "toy", "--out", str(tmp_path)]
    command += ["--results", str(tmp_path / "gpu.json")]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # no compiler is needed on a CPU
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    lacking = [row for row in rows if any(words in row["name"] for words in NEED_PACKAGES)]
    assert {row["status"] for row in rows if row not in lacking} == {"ok"}
    assert len(lacking) == 4 and all(row["status"].startswith("not here: No module named") for row in lacking)
    assert all(row["ms"] > 0 for row in rows if row["status"] == "ok")
    checked = [row for row in rows if row["error"] is not None]
    assert len(checked) >= 16 and all(row["error"] < 1e-5 for row in checked)
    assert {row["case"].split(",")[0].split(" toy")[0] for row in rows} == {
        "tower", "moe", "long row", "cross-entropy", "attention", "recompute", "memory"
    }  # fmt: skip
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    assert not (tmp_path / "errors.log").exists()
    result = results.read(tmp_path / "gpu.json")
    assert result["measured"]["rows"] == rows
    assert result["command"] == "python benchmarks/gpu.py --device cpu --size toy"
    assert done.stdout.partition("first step")[2].count(gpu.table(result)) == 1


def test_the_towers_pack_is_the_one_that_was_measured_before():
    pack = draw_pack(32768)
    assert (len(pack.grid_I2), pack.patches) == (26, 32076)
    assert round(pack.flops(ViTConfig()) / 1e12, 1) == 135.3
    assert pack.flops(ViTConfig()) == 3 * encoder_flops(ViTConfig(), pack.grid_I2)
    assert not np.any(pack.grid_I2 % 2)


def test_flops_of_the_layers_are_those_of_training_without_vocabulary_and_diagonal():
    tokens, sequence = 32768, 8192
    pairs = causal_pairs([sequence] * (tokens // sequence))
    ours = slice_flops(SLICE, tokens, sequence)
    vocabulary = 2 * tokens * SLICE.width * SLICE.vocab_size
    diagonal = SLICE.layers * 4 * SLICE.heads * SLICE.head_width * tokens // 2
    assert ours == 3 * (llm_flops(SLICE, tokens, SLICE.layers * pairs) - vocabulary - diagonal)


def test_the_full_size_stage_is_the_recipes_with_an_eighth_of_the_experts():
    recipe = LLMConfig(**OmegaConf.load(ROOT / "recipes/model/seed_vl.yaml").llm)
    assert vars(gpu_memory.STAGE) == vars(recipe) | {"layers": 4, "num_experts": recipe.num_experts // 8}


# ---- rows that cannot run --------------------------------------------------------------------------------------------


def fails(error: Exception):
    def build():
        raise error

    return build


def fine():
    return Work(lambda: None, flops=10**9, tokens=10)


def test_no_row_stops_the_next(tmp_path):
    rows = [
        Variant("case", "no memory", fails(torch.OutOfMemoryError("no"))),
        Variant("case", "broken", fails(RuntimeError("kernel not for this device\nmore"))),
        Variant("case", "no package", fine, needs={"no_such_package": "pip install it"}),
        Variant("case", "refused", fails(Missing("backend x: needs sm_90"))),
        Variant("case", "wrong", fine, error=lambda: 0.3),
        Variant("case", "not a number", fine, error=lambda: float("nan")),
        Variant("case", "fine", fine, error=lambda: 1e-6),
    ]
    results = list(run_all(rows, CPU, Effort(time.monotonic() + 100), tmp_path))
    assert [result.status for result in results] == [
        "out of memory",
        "RuntimeError: kernel not for this device",
        "not here: No module named 'no_such_package'; pip install it",
        "not here: backend x: needs sm_90",
        "wrong: off by 3e-01 of the reference, rounding explains 1e-04",
        "wrong: off by nan of the reference, rounding explains 1e-04",
        "ok",
    ]
    assert [result.wrong for result in results] == [False, True, False, False, True, True, False]
    assert "kernel not for this device" in (tmp_path / "errors.log").read_text()
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == len(rows)
    assert next(run_all([rows[-1]], CPU, Effort(time.monotonic() - 1), tmp_path)).status == "no time left"


def test_rows_after_a_lost_device_say_so(tmp_path, monkeypatch):
    """A CUDA context that ended, from here: every call raises."""
    faults = []

    def call(*_):
        if faults:
            raise faults[0]

    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, call)

    def lose():
        faults.append(torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore"))
        call()

    cuda = Place(torch.device("cuda", 0), torch.bfloat16, full=True, peak_tflops=1.0)
    rows = [
        Variant("case", name, build) for name, build in (("fine", fine), ("lost", lambda: Work(lose)), ("next", fine))
    ]
    results = list(run_all(rows, cuda, Effort(time.monotonic() + 100), tmp_path))
    assert [result.status for result in results] == [
        "ok", "AcceleratorError: CUDA error: an illegal memory access was encountered", "device lost"
    ]  # fmt: skip
    assert [result.wrong for result in results] == [False, True, True]
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_no_case_stops_the_next_and_what_was_measured_is_told(tmp_path, monkeypatch, capsys):
    def broken(place, stack):
        stack.callback(fails(RuntimeError("cannot end")))
        yield Variant("one", "before", fine)
        raise RuntimeError("no more\nrows")

    monkeypatch.setattr(gpu, "CASES", {"one": gpu.Case(1, broken), "two": gpu.Case(1, lambda *_: iter([last]))})
    last = Variant("two", "after", fine)
    with pytest.raises(RuntimeError, match="cannot end"):
        gpu.main(["--device", "cpu", "--size", "toy", "--out", str(tmp_path)])
    table = capsys.readouterr().out.partition("x time")[2]
    assert all(words in table for words in ("before", "after", "rows not measured", "RuntimeError: no more"))
    assert (tmp_path / "gpu.png").stat().st_size > 1000
    assert "no more" in (tmp_path / "errors.log").read_text()


def test_cudnn_is_foreign_outside_the_folders_of_torch_and_its_package(tmp_path):
    (tmp_path / "site/nvidia/cudnn/lib").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "site/nvidia/cudnn")
    paths = [f"{tmp_path}/site/nvidia/cudnn/lib/libcudnn.so.9", f"{tmp_path}/site/nvidia/cudnn2/libcudnn.so.9"]
    assert gpu_moe.outside(paths, [f"{tmp_path}/link"]) == paths[1:]


def test_relative_error_is_the_worst_and_no_number_is_no_error():
    one = torch.ones(4)
    assert relative([one, 1.5 * one], [one, one]) == pytest.approx(0.5)
    assert np.isnan(relative([one * float("nan"), one], [one, one]))


# ---- what is said of the results -------------------------------------------------------------------------------------


def result(case, name, tflops, ours=True, **more) -> Result:
    return Result(case, name, ours, ms=1.0, spread=0.0, tflop=tflops / 1e3, tflops=tflops, **more)


def test_targets_are_judged_by_the_rows_of_their_case():
    rows = [
        result("tower 32k", "auto, compiled, recompute none", 510.0, peak_gib=39.0),
        result("tower 32k", "auto, eager, recompute none", 420.0, peak_gib=50.0),
        result("tower 32k", "auto, compiled, recompute selective", 430.0, peak_gib=15.0),
        result("tower 32k", "Hugging Face Qwen3-VL tower, sdpa", 255.0, ours=False),
        result("long row", "32,768 tokens, torch kernels, recompute none", 500.0),
        result("long row", "131,072 tokens, torch kernels, recompute none", 480.0),
        result("cross-entropy", "tile by tile", 300.0, extra_gib=0.4),
        result("moe 32k", "torch kernels, recompute none", 515.0),
        Result("moe 32k", "Megatron-core, Transformer Engine", False, status="out of memory"),
    ]
    said = gpu_report.targets_table(rows)
    assert "tower 32k, TFLOP/s: held: 510, at least 500" in said
    assert "tower 32k, GiB at the peak: held: 39, at most 40" in said
    assert "tower 32k, times the Hugging Face tower: held: 2, at least 1.9" in said
    assert "tower 32k, TFLOP/s, recompute selective: MISSED: 430, at least 440" in said
    assert "long row, time a FLOP, times that of 32,768 tokens: held: 1.042, at most 1.1" in said
    assert "cross-entropy, GiB beyond input and gradients: held: 0.4, at most 1.5" in said
    assert "moe 32k, times Megatron-core + Transformer Engine: not run" in said
    assert "moe 8k, TFLOP/s: not run" in said


def test_a_result_keeps_cases_of_earlier_runs_on_the_same_machine_alone(tmp_path):
    def run(case: str, milliseconds: float, machine: str = "one") -> dict:
        row = vars(Result(case, "row", True, ms=milliseconds))
        facts = {"machine": machine, "versions": {}, "commit": None, "settings": {}}
        return {**facts, "command": f"gpu.py --case {case}", "measured": {"rows": [row]}}

    path, first = tmp_path / "gpu.json", run("tower", 1.0)
    assert gpu.with_earlier_cases(path, first) == first
    results.write(path, first)
    both = gpu.with_earlier_cases(path, run("moe", 2.0))
    assert [row["ms"] for row in both["measured"]["rows"]] == [1.0, 2.0]
    assert both["command"] == "gpu.py --case tower && gpu.py --case moe"
    for replaced in (run("tower", 3.0), run("moe", 2.0, machine="two")):
        assert gpu.with_earlier_cases(path, replaced) == replaced


def test_the_plan_names_every_case_and_runs_nothing(capsys):
    gpu.main(["--plan"])
    said = capsys.readouterr().out
    assert all(case in said for case in gpu.CASES)
    with pytest.raises(SystemExit):
        gpu.main(["--case", "nothing"])


# ---- tests for a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((ROOT / "tests/gpu").glob("test_*.py")), ids=lambda path: path.stem)
def test_gpu_tests_import(path):
    importlib.import_module(f"tests.gpu.{path.stem}")
