import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from data.index import MAGIC, build_index, expand_shards, load_index
from data.text import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


def test_offsets_are_the_bytes_that_tarfile_reads(corpus, tokenizer):
    """Every member of every sample of the multi-image task, against the standard library."""
    shard = str(corpus / "train" / "multi-0000.tar")
    index = load_index(shard, Tokenizer(corpus / "tokenizer.json").sha256)
    raw = Path(shard).read_bytes()
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for sample in index.samples:
        content = raw[sample["json_offset"] : sample["json_offset"] + sample["json_size"]]
        key = json.loads(content)["key"]
        assert content == members[key + ".json"]
        first = sample["first_image"]
        for number, image in enumerate(index.images[first : first + sample["images"]]):
            found = [data for name, data in members.items() if name.startswith(f"{key}.{number}.")]
            assert [raw[image["offset"] : image["offset"] + image["size"]]] == found
    assert index.domains == ("multi",) and index.n_samples == 60


def test_images_are_ordered_by_number_not_by_name(make_shard):
    images = [(f"a.{n}.png", make_shard.image(height=28 + n)) for n in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)]
    shard, report = make_shard([*images, ("a.json", make_shard.json("<image>" * 11, "x"))])
    images = load_index(shard, _sha(shard)).images
    assert images["height"].tolist() == [28 + n for n in range(11)]
    assert images["width"].tolist() == [40] * 11
    assert images["image_at"].tolist() == [2 + 2 * n for n in range(11)]
    assert report.samples == 1 and not report.skipped


def test_damaged_samples_are_left_out_and_counted(make_shard):
    image, text = make_shard.image(), make_shard.json
    shard, report = make_shard(
        [
            ("ok1.json", text("hello", "you")),
            ("bad.json", b"{nope"),
            ("list.json", b"[1]"),
            ("turns.json", b'{"turns": 3}'),
            ("noplace.json", text("no mark", "x")),
            ("noplace.0.png", image),
            ("noimage.json", text("<image><image>", "x")),
            ("noimage.0.png", image),
            ("junk.json", text("<image>", "x")),
            ("junk.0.png", b"not an image"),
            ("two.json", text("<image><image>", "x")),
            ("two.0.png", image),
            ("two.0.jpg", image),
            ("nojson.0.png", image),
            ("../up/evil.json", text("a", "b")),
            ("/abs.json", text("a", "b")),
            ("ok2.0.png", image),
            ("ok2.json", text("<image>", "x", domain="other")),
            ("ok2.txt", b"ignored"),
            ("ok1.json", text("again", "x")),
        ]
    )
    assert report.skipped == {
        "bad json": 2,
        "bad turns": 1,
        "placeholder mismatch": 2,
        "unreadable image": 1,
        "two images share a number": 1,
        "no json": 1,
        "unsafe name": 2,
        "members not adjacent": 1,
    }
    assert (report.samples, report.images) == (2, 1)
    sentence = report.examples["placeholder mismatch"]
    assert "noplace" in sentence and "0 <image> placeholders" in sentence and "1 images" in sentence
    assert "junk" in report.examples["unreadable image"]
    index = load_index(shard, _sha(shard))
    assert index.domains == ("read", "other") and index.samples["domain"].tolist() == [0, 1]
    assert any("placeholder mismatch" in line for line in report.lines())


def test_an_image_over_the_limit_never_enters_an_index(make_shard, monkeypatch):
    monkeypatch.setattr("data.index.MAX_PIXELS", 100)
    _, report = make_shard([("a.json", make_shard.json("<image>", "x")), ("a.0.png", make_shard.image())])
    assert "declares 40 x 30 pixels" in report.examples["unreadable image"]


def test_a_truncated_shard_is_indexed_up_to_the_break(make_shard, tokenizer):
    members = []
    for n in range(6):
        members += [(f"s{n}.0.png", make_shard.image()), (f"s{n}.json", make_shard.json("<image>", str(n)))]
    shard, whole = make_shard(members)
    with tarfile.open(shard) as tar:
        places = {member.name: member for member in tar}
    raw = Path(shard).read_bytes()
    assert whole.broken is None and whole.samples == 6

    middle = places["s3.0.png"].offset_data + 100
    cuts = {
        middle: 3,  # inside an image
        places["s3.json"].offset + 200: 3,  # inside a header
        places["s3.json"].offset: 3,  # between members: the rest of s3 may be missing
        places["s5.json"].offset_data + places["s5.json"].size: 5,  # before the end mark
    }
    for cut, samples in cuts.items():
        Path(shard).write_bytes(raw[:cut])
        report = build_index(shard, tokenizer)
        assert report.samples == samples and f"byte {cut}" in report.broken and "truncated" in report.broken
        assert load_index(shard, tokenizer.sha256).n_samples == samples

    at = places["s3.0.png"].offset
    Path(shard).write_bytes(raw[:at] + b"\xff" * 512 + raw[at + 512 :])
    report = build_index(shard, tokenizer)
    assert f"no readable tar header at byte {at}" in report.broken


