import io
import json
import pickle
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tandem.data.curation.duplicates import Duplicates
from tandem.data.curation.filters import (
    Rules,
    assistant_text,
    blocking_entry,
    check_image,
    check_text,
    check_turns,
    read_block_list,
)
from tandem.data.curation.pipeline import Examiner, curate
from tandem.data.curation.runners import RayWorker, in_processes
from tandem.data.curation.similar import NearestEarlier, perceptual_hash
from tandem.data.media.turns import SampleError
from tandem.data.shards.storage import open_range
from tandem.data.shards.tars import TarSamples
from tests.curation_shards import content, defective_shards, encoded, pair, picture
from tests.support import write_tar


def curated(shards, out, rules=None, workers=1, make_scorer=None):
    """(report, {key: reason or None} in order) of a run in processes."""
    out.mkdir()
    report = curate(shards, out, rules or Rules(), make_scorer, lambda task, items: in_processes(task, items, workers))
    outcome = {}
    for shard in sorted(out.glob("*.tar")):
        with tarfile.open(shard) as tar:
            outcome |= {name.split(".")[0]: None for name in tar.getnames()}
    log = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return report, outcome | {entry["key"]: entry["reason"] for entry in log}


def samples_of(shard):
    with open_range(shard) as file:
        samples = TarSamples(file)
        return {sample.key: sample.problem and sample.problem.reason for sample in samples}, samples.broken


# Perceptual hash and search


def test_hash_is_the_same_on_every_machine():
    y, x = np.mgrid[:64, :96]
    pixels = np.stack([2 * x, 3 * y, (x * y) % 256], -1).astype(np.uint8)
    assert f"{perceptual_hash(pixels):016x}" == "000b0f2f3f7e387c"
    assert perceptual_hash(np.full((40, 40, 3), 9, np.uint8)) == perceptual_hash(np.full((50, 30, 3), 200, np.uint8))


def test_hash_survives_copies_and_tells_pictures_apart():
    """Scaled and recompressed copies lie within the default distance of 6, unrelated pictures beyond it."""
    originals = [picture(i, 150, 200) for i in range(60)]
    hashes = [perceptual_hash(np.asarray(image)) for image in originals]
    for image, code in zip(originals, hashes, strict=True):
        copy = encoded(image.resize((120, 90), Image.Resampling.LANCZOS), "JPEG", quality=60)
        assert (perceptual_hash(np.asarray(Image.open(io.BytesIO(copy)))) ^ code).bit_count() <= 6
    closest = min((a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i])
    assert closest > 6


@pytest.mark.parametrize("distance", [0, 3, 4, 6, 9, 15])
def test_search_finds_what_comparing_all_finds(distance):
    """Random hashes, each with relatives up to 20 bits away, against the first match of a loop over all."""
    rng = np.random.default_rng(distance)
    hashes, aspects = [], []
    for seed in rng.integers(0, 1 << 63, 60):
        for flipped in rng.integers(0, 21, 5):
            bits = rng.choice(64, flipped, replace=False)
            hashes.append(int(seed) ^ sum(1 << int(bit) for bit in bits))
            aspects.append(float(rng.choice([1.0, 1.09, 1.3])))
    search, found, expected = NearestEarlier(distance), [], []
    for i, (code, aspect) in enumerate(zip(hashes, aspects, strict=True)):
        found.append(search.find(code, aspect))
        near = (
            j
            for j in range(i)
            if (hashes[j] ^ code).bit_count() <= distance and max(aspects[j], aspect) <= 1.1 * min(aspects[j], aspect)
        )
        expected.append(next(near, None))
        search.add(code, aspect)
    assert found == expected
    assert any(number is not None for number in found) or distance == 0


