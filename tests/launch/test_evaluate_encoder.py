"""launch/evaluate.py on runs of the encoder alone, as a person uses it: random weights, real pictures and videos."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tandem.launch import evaluate, plot
from tests.support import new_tower, settings
from tests.train.folders import STATE, write


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Run directories by recipe, with initial weights and, in vit_contrastive, a running mean of other weights."""
    folder = tmp_path_factory.mktemp("runs")
    for recipe in ("vit_mim", "vit_contrastive", "vit_omni"):
        teacher = ["objective.teacher=teacher"] if recipe == "vit_mim" else []
        config = settings(recipe, f"data.tokenizer={corpus}/tokenizer.json", *teacher)
        tower = new_tower(config)
        kinds = {"param": 0, "ema": 0.01} if recipe == "vit_contrastive" else {"param": 0}
        pieces = [
            (name, kind, value.detach() + shift, tuple(slice(0, size) for size in value.shape))
            for name, value in tower.named_parameters()
            for kind, shift in kinds.items()
        ]
        write(folder / recipe / "checkpoints", [pieces], state=dataclasses.replace(STATE, task=config.task))
        (folder / recipe / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return folder


@pytest.fixture(scope="module")
def places(corpus):
    return {"heldout": f"{corpus}/vision/heldout", "train": f"{corpus}/vision/train"}


def scores_of(run, *words) -> dict:
    evaluate.main([str(run), *map(str, words)])
    return json.loads((run / evaluate.RESULT).read_text())


def refused(run, *words) -> str:
    with pytest.raises(SystemExit) as end:
        evaluate.main([str(run), *map(str, words)])
    assert "\n" not in end.value.code
    return end.value.code


def test_a_probe_alone_for_masked_image_modelling(runs, places, capsys):
    data = ["--data", f"{places['heldout']}/digit-*.tar", "--train", f"{places['train']}/digit-*.tar"]
    scores = scores_of(runs / "vit_mim", *data, "--at-least", "0.01")
    assert set(scores) & {"zero_shot", "retrieval", "probe"} == {"probe"}
    assert scores["probe"]["classes"] == 10 and scores["probe"]["features"] == "patches"
    assert (scores["task"], scores["step"], scores["weights"]) == ("mim", STATE.step, "param")
    assert "linear probe" in capsys.readouterr().out
    assert refused(runs / "vit_mim", *data, "--at-least", "1.01").startswith("error: accuracy of the linear probe ")


def test_all_that_a_contrastive_encoder_can_do(runs, places, tmp_path, capsys):
    """Zero-shot on three classes of digits more than the data has, retrieval, a pooled probe, and the pictures."""
    classes = tmp_path / "classes.txt"
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    classes.write_text("".join(f"{word}\tthe digit {word}\n" for word in [*words, "ten", "eleven", "twelve"]))
    data = ["--data", f"{places['heldout']}/digit-*.tar", "--classes", classes, "--template", "a photo of {}"]
    train = ["--train", f"{places['train']}/digit-*.tar", "--features", "pooled"]
    scores = scores_of(runs / "vit_contrastive", *data, *train, "--picture", tmp_path / "found.png")
    assert scores["zero_shot"]["classes"] == 13 and scores["zero_shot"]["templates"] == ["a photo of {}"]
    assert 0 <= scores["zero_shot"]["top1"] <= scores["zero_shot"]["top5"] <= 1
    assert set(scores["retrieval"]) == {"image_to_text", "text_to_image"}
    assert scores["probe"]["features"] == "pooled" and scores["probe"]["samples"] == scores["zero_shot"]["samples"]
    assert scores["skipped"]["count"] == scores["unheard"]["count"] == 0
    assert (tmp_path / "found.png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("zero-shot, top 5", "image to text", "linear probe", "same label"))

    other = scores_of(runs / "vit_contrastive", *data, "--weights", "ema")
    assert other["retrieval"] != scores["retrieval"] and "probe" not in other
    least = refused(runs / "vit_contrastive", *data, "--at-least", "1.01")
    assert "zero-shot accuracy" in least and "(at least 101.0% wanted)" in least

    (runs / "vit_contrastive/metrics.jsonl").write_text('{"step": 0, "loss": 3.0, "losses": {"siglip": 2.0}}\n')
    plot.main([str(runs / "vit_contrastive"), "--out", str(tmp_path / "curve.png")])
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_sound_and_damage(runs, places, tmp_path, capsys):
    """Every direction of retrieval; a folder of classes beside shards; one file that is no image."""
    (tmp_path / "pets/cat").mkdir(parents=True)
    (tmp_path / "pets/cat/broken.png").write_bytes(b"no image")
    scores = scores_of(runs / "vit_omni", "--data", f"{places['heldout']}/sound-*.tar", "--data", tmp_path / "pets")
    pairs = {("image", "text"), ("audio", "text"), ("video", "audio")}
    assert set(scores["retrieval"]) == {f"{a}_to_{b}" for pair in pairs for a, b in (pair, pair[::-1])}
    assert scores["retrieval"]["video_to_audio"]["queries"] == scores["zero_shot"]["samples"] == 16
    assert scores["skipped"]["count"] == 1 and scores["skipped"]["samples"][0]["name"].endswith("broken.png")
    assert "1 samples cannot be used, the first: " in capsys.readouterr().out


def test_a_damaged_corpus_alone_fails(runs, tmp_path):
    (tmp_path / "pets/cat").mkdir(parents=True)
    (tmp_path / "pets/cat/broken.png").write_bytes(b"no image")
    said = refused(runs / "vit_contrastive", "--data", tmp_path / "pets")
    assert "none of the samples in" in said and "broken.png: the header is not that of a readable image" in said


def test_a_probe_is_not_fitted_on_what_it_is_scored_on(runs, places, tmp_path):
    """Not by another path to the same shard, nor on copies of some of its pictures; one line, before any fit."""
    shard = Path(places["heldout"], "digit-0000.tar")
    (tmp_path / "copy.tar").symlink_to(shard)
    for train in (shard, tmp_path / "copy.tar"):
        said = refused(
            runs / "vit_mim", "--data", shard, "--train", f"{places['train']}/digit-0000.tar", "--train", train
        )
        assert f"--train: {train}: sample " in said and f" is also scored, as {shard}: sample " in said


@pytest.mark.parametrize(
    ("recipe", "words", "said"),
    [
        ("vit_mim", ["--data", "{heldout}"], "--train is missing: an encoder of this task reads no texts"),
        ("vit_mim", ["--train", "{train}"], "--data is missing: name a folder of classes, or shards"),
        (
            "vit_mim",
            ["--data", "{heldout}", "--train", "{train}", "--classes", "c"],
            "--classes: an encoder of this task",
        ),
        ("vit_mim", ["--data", "{heldout}", "--train", "{train}", "--features", "pooled"], "has no pooled embedding"),
        ("vit_omni", ["--data", "{heldout}", "--weights", "ema"], "has no ema of its weights"),
        ("vit_omni", ["--data", "{heldout}", "--exchanged-at-most", "0.5"], "has no answers to compare"),
        ("vit_omni", ["--data", "{heldout}", "--template", "a photo"], "the template 'a photo' has no {} for the name"),
        ("vit_omni", ["--data", "{heldout}", "--templates", "absent.txt"], "--templates absent.txt cannot be read"),
        ("vit_omni", ["--data", "{heldout}", "--picture", "absent/a.png"], "its folder does not exist"),
        ("vit_omni", ["--data", "absent.tar"], "shard absent.tar (from 'absent.tar') does not exist"),
        ("vit_omni", ["--data", "{heldout}", "data.maxpatches=2"], "data.maxpatches=2: Key 'maxpatches' not in"),
    ],
)
def test_mistakes_end_with_one_sentence(runs, places, recipe, words, said):
    assert said in refused(runs / recipe, *(word.format(**places) if word[0] == "{" else word for word in words))


def test_many_ranks_are_refused(runs, places, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "evaluated in one process" in refused(runs / "vit_omni", "--data", places["heldout"])


def test_options_of_encoders_are_refused_for_language_models(runs, corpus, tmp_path):
    shutil.copytree(runs / "vit_omni", tmp_path / "run")
    config = settings("stage1", f"data.tokenizer={corpus}/tokenizer.json")
    (tmp_path / "run/config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    said = refused(tmp_path / "run", "--data", "a.tar")
    assert (
        "--data is for runs of the encoder alone, and this is one of task=language; name shards as data.sources" in said
    )
