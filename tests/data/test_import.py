"""Import: bad records, bad sources, sizes of shards, and interruptions."""

import base64
import gzip
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tandem.data.formats.containers import array, container_of, lines
from tandem.data.formats.records import find_format, formats, likely_format
from tandem.data.importing import unit as units
from tandem.data.importing.journal import Journal
from tandem.data.importing.tar_writer import header
from tandem.data.media.turns import SampleError
from tandem.data.shards.index import load_index
from tandem.launch.import_data import main
from tests.data.kinds import KINDS, picture
from tests.data.test_kinds import samples_of
from tests.support import ROOT


def said(i: int, text: str = "<image>\nWas?", **more) -> dict:
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": f"é {i}"}]
    return {"id": i, "image": f"{i % 6}.jpg", "conversations": turns} | more


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(6):
        (tmp_path / "pictures" / f"{i}.jpg").write_bytes(picture(i))
    return str(tmp_path / "pictures")


def write(path: Path, records: list) -> str:
    path.write_text(json.dumps(records) if path.suffix == ".json" else "\n".join(map(json.dumps, records)))
    return str(path)


def content_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def summary(out: Path) -> dict:
    return json.loads((out / "import.json").read_text())


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
    return error


def test_bad_records_are_left_out_and_counted_by_reason(pictures, tmp_path, tokenizer, capsys):
    (tmp_path / "pictures" / "torn.jpg").write_bytes(picture(0)[:30])
    turns = said(0)["conversations"]
    records = {
        "fine": said(0),
        "image file not found": said(1, image="none.jpg"),
        "unreadable image": said(2, image="torn.jpg"),
        "image is a URL": said(3, image="https://example.com/a/b.jpg"),
        "no placeholder for image": said(4, "no mark"),
        "no image for placeholder": said(5, "<image><image>"),
        "no video for placeholder": said(5, "<image><video>"),
        "unknown role": said(6, conversations=[{"from": "alien", "value": "<image>"}, *turns[1:]]),
        "bad turn": said(7, conversations=[{"from": "human"}]),
        "of format text, not llava": {"text": "alone"},
        "no object": [1],
        "bad text": said(8, "<image>\ud800"),
    }
    text_lines = [json.dumps(record) for record in records.values()] + ["{", '"\xe9"', ""]
    source = tmp_path / "a.jsonl"
    source.write_bytes("\n".join(text_lines).encode("latin1"))
    out = tmp_path / "out"
    arguments = [str(source), "--images", pictures, "--out", str(out), "--tokenizer", tokenizer.path, "--workers", "1"]
    assert main(arguments) == 0
    told = " ".join(capsys.readouterr().out.split())
    found = summary(out)
    expected = dict.fromkeys([*records, "bad json", "not UTF-8"], 1)
    del expected["fine"]
    assert {reason: each["records"] for reason, each in found["left_out"].items()} == expected
    assert found["samples"] == found["images"] == 1
    assert all(reason in told for reason in expected)
    sentences = {reason: each["examples"][0] for reason, each in found["left_out"].items()}
    assert all(words in sentences["image file not found"] for words in ("record 1 of", "none.jpg is not in"))
    assert "img2dataset" in sentences["image is a URL"] and r"\<image>" in sentences["no image for placeholder"]


@pytest.mark.parametrize("most", [1, 3, 10])
def test_a_line_above_the_limit_is_one_damaged_record(tmp_path, monkeypatch, most):
    """Ordinals after it do not shift, whichever unit it is in, also in a compressed file and as the last line."""
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 64)
    monkeypatch.setattr(lines, "_BLOCK", 16)
    texts = [json.dumps({"text": "a" * length}) for length in (1, 300, 2, 51, 52, 3, 400)]
    assert [len(text) + 1 for text in texts[3:5]] == [64, 65]
    (tmp_path / "a.jsonl").write_text("\n".join(texts))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        path = str(tmp_path / name)
        units = list(lines.CONTAINER.units(path, most))
        found = [record for unit in units for record in lines.CONTAINER.records(path, unit, unit["first"])]
        assert [ordinal for ordinal, _ in found] == list(range(len(texts)))
        assert [ordinal for ordinal, record in found if isinstance(record, SampleError)] == [1, 4, 6]
        assert {record.reason for _, record in found if isinstance(record, SampleError)} == {"line too long"}
        assert [record["text"] for _, record in found if isinstance(record, dict)] == ["a", "aa", "a" * 51, "aaa"]


