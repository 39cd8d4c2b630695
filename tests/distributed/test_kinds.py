"""Training on every kind of data that people have: two steps of a mixture of all of them, and a picture of a row."""

import json

import numpy as np
import pytest

from tandem.launch import import_data, index_shards, inspect_data
from tandem.train.input.dataset import open_data
from tests.data.kinds import KINDS
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import read_metrics, settings

SILENT = "images_alone"  # for the encoder alone
SMALL = ["train.steps=2", "train.global_batch_size=16", "data.block_samples=128", "data.max_patches=64"]


@pytest.fixture(scope="module")
def sources(corpus, tmp_path_factory):
    """Shards or catalog of each kind, indexed with the tokenizer of the corpus."""
    found, tokenizer = {}, ["--tokenizer", f"{corpus}/tokenizer.json", "--workers", "1"]
    for kind, make in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        made = make(folder)
        if made.imported:
            assert import_data.main([made.source, *made.options, "--out", str(folder / "out"), *tokenizer]) == 0
        else:
            assert index_shards.main([made.source, *tokenizer]) == 0
        found[kind] = str(folder / "out/data.catalog") if made.imported else made.source
    return found


def overrides(corpus, sources: dict[str, str], kinds: list[str]) -> list[str]:
    added = [f"+data.sources.{kind}.shards=['{sources[kind]}']" for kind in kinds[1:]]
    main = [f"data.sources.main.shards=['{sources[kinds[0]]}']", f"data.tokenizer={corpus}/tokenizer.json"]
    return [
        *SMALL,
        *main,
        *added,
        *(f"+data.sources.{kind}.weight=1" for kind in kinds[1:]),
        "data.sources.main.weight=1",
    ]


def test_two_steps_of_every_kind(corpus, sources, tmp_path, capsys):
    said = [kind for kind in KINDS if kind != SILENT]
    captioned = [kind for kind in ("image_and_txt", "img2dataset", "class_folders", "tar_gz")]
    whole = overrides(corpus, sources, said)
    teacher, start = str(tmp_path / "vit_contrastive"), ["optim.lr=0", "optim.min_lr=0"]
    runs = [
        ("stage1", whole, str(tmp_path / "stage1")),
        ("vit_contrastive", [*overrides(corpus, sources, captioned), *start], teacher),
        ("vit_mim", [*overrides(corpus, sources, [SILENT]), f"objective.teacher={teacher}"], str(tmp_path / "vit_mim")),
    ]
    for recipe, words, folder in runs:
        run_world(train_run, 1, recipe, words, folder, timeout=120)
        lines = read_metrics(tmp_path / folder)
        assert len(lines) == 2 and all(np.isfinite(line["loss"]) and line["loss"] > 0 for line in lines), folder
        assert json.loads((tmp_path / folder / "summary.json").read_text())["unreadable"] == []

    data = open_data(settings("stage1", *whole))
    shards_S = np.concatenate([data.stream.next_step().shard_S for _ in range(2)])
    data.reader.close()
    assert set(data.stream.corpus.source_of(shards_S).tolist()) == set(range(len(said)))
    for recipe, words in (("stage1", whole), ("vit_mim", runs[2][1])):
        out = tmp_path / f"{recipe}.png"
        assert inspect_data.main([f"+recipe={recipe}", "scale=toy", *words, "--steps", "1", "--out", str(out)]) == 0
        assert "unreadable" not in capsys.readouterr().out and out.stat().st_size > 1000


def test_shards_of_images_are_refused_where_texts_are_trained(corpus, sources):
    with pytest.raises(ValueError, match=r"data.sources.main has shards of format images, in which nothing is said"):
        open_data(settings("stage1", *overrides(corpus, sources, [SILENT])))
