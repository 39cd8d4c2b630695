"""The floors of the house: launch -> train -> parallel, data.  Nothing imports upward."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    "launch": {"train", "parallel", "data"},
    "train": {"parallel", "data"},
    "parallel": set(),
    "data": set(),
}
TORCH_DISTRIBUTED = ("torch.distributed", "deepspeed", "megatron")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("floor", BELOW)
def test_nothing_imports_upward(floor):
    for path in sorted((ROOT / floor).rglob("*.py")):
        for name in imports_of(path):
            top = name.split(".")[0]
            allowed = BELOW[floor] | {floor}
            assert top not in BELOW or top in allowed, f"{path.relative_to(ROOT)} imports {name}"


def test_models_and_data_know_no_process_group():
    # the LLM is handed to Megatron-core, which has groups of its own
    models = [path for path in (ROOT / "train/models").glob("*.py") if not path.stem.startswith("llm")]
    for path in [*(ROOT / "data").rglob("*.py"), *models]:
        for name in imports_of(path):
            assert not name.startswith(TORCH_DISTRIBUTED), f"{path.relative_to(ROOT)} imports {name}"


def test_files_hold_one_idea():
    for floor in BELOW:
        for path in (ROOT / floor).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


@pytest.mark.parametrize("path", sorted((ROOT / "tests/gpu").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_only_a_gpu_runs_can_be_imported_without_one(path):
    importlib.import_module(f"tests.gpu.{path.stem}")
