import io
import json
import re
import tarfile
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest

from tandem.data.media.text import Tokenizer
from tandem.data.shards.index import load_index
from tandem.data.synthesis.maker import PHOTOGRAPHS, load_sources
from tandem.launch.make_shards import ALL_TASKS, TASKS, main, make_shards, plan_shards


def contents(corpus, split, task="*"):
    """(json, media as bytes) of each sample."""
    for shard in sorted((corpus / split).glob(f"{task}-*.tar")):
        with tarfile.open(shard) as tar:
            members = {member.name: tar.extractfile(member).read() for member in tar}
        for name, data in members.items():
            if name.endswith(".json"):
                key = name.removesuffix(".json")
                media = [other for other in members if other.startswith(key + ".") and other != name]
                yield json.loads(data), [members[other] for other in media]


def frames_of(video: bytes) -> tuple[np.ndarray, float]:
    """(frames [F, H, W, 3], frames a second)."""
    with av.open(io.BytesIO(video)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        return frames, float(container.streams.video[0].average_rate)


def test_no_held_out_scan_is_in_train(corpus):
    scans = {split: {s for c, _ in contents(corpus, split) for s in c["scans"]} for split in ("train", "heldout")}
    assert len(scans["train"]) > 300 and len(scans["heldout"]) > 50
    assert not scans["train"] & scans["heldout"]


@pytest.mark.parametrize("split, count", [("train", 60), ("heldout", 16)])
def test_answers_follow_from_the_scans(corpus, split, count):
    labels = load_sources().labels
    per_task = Counter()
    for content, media in contents(corpus, split):
        per_task[content["domain"]] += 1
        question, answer = (turn["text"] for turn in content["turns"][-2:])
        digits = labels[content["scans"]].tolist()
        assert question.count("<image>") + question.count("<video>") == len(media)
        if content["domain"] == "read":
            assert answer == "".join(map(str, digits)) and 1 <= len(digits) <= 3
        elif content["domain"] == "count":
            assert answer == str(len(digits)) and 1 <= len(digits) <= 5
        elif content["domain"] == "ground":
            assert f"Where is the {digits[0]}?" in question and digits.count(digits[0]) == 1
            x1, y1, x2, y2 = map(int, re.fullmatch(r"<bbox>(\d+) (\d+) (\d+) (\d+)</bbox>", answer).groups())
            assert 0 <= x1 < x2 <= 999 and 0 <= y1 < y2 <= 999
        elif content["domain"] == "multi" and "sum" in question:
            assert answer == str(sum(digits)) and len(media) == len(digits)
        elif content["domain"] == "multi":
            place = ("first", "second", "third", "fourth").index(answer[4:-1])
            assert f"shows a {digits[place]}?" in question and len(media) == len(digits)
        elif content["domain"] == "caption":
            assert content["entity"] in PHOTOGRAPHS.values() and answer.endswith(f"of {content['entity']}.")
        elif content["domain"] == "video" and "digit move" not in question and "change" not in question:
            assert answer == ", ".join(map(str, digits))
    assert per_task == dict.fromkeys(TASKS, count)


def glyphs_of(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(place of the ink's middle as y, x [F, 2], the ink about it [F, 48, 48]) in each frame."""
    grey = frames.mean(3)
    ink = np.pad(np.clip(np.median(grey, 2, keepdims=True) - grey - 12, 0, None), ((0, 0), (24, 24), (24, 24)))
    places = np.array([np.average(np.indices(dark.shape).reshape(2, -1), axis=1, weights=dark.ravel()) for dark in ink])
    corners = np.rint(places).astype(int) - 24
    return places, np.stack([dark[y : y + 48, x : x + 48] for dark, (y, x) in zip(ink, corners, strict=True)])


def test_videos_show_what_is_asked(corpus):
    kinds, seen = Counter(), Counter()
    for content, (video,) in contents(corpus, "train", "video"):
        frames, fps = frames_of(video)
        height, width = frames.shape[1:3]
        assert 56 <= height <= 112 and 56 <= width <= 112 and 5 <= fps <= 10 and 2 <= len(frames) / fps <= 6
        *_, asked, answered = content["turns"]
        question, answer = asked["text"].removeprefix("<video>"), answered["text"]
        kinds[question] += 1
        places, glyphs = glyphs_of(frames)
        if "way" in question:
            moved = places[-1] - places[0]
            assert np.abs(moved).max() > 15
            way = ("up", "down") if abs(moved[0]) > abs(moved[1]) else ("left", "right")
            seen["way"] += answer == way[int(max(moved, key=abs) > 0)]
        if "When" in question:
            differences = np.abs(np.diff(glyphs, axis=0)).sum((1, 2))
            seen["change"] += differences.argmax() + 1 == int(answer.split()[0]) * fps
        if "stream" in asked:
            assert [event["text"][-1] for event in asked["stream"]] == answer.split(", ")
            assert asked["stream"][0]["time"] == 0 and {event["role"] for event in asked["stream"]} == {"assistant"}
    assert len(kinds) == 5 and min(kinds.values()) >= 3
    assert seen == {"way": kinds["Which way does the digit move?"], "change": kinds["When does the digit change?"]}


def test_every_shard_has_an_index_and_small_media(corpus):
    tokenizer = Tokenizer(corpus / "tokenizer.json")
    for shard in sorted(corpus.rglob("*.tar")):
        index = load_index(shard, tokenizer.sha256)
        assert index.n_samples in (60, 16) and {group.domain for group in index.groups} == {shard.name.split("-")[0]}
        if index.n_media:
            assert min(index.media["height"].min(), index.media["width"].min()) >= 14
            assert max(index.media["height"].max(), index.media["width"].max()) <= 224
        assert (index.n_events > 0) == shard.name.startswith("video")
    assert {path.name.split("-")[0] for path in corpus.glob("train/*.tar")} == set(TASKS)


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
    files = {n: [p.read_bytes() for p in sorted((tmp_path / n).rglob("*.tar"))] for n in "abc"}
    assert files["a"] == files["b"] and all(x != y for x, y in zip(files["a"], files["c"], strict=True))
    assert not Path(tmp_path / "a.partial").exists()


def test_default_sizes():
    shards = plan_shards(None, 0)
    for split in ("train", "heldout"):
        for name, task in ALL_TASKS.items():
            counts = [shard.count for shard in shards if shard.task == name and shard.split == split]
            assert sum(counts) == getattr(task, split) and max(counts) <= task.shard