def test_a_dropped_duplicate_is_not_remembered():
    """a - b - c in a chain, each 4 bits from the next: b falls to a, and c is 8 from a, so it stays."""
    duplicates, kept = Duplicates(near=4), []
    for name, code in (("a", 0), ("b", 0b1111), ("c", 0b11111111)):
        try:
            duplicates.keep(name, [(name.encode().hex(), code, 1.0)])
            kept.append(name)
        except SampleError as error:
            assert (error.reason, str(error)) == ("near duplicate", "b looks like a")
    assert kept == ["a", "c"]


# Filters


def reason_of(check, *arguments):
    try:
        check(*arguments)
    except SampleError as error:
        return error.reason


def test_thresholds_keep_what_lies_on_them():
    rules = Rules(min_side=28, max_aspect=5, min_chars=3, max_chars=5)
    sizes = {(28, 28): None, (27, 28): "image too small", (28, 140): None, (28, 141): "extreme aspect ratio"}
    for (height, width), reason in sizes.items():
        for turned in ((height, width), (width, height)):
            assert reason_of(check_image, encoded(picture(0, *turned)), rules, "x") == reason
    texts = {"ab": "text too short", "abc": None, "abcde": None, "abcdef": "text too long"}
    for text, reason in texts.items():
        assert reason_of(check_text, text, rules, "x") == reason


def test_text_is_what_the_assistant_says():
    said = [{"time": 1, "role": "assistant", "text": "Look!"}, {"time": 2, "role": "user", "text": "Where?"}]
    turns = [
        {"role": "user", "text": "<video>Watch."},
        {"role": "assistant", "text": " A \n cat<image>. ", "stream": said},
    ]
    assert assistant_text({"turns": turns}) == "A cat . Look!"


@pytest.mark.parametrize(
    "turns", [3, [], ["x"], [{"role": "user"}], [{"text": 5}], [{"text": "\ud800"}], [{"text": "a", "stream": [1]}]]
)
def test_turns_that_are_none(turns):
    assert reason_of(check_turns, {"turns": turns}, "x") == "bad turns"


def test_block_list(tmp_path):
    path = tmp_path / "blocked.txt"
    path.write_text("# a list\nspam.example   # all of it\nhttps://www.Example.com/ads/\n\n")
    entries = frozenset(read_block_list(path))
    assert entries == {"spam.example", "example.com/ads/"}
    blocked = {
        "http://spam.example/x": "spam.example",
        "https://A.B.SPAM.example:8080": "spam.example",
        "https://notspam.example/": None,
        "https://example.com/ads/1.png": "example.com/ads/",
        "https://www.example.com/ads/1.png?x=1": "example.com/ads/",
        "https://example.com/adsense": None,
        "http://[broken": None,
        "": None,
    }
    assert {url: blocking_entry(url, entries) for url in blocked} == blocked
    path.write_text("ok.example\nno host\n")
    with pytest.raises(ValueError, match="line 2 of block list .* is 'no host'"):
        read_block_list(path)


@pytest.mark.parametrize(
    "wrong", [{"min_side": 0}, {"max_aspect": 0.5}, {"max_chars": 0}, {"near": 16}, {"min_similarity": 2}]
)
def test_thresholds_that_mean_nothing(wrong):
    with pytest.raises(ValueError, match="--" + next(iter(wrong)).replace("_", "-")):
        Rules(**wrong)


# Reading


