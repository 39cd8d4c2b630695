"""An installed wheel away from the checkout, a checkout that is not installed, and sweeps."""

import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile

import pytest

from tests.support import ROOT, corpus_overrides, read_metrics

PACKAGES = sysconfig.get_path("purelib")
FLOORS = ("data", "launch", "parallel", "train")
SMALL = ["train.steps=1", "train.seq_length=128", "train.global_batch_size=1", "data.max_patches=64"]
SMALL += ["data.block_samples=32", "logger.wandb=disabled"]


def run(*words: str, cwd, path: str = PACKAGES, **environment: str) -> subprocess.CompletedProcess:
    """Python without `site`, which reads no .pth file: of packages there are those on `path` alone."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    return subprocess.run(
        [sys.executable, "-S", *words],
        cwd=cwd,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built in a copy, as setuptools builds in the tree that it reads."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    for name in files:
        if name.split("/")[0] in (*FLOORS, "recipes") or "/" not in name:
            (folder / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "tree" / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(folder / "tree")], check=True, timeout=240)
    return next(folder.glob("tandem-*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return f"{folder}{os.pathsep}{PACKAGES}"


def test_the_wheel_holds_every_module_and_recipe_under_one_name(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"tandem", "tandem.py"}
    wanted = {path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    wanted |= set((ROOT / "recipes").rglob("*.yaml"))
    assert {f"tandem/{path.relative_to(ROOT)}" for path in wanted} <= names


def test_every_folder_of_modules_is_a_package_of_the_project():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {path.parent.relative_to(ROOT) for floor in FLOORS for path in (ROOT / floor).rglob("*.py")}
    assert {f"tandem.{'.'.join(folder.parts)}" for folder in found} == set(declared) - {"tandem.recipes"}


def test_an_installation_trains_from_another_directory(installed, corpus, tmp_path):
    command = "import sys; from tandem.launch.cli import main; sys.exit(main())"
    settings = ["+recipe=stage1", "scale=toy", "run.dir=run", "data.workers=1", *SMALL, *corpus_overrides(corpus)]
    done = run("-c", command, "train", *settings, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(tmp_path / "run")) == 1


def test_an_installation_lists_its_commands_and_knows_the_nearest(installed, tmp_path):
    command = "import sys; from tandem.launch.cli import main; sys.exit(main())"
    listed = run("-c", command, cwd=tmp_path, path=installed).stdout
    assert "tandem train " in listed and "tandem make-shards " in listed and "tandem cli" not in listed
    wrong = run("-c", command, "evaluat", cwd=tmp_path, path=installed)
    assert wrong.returncode == 1 and wrong.stderr == "error: there is no command evaluat; did you mean evaluate?\n"


def commands():
    return sorted(path for path in (ROOT / "launch").glob("*.py") if path.stem not in ("__init__", "cli"))


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_a_command_of_a_checkout_runs_from_anywhere_without_installation(path, tmp_path):
    done = run(str(path), "--help", cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout) > 100, done.stderr[-2000:]


def test_a_sweep_trains_one_run_after_the_other(corpus, tmp_path):
    settings = ["+recipe=stage1", "scale=toy", f"run.dir={tmp_path}/run", *SMALL, *corpus_overrides(corpus)]
    done = run(str(ROOT / "launch/pretrain.py"), "-m", *settings, "train.seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (read_metrics(tmp_path / "run" / number) for number in "12")
    assert len(first) == len(second) == 1 and first[0]["loss"] != second[0]["loss"]


def test_a_sweep_ends_with_the_first_run_that_fails(corpus, tmp_path):
    settings = ["+recipe=stage1", "scale=toy", f"run.dir={tmp_path}/run", *SMALL, *corpus_overrides(corpus)]
    done = run(str(ROOT / "launch/pretrain.py"), "-m", *settings, "parallel.tp=2,1", cwd=tmp_path)
    assert done.returncode == 1 and "parallel.tp*cp*pp = 2*1*1 = 2 does not divide" in done.stderr
    assert "run 1 of 2" in done.stdout and "run 2 of 2" not in done.stdout


def test_a_sweep_under_torchrun_is_refused(tmp_path):
    done = run(str(ROOT / "launch/pretrain.py"), "-m", "train.seed=1,2", cwd=tmp_path, WORLD_SIZE="2")
    assert done.returncode == 1
    assert done.stderr == "error: --multirun starts its runs itself, each on one rank: leave torchrun out\n"
