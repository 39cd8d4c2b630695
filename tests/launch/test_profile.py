"""Time by kind of work: kernels by their names, traces as torch writes them, and the command."""

import gzip
import json
import os
import subprocess
import sys
import sysconfig

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import profile_workload
from tandem.launch import profile_step
from tandem.train.cost.trace_summary import KINDS, ORDER, kind_of, longest, read_trace, summarise, table
from tests.support import ROOT, corpus_overrides

PACKAGES = sysconfig.get_path("purelib")
# Kind and name, as profilers show it, cut where it goes on for lines.
LINES = (ROOT / "tests/launch/kernel_names.tsv").read_text().splitlines()
NAMES = [line.split("\t") for line in LINES]


@pytest.mark.parametrize(("kind", "name"), NAMES, ids=[name[:60] for _, name in NAMES])
def test_kernels_go_by_their_names(kind, name):
    assert kind_of(name) == kind


def test_every_kind_is_in_the_table():
    assert set(ORDER) == {*KINDS, "other"}


def kernel(name, begin, length, stream=7, cat="kernel"):
    return {"ph": "X", "cat": cat, "name": name, "ts": begin, "dur": length, "pid": 0, "tid": stream}


def test_kernels_count_and_gaps_between_them_on_all_streams_are_idle():
    events = [
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 500, "pid": 1, "tid": 1},
        kernel("nvjet_tst_256x128", 100, 40),
        kernel("ncclDevKernel_SendRecv", 120, 40, stream=20),  # half beside the product
        kernel("Memcpy HtoD (Pinned -> Device)", 190, 10, cat="gpu_memcpy"),
        {"ph": "i", "name": "mark", "ts": 7},
    ]
    summary = summarise(events)
    assert summary.seconds == pytest.approx({"GEMM": 40e-6, "communication": 40e-6, "copy": 10e-6})
    assert summary.launches == {"GEMM": 1, "communication": 1, "copy": 1}
    assert (summary.span, summary.idle) == pytest.approx((100e-6, 30e-6))


def test_without_kernels_an_operation_counts_without_what_it_calls(tmp_path):
    x = torch.randn(256, 256, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        torch.nn.functional.gelu(torch.nn.functional.linear(x, x)).sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json.gz"))
    events = read_trace(tmp_path / "trace.json.gz")
    (tmp_path / "trace.json").write_bytes(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert read_trace(tmp_path / "trace.json") == events
    summary = summarise(events)
    tops = [event for event in profiler.events() if event.cpu_parent is None]
    assert summary.launches["GEMM"] >= 3
    assert sum(summary.seconds.values()) == pytest.approx(sum(e.time_range.elapsed_us() for e in tops) / 1e6, rel=0.05)
    assert 0 <= summary.idle < summary.span


def test_the_table_divides_by_steps_and_sets_floors_beside():
    text = table(
        summarise([kernel("nvjet_a", 0, 3000), kernel("triton_poi_fused_add_0", 3000, 1000)]), {"GEMM": 1e-3}, 2
    )
    assert "| GEMM | 1.50 | 75.0% | 0 | 1.00 | 1.50 |" in text
    assert "| elementwise | 0.50 | 25.0% | 0 | | |" in text
    assert "| idle | 0.00 | 0.0% |" in text
    assert "`nvjet_a` | GEMM | 1.50" in longest(summarise([kernel("nvjet_a", 0, 3000)]), 2)


NO_TRACES = {
    "cut": b"{",
    "no object": b"{}",
    "no event": b'{"traceEvents": []}',
    "no text": b"\xff",
    "a gzip header": b"\x1f\x8b",
    "a cut gzip file": gzip.compress(b"[]" * 9)[:-9],
}


@pytest.mark.parametrize("content", NO_TRACES.values(), ids=NO_TRACES)  # a gzip file holds the time it was made at
def test_what_is_no_trace_is_refused(tmp_path, content):
    (tmp_path / "trace.json").write_bytes(content)
    with pytest.raises(SystemExit, match="error: .*trace"):
        profile_step.main(["summarise", str(tmp_path / "trace.json")])


@pytest.mark.parametrize("what", ["tower", "moe"])
def test_the_command_profiles_a_slice_and_reads_its_trace_again(what, tmp_path, capsys):
    profile_workload.main([what, "--size", "toy", "--device", "cpu", "--steps", "1", "--out", str(tmp_path)])
    floors = json.loads((tmp_path / "floors.json").read_text())["floors"]
    assert all(seconds > 0 for seconds in floors.values())
    assert set(floors) <= set(ORDER)
    said = (tmp_path / "summary.md").read_text()
    assert "| GEMM |" in said and "| attention backward |" in said
    capsys.readouterr()
    profile_step.main(["summarise", str(tmp_path / "trace.json.gz")])
    assert capsys.readouterr().out == said


def test_the_command_profiles_a_run(corpus, tmp_path):
    """Where the project is not installed: without `site` no .pth file is read."""
    small = ["train.seq_length=128", "train.global_batch_size=1", "data.max_patches=64", "data.block_samples=32"]
    settings = ["+recipe=stage1", "scale=toy", f"run.dir={tmp_path}/run", "train.steps=1", "logger.wandb=disabled"]
    command = [sys.executable, "-S", "launch/profile_step.py", "run", "--out", f"{tmp_path}/profile"]
    environment = os.environ | {"PYTHONPATH": PACKAGES, "TORCHDYNAMO_DISABLE": "1"}  # no compiler is needed on a CPU
    done = subprocess.run(
        [*command, *settings, *small, *corpus_overrides(corpus)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| GEMM |" in (tmp_path / "profile/summary.md").read_text()
    assert (tmp_path / "run/summary.json").is_file()