def test_what_is_no_tar_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="a.tar is not an uncompressed tar file"):
        build_index(tmp_path / "a.tar", tokenizer)
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(__file__, "a.json")
    with pytest.raises(ValueError, match="b.tar is not an uncompressed tar file"):
        build_index(tmp_path / "b.tar", tokenizer)


def test_an_index_that_does_not_fit_is_refused(make_shard, tokenizer):
    shard, _ = make_shard([("a.json", make_shard.json("a", "b"))])
    file, idx = Path(shard), Path(shard + ".idx")
    good = idx.read_bytes()
    with pytest.raises(ValueError, match="made with another tokenizer"):
        load_index(shard, "0" * 64)
    later = idx.stat().st_mtime_ns + 10**9
    os.utime(shard, ns=(later, later))
    with pytest.raises(ValueError, match="is older than the shard"):
        load_index(shard, tokenizer.sha256)
    file.write_bytes(file.read_bytes() + b"\0" * 512)
    with pytest.raises(ValueError, match=r"belongs to another file \(the shard has 10752 bytes"):
        load_index(shard, tokenizer.sha256)
    damages = {
        good[:-1]: "is damaged",
        b"other" + good: "is not a shard index",
        good.replace(b'"version": 1', b'"version": 9'): "has version 9",
        MAGIC + good[8:16] + b"\xff" * 200: "damaged header",
        good[:20]: "damaged header",
    }
    for content, sentence in damages.items():
        idx.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            load_index(shard, tokenizer.sha256)
    idx.unlink()
    with pytest.raises(ValueError, match=r"has no index; run python launch/index_shards.py .*shard-0000.tar"):
        load_index(shard, tokenizer.sha256)
    with pytest.raises(ValueError, match="nowhere.tar does not exist"):
        load_index("nowhere.tar", tokenizer.sha256)


def test_shard_patterns(tmp_path):
    for n in range(3):
        (tmp_path / f"a-{n:04d}.tar").touch()
    names = [str(tmp_path / f"a-{n:04d}.tar") for n in range(3)]
    assert expand_shards([f"{tmp_path}/a-{{0000..0002}}.tar"]) == names
    assert expand_shards([f"{tmp_path}/a-*.tar"]) == names
    for bad, sentence in {
        f"{tmp_path}/a-{{0000..0003}}.tar": "a-0003.tar .* does not exist",
        f"{tmp_path}/b-*.tar": "matches no file",
        "pipe:cat a.tar": "URL or pipe",
        "s3://bucket/a.tar": "URL or pipe",
        f"{tmp_path}/a-{{0000.tar": "unbalanced braces|does not exist",
    }.items():
        with pytest.raises(ValueError, match=sentence):
            expand_shards([bad])
    with pytest.raises(ValueError, match="named twice"):
        expand_shards([names[0], names[0]])


def test_the_command_indexes_in_parallel_and_reports(make_shard, tokenizer):
    shards = []
    for n in range(2):
        shards.append(make_shard([("a.json", make_shard.json("a", "b")), ("b.json", b"{")], f"t-{n:04d}.tar")[0])
    first = [Path(shard + ".idx").read_bytes() for shard in shards]
    for shard in shards:
        Path(shard + ".idx").unlink()
    pattern = str(Path(shards[0]).parent / "t-{0000..0001}.tar")
    command = [sys.executable, "launch/index_shards.py", pattern, "--tokenizer", tokenizer.path, "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "skipped 1: bad json" in done.stdout and "2 shards, 2 samples, 2 skipped" in done.stdout
    assert [Path(shard + ".idx").read_bytes() for shard in shards] == first
    assert sorted(p.name for p in Path(shards[0]).parent.glob("*.tmp")) == []
    failed = subprocess.run([*command[:2], "missing.tar", *command[3:]], cwd=ROOT, capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.startswith("error: shard missing.tar")


def _sha(shard: str) -> str:
    head = Path(shard + ".idx").read_bytes()
    length = int.from_bytes(head[8:16], "little")
    return json.loads(head[16 : 16 + length])["tokenizer_sha256"]
