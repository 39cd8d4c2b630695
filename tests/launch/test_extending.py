"""The additions of docs/extending.md, made from the page's own code blocks in a copy of the tree, and run."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tarfile

import pytest

from tests.data.kinds import picture
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


FAMILY = """
import json, sys
from transformers import SeedOssConfig, SeedOssForCausalLM
from tandem.train import families
from tandem.train.models.language.llm_config import LLMConfig
sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
config = SeedOssConfig(**sizes, head_dim=8, vocab_size=64, pad_token_id=0)
SeedOssForCausalLM(config).save_pretrained(sys.argv[1])
model = LLMConfig(**families.settings_of(sys.argv[1]), aux_loss=0.0, z_loss=0.0, init_std=0.02, folder=sys.argv[1])
families.open_folder(model)
print(families.of_model(model).model_type, model.qkv_bias, model.output_bias)
"""


def test_the_pages_family_reads_a_folder_of_its_class(tree, tmp_path):
    """Every tensor has a place, and the settings come back as they were."""
    command = [sys.executable, "-c", FAMILY, str(tmp_path / "seed_oss")]
    done = subprocess.run(command, cwd=tree.folder, env=tree.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["seed_oss", "True", "False"]


def test_the_pages_format_is_imported(tree, tmp_path):
    """One record becomes a sample, and one is left out for the page's reason."""
    (tmp_path / "a.jpg").write_bytes(picture(0))
    records = [{"image": "a.jpg", "question": "What is <image>?", "answer": said} for said in ("A cat.", "")]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    command = [
        sys.executable,
        "launch/import_data.py",
        str(tmp_path / "questions.jsonl"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, cwd=tree.folder, env=tree.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "out/import.json").read_text())
    assert summary["samples"] == 1 and list(summary["left_out"]) == ["no answer"]
    with tarfile.open(tmp_path / "out" / summary["shards"][0]) as tar:
        turns = json.load(tar.extractfile(tar.getnames()[0]))["turns"]
    assert [turn["text"] for turn in turns] == [r"<image>What is \<image>?", "A cat."]


def test_nothing_but_the_files_of_the_page_is_added():
    assert [name for name, _ in BLOCK.findall(PAGE)] == [
        "train/tasks/colour.py",
        "recipes/recipe/colour.yaml",
        "train/models/connectors/shuffle.py",
        "recipes/model/shuffled.yaml",
        "train/families/language/seed_oss.py",
        "data/formats/records/questions.py",
        "recipes/model/wide.yaml",
    ]
