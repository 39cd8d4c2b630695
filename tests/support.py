"""What many tests need: settings of a toy run, and a tiny corpus made once a session."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

from tandem.train.config.architecture import architecture
from tandem.train.config.schema import Config
from tandem.train.config.settings import composed, read_config
from tandem.train.tasks import find

ROOT = Path(__file__).resolve().parents[1]
CORPUS_SAMPLES = 60


def settings(recipe: str, *overrides: str) -> Config:
    """The typed settings that `launch/pretrain.py +recipe=... scale=toy ...` would run with."""
    return read_config(composed([f"+recipe={recipe}", "scale=toy", *overrides]))


def new_tower(config: Config, **sizes):
    """The tower of a task of the encoder alone, with its initial weights."""
    return find(config.task).tower(config, **sizes)


def identity(config: Config) -> dict:
    """What a `Saver` records of the run."""
    return {
        "task": config.task,
        "trainable": config.train.trainable,
        "optimizer": config.optim.name,
        "tokenizer": {},
        "architecture": architecture(config),
    }


def make_corpus(folder: Path) -> Path:
    """Shards of every task with a few samples each."""
    command = [sys.executable, "launch/make_shards.py", str(folder), "--samples", str(CORPUS_SAMPLES)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return folder


def corpus_overrides(corpus: Path, shards: str = "*") -> list[str]:
    """Overrides that read `shards` of the training part of a corpus."""
    return [f"data.sources.main.shards=['{corpus}/train/{shards}.tar']", f"data.tokenizer={corpus}/tokenizer.json"]


def read_metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    """A tar with these (name, content), in this order."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)
