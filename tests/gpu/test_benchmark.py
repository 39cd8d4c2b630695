"""benchmarks/gpu.py at toy size: every row runs in bf16 and agrees with its reference, or names what it lacks."""

import json
import os
import subprocess
import sys

from tests.support import ROOT


def test_every_row_runs_or_names_what_it_lacks(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--size", "toy", "--out", str(tmp_path)]
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compilation is minutes, and the full sizes' business
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["status"].partition(":")[0] for row in rows} <= {"ok", "not here"}
    assert all(row["peak_gib"] > 0 for row in rows if row["status"] == "ok")