def test_samples_with_unusable_names_or_members(tmp_path):
    one = b"{}"
    members = [("a.json", one), ("b.json", one), ("a.0.png", one), ("c.json", one), ("c.json", one)]
    members += [("../up.json", one), ("dir/d.json", one), ("/etc/e.json", one)]
    members += [("f.json", one), ("f.0.png", one), ("f.00.jpg", one)]
    shard = write_tar(tmp_path / "s.tar", members)
    with tarfile.open(shard, "a") as tar:
        link = tarfile.TarInfo("link.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with open_range(shard) as file:
        problems = [(s.key, s.problem and s.problem.reason) for s in TarSamples(file)]
    assert problems == [
        ("a", None),
        ("b", None),
        ("a", "members not adjacent"),
        ("c", "member twice"),
        ("../up", "unsafe name"),
        ("dir/d", None),
        ("/etc/e", "unsafe name"),
        ("f", "two media share a number"),
        ("link", "not a plain file"),
    ]


def test_a_damaged_tar_is_read_up_to_its_break(tmp_path):
    whole = write_tar(tmp_path / "s.tar", [*pair("a", b"x" * 600), *pair("b", b"y" * 600)])
    raw = Path(whole).read_bytes()
    with tarfile.open(whole) as tar:
        second, last = tar.getmember("b.json").offset, tar.getmember("b.0.png").offset_data
    cut, marked, garbled = tmp_path / "cut.tar", tmp_path / "marked.tar", tmp_path / "garbled.tar"
    cut.write_bytes(raw[: last + 10])
    marked.write_bytes(raw[: last + 1024])
    garbled.write_bytes(raw[:second] + b"\xff" * 512 + raw[second + 512 :])
    assert samples_of(whole) == ({"a": None, "b": None}, None)
    ends = "cut off by the end of the shard"
    reach = f"inside b.0.png, which reaches to {last + 600}"
    assert samples_of(cut) == ({"a": None, "b": ends}, f"truncated: the file ends at byte {last + 10}, {reach}")
    found, broken = samples_of(marked)
    assert found == {"a": None, "b": ends} and broken.startswith(f"truncated: the file ends at byte {last + 1024} ")
    found, broken = samples_of(garbled)
    assert found == {"a": ends} and broken.startswith(f"damaged: no readable tar header at byte {second};")
    (tmp_path / "no.tar").write_bytes(b"nothing like a tar" * 100)
    with pytest.raises(ValueError, match=r"no.tar is not an uncompressed tar"):
        samples_of(tmp_path / "no.tar")


def test_a_negative_size_ends_the_shard(tmp_path):
    """Read as it stands, it would lead back to an earlier header and round again for ever."""
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.json"))
        member = tarfile.TarInfo("b.json")
        member.pax_headers = {"size": "-1024"}
        tar.addfile(member)
    found, broken = samples_of(tmp_path / "s.tar")
    assert broken is not None and set(found.values()) <= {None, "cut off by the end of the shard"}


def test_a_header_of_absurd_length_ends_the_shard(tmp_path):
    """A long name of 1 GiB, in a sparse file that holds it: refused before it is read."""
    shard = write_tar(tmp_path / "s.tar", pair("a", b"x"))
    with tarfile.open(shard) as tar:
        end = max(member.offset_data for member in tar.getmembers()) + 512
    with open(shard, "r+b") as file:
        file.seek(end)
        member = tarfile.TarInfo("long")
        member.type, member.size = tarfile.GNUTYPE_LONGNAME, 1 << 30
        file.write(member.tobuf(tarfile.GNU_FORMAT)[:512])
        file.truncate(end + (2 << 30))
    found, broken = samples_of(shard)
    assert found == {"a": "cut off by the end of the shard"} and broken.startswith("damaged: no readable tar header")


# Whole runs


def test_every_defect_is_dropped_for_its_reason(tmp_path):
    shards, expected = defective_shards(tmp_path)
    rules = Rules(blocked=("spam.example.com",))
    report, outcome = curated(shards, tmp_path / "out", rules)
    assert outcome == expected
    dropped = [reason for reason in expected.values() if reason]
    assert (report.samples, report.kept) == (len(expected), len(expected) - len(dropped))
    assert report.dropped == {reason: dropped.count(reason) for reason in dropped}
    assert report.examples["near duplicate"] == [
        {
            "shard": shards[1],
            "key": "copy",
            "why": f"sample copy of {shards[1]} looks like sample original of {shards[0]}",
        }
    ]
    size = (tmp_path / "s-2.tar").stat().st_size
    assert len(report.broken()) == 1 and f"the file ends at byte {size}, inside more2.0.png" in report.broken()[0]


def test_the_number_of_processes_changes_nothing(tmp_path):
    shards, _ = defective_shards(tmp_path)
    reports = [curated(shards, tmp_path / f"out{n}", workers=n)[0].as_json() for n in (1, 3)]
    assert reports[0] == reports[1]
    for path in (tmp_path / "out1").iterdir():
        assert path.read_bytes() == (tmp_path / "out3" / path.name).read_bytes(), path.name


def test_a_mistake_crosses_ray_as_a_sentence(tmp_path):
    (tmp_path / "no.tar").write_bytes(b"nothing like a tar" * 100)
    answer = RayWorker(Examiner(Rules()))({"number": 5, "item": json.dumps(str(tmp_path / "no.tar"))})
    assert answer["number"] == 5 and "no.tar is not an uncompressed tar" in answer["error"]


def test_the_first_seen_stays(tmp_path):
    image = encoded(picture(0))
    shards = [write_tar(tmp_path / f"{name}.tar", pair(name, image)) for name in "ab"]
    assert curated(shards, tmp_path / "ab")[1] == {"a": None, "b": "exact duplicate"}
    assert curated(shards[::-1], tmp_path / "ba")[1] == {"b": None, "a": "exact duplicate"}
    assert curated(shards, tmp_path / "both", Rules(near=None))[1] == {"a": None, "b": None}


def test_members_are_copied_as_they_are_and_never_unpickled(tmp_path):
    trap = pickle.dumps(print)
    members = [*pair("d/a", encoded(picture(0)), url="x"), ("d/a.note.pkl", trap), ("d/a.txt", b"kept")]
    shard = write_tar(tmp_path / "s.tar", [*members, *pair("gone", b"")])
    curated([shard], tmp_path / "out")
    with tarfile.open(tmp_path / "out" / "s.tar") as tar:
        copied = {member.name: tar.extractfile(member).read() for member in tar}
    assert copied == dict(members)


def test_an_image_that_declares_too_many_pixels_is_not_decoded(tmp_path):
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    bomb += b"\0\0\0\0IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    shard = write_tar(tmp_path / "s.tar", pair("bomb", bomb))
    report, outcome = curated([shard], tmp_path / "out")
    assert outcome == {"bomb": "unreadable image"}
    assert "60000 x 60000" in report.examples["unreadable image"][0]["why"]
    assert not (tmp_path / "out" / "s.tar").exists()


class BrightnessScorer:
    """Cosine stand-in: the mean brightness of an image for every text but "any"."""

    def prepare(self, pixels_HW3):
        return pixels_HW3.mean() / 255

    def best_match(self, images, texts):
        return [1.0 if text == "any" else max(each) for each, text in zip(images, texts, strict=True)]


def test_images_unlike_their_text_are_dropped_before_duplicates_are_sought(tmp_path):
    """A picture with the wrong text must not take the place of its copy with the right one."""
    grey = {level: encoded(Image.new("RGB", (30, 30), (level,) * 3)) for level in (10, 250)}
    members = [*pair("dark", grey[10]), *pair("copy", grey[10], text="any"), *pair("light", grey[250])]
    members += [("words.json", content("Words.", images=0))]
    rules = Rules(near=0, min_similarity=0.5)
    _, outcome = curated([write_tar(tmp_path / "s.tar", members)], tmp_path / "out", rules, 1, BrightnessScorer)
    assert outcome == {"dark": "image and text differ", "copy": None, "light": "near duplicate", "words": None}


def test_a_shard_that_changes_meanwhile_is_noticed(tmp_path):
    shard = write_tar(tmp_path / "s.tar", pair("a", encoded(picture(0))))
    out = tmp_path / "out"
    out.mkdir()

    def run(task, items):
        results = list(map(task, items))
        write_tar(tmp_path / "s.tar", pair("b", encoded(picture(1))))
        return results

    with pytest.raises(ValueError, match="changed while it was curated: sample a is gone"):
        curate([shard], out, Rules(), None, run)
