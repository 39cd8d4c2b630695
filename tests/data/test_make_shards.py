import json
import re
import tarfile
from pathlib import Path

import pytest

from data.index import load_index
from data.text import Tokenizer
from launch.make_shards import TRAIN_SAMPLES, load_sources, main, make_shards, plan_shards


def contents(corpus, split):
    for shard in sorted((corpus / split).glob("*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                images = [other for other in members if other.startswith(key + ".") and other != name]
                yield json.loads(data), len(images)


def test_no_held_out_scan_is_in_train(corpus):
    scans = {split: {s for c, _ in contents(corpus, split) for s in c["scans"]} for split in ("train", "heldout")}
    assert len(scans["train"]) > 300 and len(scans["heldout"]) > 50
    assert not scans["train"] & scans["heldout"]


@pytest.mark.parametrize("split, count", [("train", 60), ("heldout", 16)])
def test_answers_follow_from_the_scans(corpus, split, count):
    labels = load_sources().labels
    per_task = dict.fromkeys(TRAIN_SAMPLES, 0)
    for content, images in contents(corpus, split):
        per_task[content["domain"]] += 1
        question, answer = (turn["text"] for turn in content["turns"])
        digits = labels[content["scans"]].tolist()
        assert question.count("<image>") == images
        if content["domain"] == "read":
            assert answer == "".join(map(str, digits)) and 1 <= len(digits) <= 3
        elif content["domain"] == "count":
            assert answer == str(len(digits)) and 1 <= len(digits) <= 5
        elif content["domain"] == "ground":
            assert f"Where is the {digits[0]}?" in question and digits.count(digits[0]) == 1
            x1, y1, x2, y2 = map(int, re.fullmatch(r"<bbox>(\d+) (\d+) (\d+) (\d+)</bbox>", answer).groups())
            assert 0 <= x1 < x2 <= 999 and 0 <= y1 < y2 <= 999
        elif content["domain"] == "multi" and "sum" in question:
            assert answer == str(sum(digits)) and images == len(digits)
        elif content["domain"] == "multi":
            place = ("first", "second", "third", "fourth").index(answer[4:-1])
            assert f"shows a {digits[place]}?" in question and images == len(digits)
    assert set(per_task.values()) == {count}


def test_every_shard_has_an_index_and_small_images(corpus):
    tokenizer = Tokenizer(corpus / "tokenizer.json")
    for shard in sorted(corpus.glob("*/*.tar")):
        index = load_index(shard, tokenizer.sha256)
        assert index.n_samples in (60, 16) and index.domains == (shard.name.split("-")[0],)
        if index.n_images:
            assert min(index.images["height"].min(), index.images["width"].min()) >= 14
            assert max(index.images["height"].max(), index.images["width"].max()) <= 224


def test_the_same_arguments_again_do_nothing(corpus, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    assert main([str(corpus), "--samples", "60"]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    with pytest.raises(ValueError, match="choose another folder"):
        make_shards(corpus, samples=61)
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not empty"):
        make_shards(tmp_path)
    with pytest.raises(ValueError, match="--samples is 0"):
        make_shards(tmp_path / "new", samples=0)


def test_the_corpus_depends_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_shards(tmp_path / name, samples=3, seed=seed)
    files = {n: [p.read_bytes() for p in sorted((tmp_path / n).glob("*/*.tar"))] for n in "abc"}
    assert files["a"] == files["b"] and all(x != y for x, y in zip(files["a"], files["c"], strict=True))
    assert not Path(tmp_path / "a.partial").exists()


def test_default_sizes():
    shards = plan_shards(None, 0)
    train = {task: sum(s.count for s in shards if s.task == task and s.split == "train") for task in TRAIN_SAMPLES}
    assert train == TRAIN_SAMPLES
    assert {s.count for s in shards if s.split == "heldout"} == {400}
