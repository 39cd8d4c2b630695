"""An installed wheel away from the checkout, a checkout that is not installed, and sweeps."""

import os
import subprocess
import sys
import sysconfig
import time
import tomllib
import zipfile

import pytest

from tandem.launch.pretrain import jobs_of
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
    command = "import sys; from tandem.launch import main; sys.exit(main())"
    settings = ["+recipe=stage1", "scale=toy", "run.dir=run", "data.workers=1", *SMALL, *corpus_overrides(corpus)]
    done = run("-c", command, "train", *settings, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(read_metrics(tmp_path / "run")) == 1


def test_processes_that_an_installed_command_starts_find_its_functions(installed, corpus, tmp_path):
    command = "import sys; from tandem.launch import main; sys.exit(main())"
    for name in ("read", "count"):
        (tmp_path / f"{name}.tar").write_bytes((corpus / f"train/{name}-0000.tar").read_bytes())
    words = ["index-shards", "read.tar", "count.tar", "--tokenizer", str(corpus / "tokenizer.json"), "--workers", "2"]
    done = run("-c", command, *words, cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "read.tar.index").is_file() and (tmp_path / "count.tar.index").is_file()


def test_an_installation_lists_its_commands_and_knows_the_nearest(installed, tmp_path):
    command = "import sys; from tandem.launch import main; sys.exit(main())"
    listed = run("-c", command, cwd=tmp_path, path=installed).stdout
    assert "  train " in listed and "  make-shards " in listed and "  cli " not in listed
    wrong = run("-c", command, "evaluat", cwd=tmp_path, path=installed)
    assert wrong.returncode == 1 and wrong.stderr == "error: there is no command evaluat; did you mean evaluate?\n"


def commands():
    return sorted(path for path in (ROOT / "launch").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", commands(), ids=lambda path: path.stem)
def test_a_command_of_a_checkout_runs_from_anywhere_without_installation(path, tmp_path):
    done = run(str(path), "--help", cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout) > 100, done.stderr[-2000:]


def test_a_sweep_trains_one_run_after_the_other(corpus, tmp_path):
    settings = ["+recipe=stage1", "scale=toy", f"run.dir={tmp_path}/run", *SMALL, *corpus_overrides(corpus)]
    done = run(str(ROOT / "launch/pretrain.py"), "-m", *settings, "train.seed=1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (read_metrics(tmp_path / f"run-{number}") for number in "12")
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


def test_runs_of_a_sweep_share_no_directory():
    words = ["+recipe=stage1", "scale=toy", "run.name=x", "checkpoint.dir=c d", "optim.lr=1e-3,2e-3"]
    first, second = jobs_of(words)
    assert first[-3:] == ["optim.lr=0.001", "run.name='x-1'", "checkpoint.dir='c d-1'"]
    assert second[-3:] == ["optim.lr=0.002", "run.name='x-2'", "checkpoint.dir='c d-2'"]
    (alone,) = jobs_of(["+recipe=stage1", "scale=toy", "+data.sources.more.shards=[a]"])
    assert alone == ["+recipe=stage1", "scale=toy", "+data.sources.more.shards=[a]"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--help"], "--multirun takes settings alone, not --help"),
        (["--cfg", "job"], "--multirun takes settings alone, not --cfg"),
        (["optim.lr=interval(1,2)"], "optim.lr=interval(1,2): --multirun takes lists, as in a=1,2, and range(...)"),
        (["hydra.mode=MULTIRUN"], "hydra.mode: use --multirun to train several runs"),
        (["+recipe=stage1", "scale=toy", "train.stpes=1,2"], "train.stpes: there is no such setting; did you mean"),
    ],
)
def test_words_that_a_sweep_cannot_take_are_refused_before_the_first_run(words, sentence, tmp_path):
    done = run(str(ROOT / "launch/pretrain.py"), "-m", *words, cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1
    assert "run 1 of" not in done.stdout


def test_a_sweep_passes_on_the_wish_to_stop(corpus, tmp_path):
    """The run at hand saves and ends; the next one does not begin."""
    settings = ["+recipe=stage1", "scale=toy", "run.dir=run", *SMALL, *corpus_overrides(corpus)]
    command = [
        sys.executable,
        str(ROOT / "launch/pretrain.py"),
        "-m",
        *settings,
        "train.steps=100000",
        "train.seed=1,2",
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as sweep:
        metrics, deadline = tmp_path / "run-1/metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            assert sweep.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        sweep.terminate()
        output, _ = sweep.communicate(timeout=120)
    assert sweep.returncode == 85, output[-2000:]
    assert list((tmp_path / "run-1/checkpoints").glob("step-*/manifest.json")) and not (tmp_path / "run-2").exists()
