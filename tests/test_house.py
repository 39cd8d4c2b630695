"""The floors of the house: launch -> train -> parallel, data.  Nothing imports upward."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BELOW = {
    "launch": {"train", "parallel", "data"},
    "train": {"parallel", "data"},
    "parallel": set(),
    "data": set(),
}
REMOTE = ROOT / "train/export/remote"  # copied into exported folders
TORCH_DISTRIBUTED = ("torch.distributed", "deepspeed", "megatron")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("tandem.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if path.parent == REMOTE and node.level == 1:  # of each other, in an exported folder
                continue
            assert node.level == 0, f"{path}: relative import"
            module = node.module.removeprefix("tandem.")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("floor", BELOW)
def test_nothing_imports_upward(floor):
    for path in sorted((ROOT / floor).rglob("*.py")):
        for name in imports_of(path):
            top = name.split(".")[0]
            allowed = BELOW[floor] | {floor}
            assert top not in BELOW or top in allowed, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("folder", [*BELOW, "benchmarks", "tests"])
def test_modules_of_the_floors_are_imported_by_one_name(folder):
    """`train.loop` beside `tandem.train.loop` would be a second copy of it."""
    known = {name for name, path in modules().items() if path.name != "__init__.py"}
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.Constant) and isinstance(node.value, str):  # code for -c, names for patches
                named = re.findall(r"(?:from|import) ([\w.]+)", node.value)
                names += [name for name in (node.value, *named) if name in known]
            assert not [name for name in names if name.split(".")[0] in BELOW], f"{path}:{node.lineno}"


def test_models_and_data_know_no_process_group():
    # the LLM is handed to Megatron-core, which has groups of its own
    models = [path for path in (ROOT / "train/models").rglob("*.py") if path.parent.name != "language"]
    for path in [*(ROOT / "data").rglob("*.py"), *models]:
        for name in imports_of(path):
            assert not name.startswith(TORCH_DISTRIBUTED), f"{path.relative_to(ROOT)} imports {name}"


def test_what_an_exported_folder_brings_needs_nothing_of_this_house():
    for path in REMOTE.glob("*.py"):
        assert {name.split(".")[0] for name in imports_of(path)} <= {"collections", "io", "math", "re"} | {
            *("av", "numpy", "PIL", "torch", "transformers"),
        }


def modules() -> dict[str, Path]:
    """Every module of the floors by its dotted name, a package by its own."""
    paths = sorted(path for floor in BELOW for path in (ROOT / floor).rglob("*.py"))
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def test_no_module_imports_itself_by_a_detour():
    """Imports inside functions and those for type checkers count as well."""
    known = modules()
    wanted = {
        name: {other for other in imports_of(path) if other in known and other != name} for name, path in known.items()
    }
    assert not list(circles(wanted))


def circles(wanted):
    """Modules that are left when all that import nothing of the rest have gone."""
    left = dict(wanted)
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    while free := [name for name in left if not any(name in others for others in left.values())]:
        for name in free:
            del left[name]
    return sorted(left)


def test_a_circle_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]


def folders():
    return sorted({path.parent for path in modules().values()})


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_folder_is_no_heap(folder):
    """Twelve modules beside each other at most, and two lines on what they have in common."""
    beside = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(beside) <= 12
    assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


def test_no_recipe_is_named_in_python():
    """The name of a recipe means nothing to the program: `task` says what is trained."""
    recipes = {path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml")}
    for path in modules().values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                constants = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
                assert not recipes & {value for value in constants if isinstance(value, str)}, f"{path}:{node.lineno}"


def test_files_hold_one_idea():
    for floor in BELOW:
        for path in (ROOT / floor).rglob("*.py"):
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def geometry_constants(tree: ast.Module):
    """Lines that hold a patch size, the values of a patch, the scale of pixels, or patches counted in fours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and type(node.value) in (int, float) and node.value in (14, 588, 127.5):
            yield node.lineno
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mult):
            names = {
                name for side in (node.left, node.right) for name in re.findall(r"[a-z]+", ast.unparse(side).lower())
            }
            fours = any(isinstance(side, ast.Constant) and side.value == 4 for side in (node.left, node.right))
            if fours and names & {"patch", "patches", "grid"}:
                yield node.lineno


def test_only_the_vision_spec_knows_geometry():
    found = []
    for floor in BELOW:
        for path in sorted((ROOT / floor).rglob("*.py")):
            where = path.relative_to(ROOT)
            if where != Path("data/vision.py") and not where.is_relative_to(
                "data/synthesis"
            ):  # which draws its own pixels
                found += [f"{where}:{line}" for line in geometry_constants(ast.parse(path.read_text()))]
    assert not found, f"ask data.vision.VisionSpec instead: {', '.join(found)}"


GEOMETRY = ("PATCH = 14", "draw(588)", "x / 127.5 - 1", "max_patches // 4", "4 * len(patches_NP)", "grid[0] // 4")


@pytest.mark.parametrize("line", GEOMETRY)
def test_geometry_outside_the_vision_spec_is_found(line):
    assert list(geometry_constants(ast.parse(line))) == [1]


@pytest.mark.parametrize("path", sorted((ROOT / "tests/gpu").glob("test_*.py")), ids=lambda path: path.stem)
def test_what_only_a_gpu_runs_can_be_imported_without_one(path):
    importlib.import_module(f"tests.gpu.{path.stem}")
