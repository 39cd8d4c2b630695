"""Parts of a model from several places, and frozen parts that keep the bytes they came with."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

from tandem.train import families
from tandem.train.checkpoints import checkpoint
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, settings
from tests.train.folders import write_qwen3_moe

SMALL = ["train.seq_length=128", "train.global_batch_size=4", "data.max_patches=64", "optim.lr=1e-2", "train.steps=1"]


@pytest.fixture(scope="module")
def places(corpus, tmp_path_factory) -> Path:
    """Folders `one` and `other` of language models, and a run in fp32 that started from the first."""
    root = tmp_path_factory.mktemp("places")
    for seed, name in enumerate(("one", "other")):
        write_qwen3_moe(root / name, seed)
    run_world(train_run, 1, "stage1", common(corpus, root), str(root / "run"), timeout=180)
    return root


def common(corpus, root: Path) -> list[str]:
    return [*SMALL, f"model.llm.folder={root}/one", *corpus_overrides(corpus)]


def saved(run_dir: Path) -> dict[str, torch.Tensor]:
    reader = checkpoint.Reader(checkpoint.resolve(run_dir))
    return {name: reader.whole(name) for name in reader.tensors}


def equal(found: dict, wanted: dict, part: str) -> bool:
    names = [name for name in found if name.startswith(f"{part}.")]
    assert names
    return all(torch.equal(found[name], wanted[name]) for name in names)


def printed(recipe: str, words: list[str], run_dir: str) -> str:
    """What a run prints."""
    with contextlib.redirect_stdout(io.StringIO()) as console:
        train_run(recipe, words, run_dir)
    return console.getvalue()


def test_parts_of_several_places_are_joined_and_frozen_ones_keep_their_bytes(places, corpus, tmp_path):
    """In bf16, over two ranks, and after a resume on one."""
    start = [f"checkpoint.load_from={{encoder: {places}/run, llm: {places}/other}}", "train.precision=bf16"]
    words = [*common(corpus, places), *start]
    console, _ = run_world(printed, 2, "stage0", [*words, "parallel.pp=2"], str(tmp_path / "run"), timeout=180)
    run_of = checkpoint.resolve(places / "run")
    assert f"encoder from {run_of}; llm from {places}/other; randomly initialised: adapter" in console
    resumed = [*words, "train.steps=2", "checkpoint.resume=true"]
    config = settings("stage0", *common(corpus, places), f"model.llm.folder={places}/other")
    other = families.open_folder(config.model.llm)
    for _ in range(2):
        found, source = saved(tmp_path / "run"), saved(places / "run")
        assert equal(found, source, "encoder") and not equal(found, source, "llm")
        llm = {name: tensor for name, tensor in found.items() if name.startswith("llm.")}
        for name, tensor in llm.items():
            there = other.read(name.removeprefix("llm."), "param", (0,) * tensor.dim(), tuple(tensor.shape))
            assert torch.equal(tensor, there), name
        assert any((tensor != tensor.bfloat16().float()).any() for tensor in llm.values())
        if not resumed:
            break
        run_world(train_run, 1, "stage0", resumed, str(tmp_path / "run"), timeout=180)
        resumed = []
    assert checkpoint.resolve(tmp_path / "run").name == "step-00000002"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpoint.load_from={{encoder: {places}/one}}", "a folder of Hugging Face gives the llm, not encoder"),
        ("checkpoint.load_from={{adapter: {places}/none}}", "there is no checkpoint at {places}/none"),
        ("checkpoint.load_from={places}/run model.encoder.heads=2", "model.encoder.heads was 4 and is 2"),
        ("checkpoint.load_from={{llm: {places}/run}} model.llm.norm_eps=1e-3", "leave model.llm.norm_eps out"),
    ],
)
def test_what_does_not_fit_is_refused(places, corpus, tmp_path, override, words):
    overrides = [*common(corpus, places), *re.split(r" (?=model)", override.format(places=places))]
    with pytest.raises(RuntimeError, match=re.escape(words.format(places=places))):
        run_world(train_run, 1, "stage1", overrides, str(tmp_path / "run"))
