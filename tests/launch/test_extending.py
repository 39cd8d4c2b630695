"""The additions of docs/extending.md, made from the page's own code blocks in a copy of the tree, and run."""

import json
import re
import shlex
import shutil

import pytest

from tests.distributed.world import run_torchrun
from tests.mutants.run import Copy
from tests.support import ROOT, read_metrics

BLOCK = re.compile(r"^```(?:python|yaml)\n# (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^```sh\n(torchrun .*?)^```", re.MULTILINE | re.DOTALL)
PAGE = (ROOT / "docs/extending.md").read_text()


@pytest.fixture(scope="module")
def tree(corpus, tmp_path_factory):
    """A copy of the tree with the page's files and a toy corpus."""
    copy = Copy(ROOT, tmp_path_factory.mktemp("extended") / "tree")
    for name, text in BLOCK.findall(PAGE):
        assert not (copy.folder / name).exists(), f"{name} is there already"
        (copy.folder / name).write_text(text)
    shutil.copytree(corpus, copy.folder / "shards/toy")
    return copy


@pytest.mark.parametrize("command", COMMAND.findall(PAGE), ids=lambda line: re.search(r"run.dir=\S+", line)[0])
def test_a_command_of_the_page_trains(command, tree):
    """Four steps, in which the loss falls."""
    words = shlex.split(command)
    script = words.index("launch/pretrain.py")
    more = ["train.steps=4", "optim.warmup_steps=1", "optim.lr=3e-3", "logger.wandb=disabled"]
    done = run_torchrun(2, [*words[script:], *more], timeout=180, cwd=tree.folder, env=tree.environment)
    assert done.returncode == 0, done.stderr
    run_dir = tree.folder / re.search(r"run.dir=(\S+)", command)[1]
    lines = read_metrics(run_dir)
    assert len(lines) == 4 and lines[-1]["loss"] < lines[0]["loss"] and all(line["mfu"] > 0 for line in lines)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


def test_nothing_but_the_files_of_the_page_is_added():
    assert [name for name, _ in BLOCK.findall(PAGE)] == [
        "train/tasks/colour.py",
        "recipes/recipe/colour.yaml",
        "train/models/connectors/shuffle.py",
        "recipes/model/shuffled.yaml",
        "recipes/model/wide.yaml",
    ]
