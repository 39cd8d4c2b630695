"""The benchmarks: that each runs at toy size and prints what it writes, and that the documentation shows the results.

What a benchmark starts is forked from a server that has torch and Megatron-core in memory, which saves the imports of
some fifteen processes; benchmarks/siglip.py starts torchrun itself.
"""

import importlib
import multiprocessing
import os
import runpy
import shutil
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from benchmarks import checkpoint, export, hybrid_step, mim, processes, results, tables
from tandem.data.media.text import Tokenizer
from tandem.launch import make_teacher
from tests.distributed.world import _import_path, run_world
from tests.support import ROOT

ALONE = ("data", "encoder", "experts", "imports", "mim_readings", "planning", "recompute", "siglip")
KEYS = {"name", "command", "date", "machine", "versions", "commit", "settings", "measured"}
SECONDS = 60.0


def run_forked(log: Path, words: list[str]) -> None:
    """`python WORDS` in a forked process, its output in `log`; a `mim.Command`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preload"])
    with _import_path():
        forkserver.ensure_running()
        process = context.Process(target=run_script, args=(log, words))
        process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0, log.read_text()[-4000:]


def run_script(log: Path, words: list[str]) -> None:
    os.chdir(ROOT)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # two threads only wait for each other at these sizes
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def forked_ranks(ranks: int, *what: str) -> dict:
    """A `processes.InRanks`."""
    return run_world(rank_that_may_fork, ranks, *what, timeout=SECONDS)[0]


def rank_that_may_fork(*what: str) -> dict:
    multiprocessing.current_process().daemon = False  # Megatron-core writes from processes of its own
    return processes.call(*what)


def check(name: str, out: Path, printed: str) -> dict:
    """The result of a toy run, whose table was printed."""
    result = results.read(out)
    assert set(result) == KEYS and result["name"] == name
    assert importlib.import_module(f"benchmarks.{name}").table(result) in printed
    assert results.provenance(result).startswith(f"Measured on {result['date'][:10]} by `")
    return result


@pytest.mark.parametrize("name", ALONE)
def test_a_benchmark_runs_at_toy_size_and_prints_its_result(name, tmp_path):
    out, log = tmp_path / "result.json", tmp_path / "log"
    run_forked(log, [f"benchmarks/{name}.py", "--size", "toy", "--out", str(out)])
    assert check(name, out, log.read_text())["command"].endswith(f"python benchmarks/{name}.py --size toy")


@pytest.mark.parametrize("benchmark", [hybrid_step, checkpoint, export], ids=lambda module: module.__name__)
def test_a_benchmark_of_ranks_runs_at_toy_size_and_prints_its_result(benchmark, tmp_path, capsys):
    out = tmp_path / "result.json"
    benchmark.main(["--size", "toy", "--out", str(out)], forked_ranks)
    check(benchmark.__name__.partition(".")[2], out, capsys.readouterr().out)


def test_masked_modelling_is_compared_at_toy_size(corpus, tmp_path, capsys):
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    tokenizer, out = Tokenizer(tmp_path / "tokenizer.json"), tmp_path / "result.json"
    make_teacher.write(make_teacher.build(tokenizer), tokenizer, tmp_path)  # of random weights
    words = ["--size", "toy", "--out", str(out), "--shards", str(corpus), "--teacher", str(tmp_path)]
    mim.main([*words, "--folder", str(tmp_path)], run_forked)
    result = check("mim", out, capsys.readouterr().out)
    assert all(0 <= value <= 1 for values in result["measured"]["top1"].values() for value in values)
    assert (tmp_path / "mim.png").stat().st_size > 1000


# ---- results and documentation ---------------------------------------------------------------------------------------


def test_the_documentation_shows_the_results():
    tables.main(["--check"])


def test_the_packed_encoder_is_held_to_the_peers_fastest_row():
    def row(name: str, *ms: float, drawn_batches: bool = False) -> dict:
        return {"name": name, "computed": 10, "drawn_batches": drawn_batches, "ms": ms}

    rows = [row("ours", 10, 12, 11), row("padded", 22, drawn_batches=True), row("alone", 10, 9), row("sorted", 15)]
    measured = {
        "patches": [4, 6],
        "flop": 1e9,
        "peak_flop_per_s": 1e11,
        "parameters": {"ours": 1, "peer": 1, "peer_positions": 1},
        "errors": {"features": 0.0, "gradients": 0.0},
        "mean_padding": [],
        "rows": rows,
    }
    settings = {"dtype": "float32", "depth": 1, "width": 1, "heads": 1}
    encoder = importlib.import_module("benchmarks.encoder")
    last = encoder.table(
        {"settings": settings, "measured": measured, "machine": {"gpu": None, "cores": 1}}
    ).splitlines()
    assert last[-2].startswith("  2.00x") and last[-2].endswith("batches in drawn order (padded)")
    assert last[-1].startswith("  0.86x") and last[-1].endswith("fastest row of all (alone)")


BLOCK = "before\n<!-- benchmarks/results/{}.json -->\nold\n<!-- end -->\nafter\n"


def test_a_block_is_written_from_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    assert tables.written(BLOCK.format("gpu")) == BLOCK.format("gpu").replace("old", f"**{tables.NOT_ON_A_GPU}**")
    row = {"seq_length": 8, "samples": 3, "plan_s": [0.1], "resume_s": 0.5, "bytes": 2**20, "fill": 1.0}
    settings = {"shards": 2, "samples": 5, "batch_tokens": 16}
    results.write(tmp_path / "planning.json", results.gather("planning", [], settings, {"rows": [row]}))
    text = tables.written(BLOCK.format("planning"))
    assert text.startswith("before\n<!-- benchmarks/results/planning.json -->\n```\none core, a catalog of 2 shards")
    assert "by `python benchmarks/planning.py` (" in text and text.endswith(").\n<!-- end -->\nafter\n")
    assert tables.written(text) == text


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BLOCK.format("planning"), "planning.json is missing: run python benchmarks/planning.py"),
        (BLOCK.format("gpu").replace("<!-- end -->", ""), "needs one <!-- end -->"),
        (BLOCK.format("gpu").replace("old", "<!-- benchmarks/results/gpu.json -->"), "needs one <!-- end -->"),
        ("<!-- end -->", "needs one <!-- end -->"),
    ],
)
def test_a_block_that_cannot_be_written_is_refused(text, words, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=words):
        tables.written(text)


def test_a_page_that_differs_and_a_result_that_no_page_shows_are_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    (tmp_path / "README.md").write_text(BLOCK.format("gpu"))
    with pytest.raises(SystemExit, match="README.md: not the tables"):
        tables.main(["--check"])
    tables.main([])
    tables.main(["--check"])
    results.write(tmp_path / "results/other.json", {})
    with pytest.raises(SystemExit, match="no page shows benchmarks/results/ other"):
        tables.main(["--check"])


def test_a_toy_overwrites_no_documented_result_and_a_command_names_no_output(monkeypatch):
    parse = importlib.import_module("argparse").ArgumentParser
    options = results.parse(parse(), ["--size", "toy"])
    assert options.out is None and not (results.OTHERS / "x").is_relative_to(results.FOLDER)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    words = ["--full", "--out", "somewhere.json", "--results", "else.json"]
    assert results.command("encoder-full", words) == "taskset -c 0 python benchmarks/encoder.py --full"
