"""launch/checkpoint.py as a person uses it, on small folders."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tandem.launch.checkpoint import main
from tandem.train.checkpoints.checkpoint import checkpoints
from tandem.train.reliability import history
from tests.train.folders import HALVES, flip, truncate, write

ENCODER, LLM = torch.linspace(-1, 1, 12).view(3, 4), torch.linspace(0, 5, 20).view(4, 5)


def pieces(encoder=ENCODER, llm=LLM):
    """Two ranks: encoder halves by rows, and an LLM tensor with a moment, halves by columns."""
    return [
        [
            ("encoder.w", "param", encoder, (slice(2 * rank, 2 * rank + 2 - rank), slice(0, 4))),
            ("llm.w", "param", llm, (slice(0, 4), slice(2 * rank, 2 + 3 * rank))),
            ("llm.w", "exp_avg", llm / 7, (slice(0, 4), slice(2 * rank, 2 + 3 * rank))),
        ]
        for rank in range(2)
    ]


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for step in (10, 20, 30):
        write(folder, pieces(llm=LLM + step), step=step)
    return tmp_path / "run"


def call(capsys, *words):
    """(exit status, what was printed); a status that is a sentence is printed too."""
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    printed = capsys.readouterr().out
    return (end.value.code, printed) if isinstance(end.value.code, int) else (1, printed + str(end.value.code))


def test_list_shows_all_and_says_which_cannot_be_read(run_dir, capsys):
    truncate(run_dir / "checkpoints/step-00000020/manifest.json", 50)
    status, said = call(capsys, "list", run_dir)
    assert status == 0
    assert all(word in said for word in ("step-00000010", "step-00000030", "language", "world=2", "tp=2"))
    assert "manifest.json cannot" in " ".join(said.split())


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step-00000020"])
def test_verify_names_the_damaged_file(where, run_dir, capsys):
    assert call(capsys, "verify", run_dir / where)[0] == 0
    flip(run_dir / "checkpoints/step-00000020/rank-00001.safetensors", 200)
    status, said = call(capsys, "verify", run_dir / where)
    assert status == 1
    assert "step-00000020: rank-00001.safetensors is damaged" in said and "GB/s, 1 damaged" in said
    assert said.count(": whole") == (0 if "step" in where else 2)


def test_verify_of_nothing_is_refused(tmp_path, capsys):
    assert call(capsys, "verify", tmp_path) == (
        1,
        f"error: there is no checkpoint at {tmp_path}: give a run directory or a step-* folder",
    )


def test_diff_tells_equal_from_different(run_dir, tmp_path, capsys):
    folder = run_dir / "checkpoints"
    same = write(tmp_path / "other", pieces(llm=LLM + 30), step=30)
    assert call(capsys, "diff", run_dir, same)[0] == 0
    status, said = call(capsys, "diff", folder / "step-00000010", folder / "step-00000020")
    assert status == 1
    assert "step: 10 / 20" in said and "param of llm.w: 1.000e+01" in said and "encoder.w" not in said
    status, said = call(capsys, "diff", run_dir, write(tmp_path / "third", HALVES, step=30))
    assert status == 1 and "param of w: only in one, or of another shape" in said


def test_export_writes_whole_weights_and_nothing_else(run_dir, tmp_path, capsys):
    assert call(capsys, "export", run_dir, tmp_path / "all")[0] == 0
    weights = load_file(tmp_path / "all/model.safetensors")
    assert weights.keys() == {"encoder.w", "llm.w"}
    assert torch.equal(weights["encoder.w"], ENCODER) and torch.equal(weights["llm.w"], LLM + 30)
    with safe_open(tmp_path / "all/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "task": "language", "step": "30"}
    assert call(capsys, "export", run_dir, tmp_path / "some", "--modules", "llm", "--dtype", "bf16")[0] == 0
    weights = load_file(tmp_path / "some/model.safetensors")
    assert weights.keys() == {"llm.w"} and torch.equal(weights["llm.w"], (LLM + 30).bfloat16())
    assert call(capsys, "export", run_dir, tmp_path / "some")[0] == 1, "never over what is there"


def test_export_cuts_large_models_into_files_with_an_index(run_dir, tmp_path, capsys):
    assert call(capsys, "export", run_dir, tmp_path / "cut", "--file-gb", "5e-8")[0] == 0
    index = json.loads((tmp_path / "cut/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * (ENCODER.numel() + LLM.numel())
    files = {name: load_file(tmp_path / "cut" / file)[name] for name, file in index["weight_map"].items()}
    assert len(set(index["weight_map"].values())) == 2
    assert torch.equal(files["encoder.w"], ENCODER) and torch.equal(files["llm.w"], LLM + 30)


def test_export_refuses_damage(run_dir, tmp_path, capsys):
    flip(run_dir / "checkpoints/step-00000030/rank-00000.safetensors", 300)
    status, said = call(capsys, "export", run_dir, tmp_path / "out")
    assert status == 1 and "rank-00000.safetensors is damaged" in said and not (tmp_path / "out").exists()


def test_prune_keeps_the_newest_good_ones(run_dir, capsys):
    folder = run_dir / "checkpoints"
    flip(folder / "step-00000030/rank-00000.safetensors", 300)
    status, said = call(capsys, "prune", run_dir, "--keep", 1, "--dry-run")
    assert status == 0 and "step-00000010 would be deleted" in said
    assert len(checkpoints(folder)) == 3
    status, said = call(capsys, "prune", run_dir, "--keep", 1)
    assert status == 0 and "rank-00000.safetensors is damaged" in said and "step-00000010 deleted, 2 left" in said
    assert [path.name for path in checkpoints(folder)] == ["step-00000020", "step-00000030"]
    assert call(capsys, "prune", run_dir, "--keep", 0)[0] == 1


def test_prune_keeps_round_steps(run_dir, capsys):
    assert call(capsys, "prune", run_dir, "--keep", 1, "--keep-every", 20)[0] == 0
    assert [path.name for path in checkpoints(run_dir / "checkpoints")] == ["step-00000020", "step-00000030"]


def test_history_prints_effective_time_restarts_and_lost_steps(run_dir, capsys):
    events = [
        {
            "event": "start",
            "time": 1005.0,
            "began": 1000.0,
            "attempt": 0,
            "launch": "a",
            "world": 4,
            "step": 0,
            "cause": "first start",
        },
        {
            "event": "start",
            "time": 1010.0,
            "attempt": 1,
            "launch": "a",
            "world": 4,
            "step": 2,
            "cause": "rank 1 killed",
        },
        {"event": "skipped", "time": 1011.0, "step": 3, "loss": 9.0, "grad_norm": 1.0, "why": "spike", "replay": None},
        {"event": "end", "time": 1020.0, "status": "finished", "step": 6},
    ]
    events[1]["lost_steps"] = 3
    (run_dir / history.FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    lines = [{"step": step, "step_time_s": 2.0, "applied": step != 3} for step in range(6)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, said = call(capsys, "history", run_dir)
    said = " ".join(said.replace("│", " ").split())
    assert status == 0
    assert "effective training time 50.0%" in said and "10.0 s / 20.0 s" in said
    assert "restarts 1" in said and "1 x rank 1 killed" in said and "steps done again 3" in said
    assert call(capsys, "history", run_dir / "checkpoints")[0] == 1