def test_media_are_found_in_every_way_that_records_name_them(pictures, tmp_path, tokenizer):
    data = "data:image/png;base64," + base64.b64encode(picture(1, "PNG")).decode()
    ways = [f"{pictures}/0.jpg", f"file://{pictures}/1.jpg", "https://example.com/deep/2.jpg?x=1", data]
    records = [said(i, image=way) for i, way in enumerate(ways)]
    records.append(said(4, "<image> <image>", image=["3.jpg", "4.jpg"]))
    out = tmp_path / "out"
    source = write(tmp_path / "a.json", records)
    assert main([source, "--images", pictures, "--out", str(out), "--tokenizer", tokenizer.path, "--workers", "1"]) == 0
    media = [sample.media for sample in samples_of(str(out / "shard-00000-000.tar"), tokenizer)]
    assert media == [(picture(0),), (picture(1),), (picture(2),), (picture(1, "PNG"),), (picture(3), picture(4))]


def test_what_cannot_be_imported_is_one_sentence(pictures, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out"), "--workers", "1"]
    fine = write(tmp_path / "fine.json", [said(0)])
    assert "is a URL; download it first" in refused(["https://huggingface.co/x.parquet", *out], capsys)
    assert "none.json does not exist" in refused([str(tmp_path / "none.json"), *out], capsys)
    assert "choose auto or one of" in refused([fine, *out, "--format", "lava"], capsys)
    assert "--images nowhere is no folder" in refused([fine, *out, "--images", "nowhere"], capsys)
    assert "needs one placeholder" in refused([fine, *out, "--prompt", "x"], capsys)
    assert "--shard-mb is 0" in refused([fine, *out, "--shard-mb", "0"], capsys)
    (tmp_path / "a.exe").touch()
    assert "is no file that can be imported" in refused([str(tmp_path / "a.exe"), *out], capsys)
    (tmp_path / "empty").mkdir()
    assert "holds no image and no video" in refused([str(tmp_path / "empty"), *out], capsys)
    unknown = write(tmp_path / "b.json", [{"question": "?", "answer": "!"}])
    assert "no known format, with the keys answer, question" in refused([unknown, *out], capsys)
    urls = write(tmp_path / "c.jsonl", [{"image": "https://example.com/1.jpg", "caption": "a"}])
    assert "by URLs, such as https://example.com/1.jpg" in refused([urls, *out], capsys)
    whole = json.dumps([said(i) for i in range(3)])
    for name, text, words in (
        ("cut", whole[:-30].encode(), "damaged or cut in the record that begins at byte"),
        ("open", whole[:-1].encode(), "within its list; is it downloaded whole"),
        ("latin", whole.replace("\\u00e9", "é").encode("latin1"), "is not UTF-8 at byte"),
        ("utf16", whole.encode("utf-16"), "is no file that can be imported"),
        ("none", b"[]", "holds no record"),
    ):
        (tmp_path / f"{name}.json").write_bytes(text)
        assert words in refused([str(tmp_path / f"{name}.json"), "--images", pictures, *out], capsys), name
    (tmp_path / "d.parquet").write_bytes(b"PAR1 and more")
    assert "is not a whole parquet file" in refused([str(tmp_path / "d.parquet"), *out], capsys)
    pq.write_table(pa.table({"image": [{"bytes": None, "path": "9.jpg"}], "caption": ["a"]}), tmp_path / "e.parquet")
    assert "image file not found" in refused([str(tmp_path / "e.parquet"), *out, "--images", pictures], capsys)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").touch()
    assert "is not empty" in refused([fine, "--out", str(tmp_path / "used"), "--images", pictures], capsys)


def test_a_long_conversation_is_one_sample(tmp_path, tokenizer):
    turns = [{"from": ("human", "gpt")[i % 2], "value": f"{i}"} for i in range(40_000)]
    out, source = tmp_path / "out", write(tmp_path / "a.jsonl", [{"conversations": turns}])
    assert main([source, "--out", str(out), "--tokenizer", tokenizer.path, "--workers", "1"]) == 0
    index = load_index(str(out / "shard-00000-000.tar"), tokenizer.sha256)
    assert index.n_samples == 1 and index.samples["text_tokens"][0] > 200_000


def test_shards_have_a_set_size(pictures, tmp_path):
    source = write(tmp_path / "a.json", [said(i) for i in range(40)])
    for options, sizes in ((["--shard-samples", "16"], [16, 16, 8]), ([], [40])):
        out = tmp_path / f"out{len(sizes)}"
        assert main([source, "--images", pictures, "--out", str(out), "--workers", "1", *options]) == 0
        held = [sum(name.endswith(".json") for name in names(out / shard)) for shard in summary(out)["shards"]]
        assert held == sizes
    big = tmp_path / "pictures" / "big.jpg"
    big.write_bytes(picture(0) + bytes(700_000))  # behind a JPEG's end anything may stand
    source = write(tmp_path / "b.json", [said(i, image="big.jpg") for i in range(5)])
    out = tmp_path / "big"
    assert main([source, "--images", pictures, "--out", str(out), "--workers", "1", "--shard-mb", "2"]) == 0
    assert [path.stat().st_size <= 2 << 20 for path in sorted(out.glob("*.tar"))] == [True] * 3


def names(shard: Path) -> list[str]:

    with tarfile.open(shard) as tar:
        return tar.getnames()


@pytest.mark.parametrize("kind", ["tar_gz", "text_zst", "parquet", "class_folders"])
def test_neither_an_interruption_nor_the_number_of_workers_changes_a_byte(kind, tmp_path, tokenizer, monkeypatch):
    """Interrupted at each record in turn, where a record is read, and once between a shard and its journal entry."""
    (tmp_path / "source").mkdir()
    made = KINDS[kind](tmp_path / "source")
    command = [made.source, "--tokenizer", tokenizer.path, "--shard-samples", "3"]
    monkeypatch.setattr(units.TarWriter, "needed", lambda members: 1 << 40)  # each sample a part
    assert main([*command, "--out", str(tmp_path / "whole"), "--workers", "1"]) == 0
    whole, out = content_of(tmp_path / "whole"), tmp_path / "out"
    assert sum(name.endswith(".tar") for name in whole) >= 6
    sample, record, left = units._UnitRun._sample, Journal.record, itertools.count(1)
    for place in range(6):
        calls = itertools.count()

        def interrupted(self, ordinal, found, calls=calls, place=place):
            if next(calls) == 1 + place % 2:
                raise KeyboardInterrupt
            return sample(self, ordinal, found)

        def unrecorded(self, *part, place=place):
            if place == 3 and next(left) == 1:
                raise KeyboardInterrupt
            record(self, *part)

        monkeypatch.setattr(units._UnitRun, "_sample", interrupted)
        monkeypatch.setattr(Journal, "record", unrecorded)
        with pytest.raises(SystemExit) as end:
            main([*command, "--out", str(out), "--workers", "1"])
        assert end.value.code == 130
    monkeypatch.setattr(units._UnitRun, "_sample", sample)
    monkeypatch.setattr(Journal, "record", record)
    assert main([*command, "--out", str(out), "--workers", "1"]) == 0
    assert content_of(out) == whole
    assert main([*command, "--out", str(out), "--workers", "1"]) == 0 and content_of(out) == whole


def test_a_killed_import_and_index_go_on_to_the_same_bytes(pictures, tmp_path, tokenizer):
    """SIGKILL at ten moments of an import with two workers that indexes as it writes."""
    source = write(tmp_path / "a.json", [said(i) for i in range(3000)])
    command = [sys.executable, "launch/import_data.py", source, "--images", pictures, "--tokenizer", tokenizer.path]
    command += ["--shard-samples", "100", "--workers", "2", "--out"]

    def start(out):
        return subprocess.Popen([*command, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)

    assert start(tmp_path / "whole").wait(120) == 0
    out, draw, kills = tmp_path / "out", random.Random(0), 0
    while kills < 10:
        running = start(out)
        done = len(list(out.glob("*.index")))
        until = time.monotonic() + 60
        while running.poll() is None and len(list(out.glob("*.index"))) < done + 1 and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(draw.random() * 0.1)
        if running.poll() is not None:
            break
        if kills % 2:
            os.killpg(running.pid, signal.SIGKILL)
        else:
            running.kill()  # its workers end by themselves
        running.wait()
        kills += 1
    assert kills >= 5 and start(out).wait(120) == 0
    time.sleep(1)
    assert content_of(out) == content_of(tmp_path / "whole")


def test_other_settings_do_not_go_on_with_what_was_begun(pictures, tmp_path, capsys, monkeypatch):
    source, out = write(tmp_path / "a.json", [said(i) for i in range(4)]), str(tmp_path / "out")
    monkeypatch.setattr(Journal, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit):
        main([source, "--images", pictures, "--out", out, "--workers", "1"])
    monkeypatch.undo()
    capsys.readouterr()
    error = refused([source, "--images", pictures, "--out", out, "--workers", "1", "--domain", "x"], capsys)
    assert "holds an unfinished import with other domain" in error
    assert main([source, "--images", pictures, "--out", out, "--workers", "1"]) == 0
    assert "is not empty" in refused([source, "--out", out, "--workers", "1"], capsys)


def test_a_list_is_read_in_blocks_of_any_size(tmp_path, monkeypatch):
    records = [{"text": "é" * n + '\\"]}{,', "n": [n, {"x": None}]} for n in range(40)]
    path = tmp_path / "a.json"
    path.write_text("\ufeff " + json.dumps(records, indent=2, ensure_ascii=False) + "\n ", encoding="utf-8")
    for block in (1, 7, 64, 1 << 20):
        monkeypatch.setattr(array, "_BLOCK", block)
        container = container_of(str(path))
        for most in (1, 7, 100):
            found = [one for unit in container.units(str(path), most) for one in container.records(str(path), unit, 0)]
            assert found == list(enumerate(records))


@pytest.mark.parametrize("name", ["a.json", "0000-000000012.0.jpg", "x" * 100, "x" * 101, "é.txt", "caf\udce9"])
@pytest.mark.parametrize("size", [0, 1, 511, 1 << 20, 8**11 - 1, 8**11])
def test_headers_are_those_that_tarfile_writes(name, size):
    info = tarfile.TarInfo(name)
    info.size = size
    assert header(name, size) == info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def test_a_record_fits_one_format_at_most():
    records = {
        "llava": {"image": "a.jpg", "conversations": [], "text": "x"},
        "openai": {"messages": [], "images": ["a.jpg"]},
        "cauldron": {"images": ["a.jpg"], "texts": [{"user": "a", "assistant": "b"}]},
        "obelics": {"images": ["a.jpg", None], "texts": [None, "a"]},
        "mmc4": {"text_list": ["a"], "image_info": [], "url": "x"},
        "pairs": {"file_name": "a.jpg", "text": "x"},
        "text": {"text": "x", "id": 3},
        None: {"image": "a.jpg", "question": "?", "answer": "!"},
    }
    for name, record in records.items():
        assert [each.name for each in formats().values() if each.fits(record)] == ([name] if name else [])
    assert find_format("pairs").fits({"image": {"bytes": b"x", "path": None}})
    assert likely_format([records["text"], records["pairs"], records["text"], 3]).name == "text"
