import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from tandem.data.shards import indexing, tars
from tandem.data.shards.index import EVENT, IMAGE, MAGIC, MEDIA, SAMPLE, VIDEO, Group, load_index
from tandem.data.shards.indexing import IndexReport, build_index, is_current
from tests.data.range_server import serving
from tests.data.videos import make_video, only_sound
from tests.support import ROOT, write_tar


def test_offsets_and_checksums_are_those_of_the_bytes_that_tarfile_reads(corpus, tokenizer):
    """Every member of every sample of several media, against the standard library."""
    shard = str(corpus / "train" / "multi-0000.tar")
    index = load_index(shard, tokenizer.sha256)
    raw = Path(shard).read_bytes()
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}
    for sample in index.samples:
        content = raw[sample["text_offset"] : sample["text_offset"] + sample["text_size"]]
        assert sample["text_crc"] == zlib.crc32(content)
        key = json.loads(content)["key"]
        assert content == members[key + ".json"]
        first = sample["first_media"]
        for number, medium in enumerate(index.media[first : first + sample["media"]]):
            found = [data for name, data in members.items() if name.startswith(f"{key}.{number}.")]
            assert [raw[medium["offset"] : medium["offset"] + medium["size"]]] == found
            assert medium["crc"] == zlib.crc32(found[0]) and medium["kind"] == IMAGE
    assert index.groups == (Group("multi", None, 60),) and index.n_samples == 60


def test_an_index_takes_at_most_96_bytes_a_sample(make_shard):
    members, image = [], make_shard.image()
    for n in range(200):
        members += [(f"{n:06}.json", make_shard.json("<image>", str(n))), (f"{n:06}.0.png", image)]
    shard, report = make_shard(members)
    assert report.samples == report.images == 200
    assert os.path.getsize(shard + ".index") <= 96 * 200
    assert SAMPLE.itemsize + MEDIA.itemsize == 76


def test_media_are_ordered_by_number_not_by_name(make_shard, tokenizer):
    images = [(f"a.{n}.png", make_shard.image(height=28 + n)) for n in (0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9)]
    shard, report = make_shard([*images, ("a.json", make_shard.json("<image>" * 11, "x"))])
    media = load_index(shard, tokenizer.sha256).media
    assert media["height"].tolist() == [28 + n for n in range(11)]
    assert media["width"].tolist() == [40] * 11
    assert media["at"].tolist() == [2 + 2 * n for n in range(11)]
    assert report.samples == 1 and not report.skipped


def test_videos_and_their_events(make_shard, tokenizer, monkeypatch):
    stream = [(1.5, "assistant", "ab"), (0, "user", "c")]
    members = [
        ("a.0.png", make_shard.image()),
        ("a.json", make_shard.json("<image>", "x", entity="ant")),
        ("b.0.mp4", make_video(frames=25, fps=10, size=(48, 64))),
        ("b.1.png", make_shard.image()),
        ("b.json", make_shard.json("<video> and <image>", "x", stream=stream)),
        ("c.0.MKV", make_video(frames=20, fps=5, size=(48, 64), kind="mkv", tone=440)),
        ("c.json", make_shard.json("<video>", "x", entity="ant")),
    ]
    shard, report = make_shard(members)
    index = load_index(shard, tokenizer.sha256)
    assert (report.samples, report.images, report.videos) == (3, 2, 2)
    assert index.groups == (Group("read", "ant", 2), Group("read", None, 1))
    assert index.samples["group"].tolist() == [0, 1, 0] and index.samples["first_media"].tolist() == [0, 1, 3]
    assert index.media["kind"].tolist() == [IMAGE, VIDEO, IMAGE, VIDEO]
    assert index.media["audio"].tolist() == [0, 0, 0, 1]
    assert index.media["duration_ms"].tolist() == [0, 2500, 0, 4000] and index.media["fps"].tolist() == [0, 10, 0, 5]
    assert index.media["width"].tolist() == [40, 64, 40, 64]
    # of a stream: role, text, <eos>, role of the turn; in order of time
    assert index.events.dtype == EVENT and index.events.tolist() == [(0, 4), (1500, 5)]
    assert index.media["first_event"].tolist() == [0, 0, 2, 2]
    assert index.media["at"].tolist() == [2, 1, 1 + len(" and ") + 1, 1]
    # a video too large to be held is read by ranges, with the same result
    monkeypatch.setattr(tars, "_WHOLE", 100)
    monkeypatch.setattr(tars, "_CHUNK", 1000)
    first = Path(shard + ".index").read_bytes()
    build_index(shard, tokenizer)
    assert Path(shard + ".index").read_bytes() == first


def test_damaged_samples_are_left_out_and_counted(make_shard, tokenizer):
    image, text = make_shard.image(), make_shard.json
    shard, report = make_shard(
        [
            ("ok1.json", text("hello", "you")),
            ("bad.json", b"{nope"),
            ("list.json", b"[1]"),
            ("empty.json", b""),
            ("latin.json", text("caf\u00e9", "x").decode().replace("\\u00e9", "\u00e9").encode("latin1")),
            ("turns.json", b'{"turns": 3}'),
            ("noplace.json", text("no mark", "x")),
            ("noplace.0.png", image),
            ("noimage.json", text("<image><image>", "x")),
            ("noimage.0.png", image),
            ("swapped.json", text("<video>", "x")),
            ("swapped.0.png", image),
            ("junk.json", text("<image>", "x")),
            ("junk.0.png", b"not an image"),
            ("zero.0.png", b""),
            ("zero.json", text("<image>", "x")),
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
            ("ok3.json", text("a", "b")),
            ("ok3.json", text("a", "b")),
        ]
    )
    assert report.skipped == {
        "bad json": 4,
        "bad turns": 1,
        "placeholder mismatch": 3,
        "unreadable image": 2,
        "two media share a number": 1,
        "no json": 1,
        "unsafe name": 2,
        "members not adjacent": 1,
        "member twice": 1,
    }
    assert (report.samples, report.images) == (2, 1)
    sentence = report.examples["placeholder mismatch"]
    assert "noplace" in sentence and "0 <image> placeholders" in sentence and "1 images" in sentence
    assert "junk" in report.examples["unreadable image"]
    index = load_index(shard, tokenizer.sha256)
    assert index.groups == (Group("read", None, 1), Group("other", None, 1))
    assert index.samples["group"].tolist() == [0, 1] and index.skipped == report.skipped
    assert any("placeholder mismatch" in line for line in report.lines())
    again = IndexReport.of(index)
    assert (again.samples, again.images, again.videos, again.skipped) == (2, 1, 0, report.skipped)


def test_media_that_would_not_fit_into_memory_are_known_by_their_header(make_shard):
    """Images of 50,000 x 50,000 pixels that take a few bytes, and members larger than anything of their kind."""
    gif = b"GIF89a" + (50_000).to_bytes(2, "little") * 2 + b"\0\0\0" + b"," + bytes(9) + b"\2\0;"
    size = (50_000).to_bytes(4, "big")
    chunk = b"IHDR" + size * 2 + bytes([8, 2, 0, 0, 0])
    png = (
        b"\x89PNG\r\n\x1a\n"
        + (13).to_bytes(4, "big")
        + chunk
        + zlib.crc32(chunk).to_bytes(4, "big")
        + bytes(4)
        + b"IDAT"
    )
    bmp = b"BM" + bytes(8) + (54).to_bytes(4, "little") + (40).to_bytes(4, "little")
    bmp += (50_000).to_bytes(4, "little") * 2 + b"\1\0\x18\0" + bytes(24)
    tags = [(256, 4, 1, 50_000), (257, 4, 1, 50_000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (277, 3, 1, 1)]
    tiff = b"II*\0" + (8).to_bytes(4, "little") + len(tags).to_bytes(2, "little")
    for tag, kind, count, value in tags:
        tiff += b"".join(n.to_bytes(width, "little") for n, width in ((tag, 2), (kind, 2), (count, 4), (value, 4)))
    bombs = {"gif": gif, "png": png, "bmp": bmp, "tif": tiff + bytes(4)}
    members = []
    for kind, data in bombs.items():
        members += [(f"{kind}.0.{kind}", data), (f"{kind}.json", make_shard.json("<image>", "x"))]
        _, report = make_shard([(f"{kind}.0.{kind}", data), (f"{kind}.json", make_shard.json("<image>", "x"))])
        assert "declares 50000 x 50000 pixels" in report.examples["unreadable image"], kind
    assert make_shard(members)[1].skipped == {"unreadable image": 4}


def test_limits_on_members(make_shard, monkeypatch):
    members = [("a.json", make_shard.json("<image>", "x")), ("a.0.png", make_shard.image())]
    monkeypatch.setattr(indexing, "MAX_PIXELS", 100)
    assert "declares 40 x 30 pixels" in make_shard(members)[1].examples["unreadable image"]
    for kind in ("json", "image"):
        with monkeypatch.context() as patch:
            patch.setitem(tars.MAX_BYTES, kind, 50)
            assert "bytes; the limit is 50" in make_shard(members)[1].examples["member too large"]
    monkeypatch.setattr(indexing, "MAX_PIXELS", 1 << 20)
    monkeypatch.setattr(indexing, "MAX_MEDIA", 0)
    assert "has 1 media; the limit is 0" in make_shard(members)[1].examples["too many media"]


def test_a_video_without_pictures_is_counted(make_shard):
    members = []
    for name, data in (("sound", only_sound()), ("junk", b"ftypmp42" * 99), ("zero", b"")):
        members += [(f"{name}.0.mp4", data), (f"{name}.json", make_shard.json("<video>", "x"))]
    _, report = make_shard([*members, ("ok.json", make_shard.json("a", "b"))])
    assert report.skipped == {"unreadable video": 3} and report.samples == 1
    assert "sound.0.mp4: the file has no video track" in report.examples["unreadable video"]


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_nothing_in_a_shard_is_executed_and_odd_members_are_passed_over(make_shard, tmp_path):
    bomb, marker = pickle.dumps(Bomb(tmp_path / "ran")), tmp_path / "ran"
    playlist = f"#EXTM3U\nfile://{tmp_path}/x.mp4\n".encode()
    members = [(f"a.{rest}", bomb) for rest in ("pkl", "pyd", "pickle", "0.pt", "npy", "cls")]
    _, report = make_shard([*members, ("a.json", make_shard.json("a", "b"))])
    assert (report.samples, report.skipped) == (1, {})
    bad = [("a.json", bomb), ("b.0.png", bomb), ("b.json", make_shard.json("<image>", "x"))]
    bad += [("c.0.mp4", playlist), ("c.json", make_shard.json("<video>", "x"))]
    _, report = make_shard(bad)
    assert report.skipped == {"bad json": 1, "unreadable image": 1, "unreadable video": 1}
    assert not marker.exists()


def test_links_devices_and_sparse_files_are_not_followed(tmp_path, tokenizer, make_shard):
    path = tmp_path / "links.tar"
    with tarfile.open(path, "w") as tar:
        for n, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)):
            info = tarfile.TarInfo(f"s{n}.json")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("folder")
        info.type = tarfile.DIRTYPE
        tar.addfile(info)
        odd = tarfile.TarInfo("bell\a\udcff.json")
        odd.size = 1
        tar.addfile(odd, io.BytesIO(b"x"))
    report = build_index(path, tokenizer)
    assert report.skipped == {"not a plain file": 4, "bad json": 1}
    "\n".join(report.lines()).encode()  # printable anywhere
    assert r"bell\x07\udcff" in report.examples["bad json"]


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
        assert report.skipped == {"cut off by the end of the shard": 1}
        index = load_index(shard, tokenizer.sha256)
        assert index.n_samples == samples and index.broken == report.broken

    at = places["s3.0.png"].offset
    huge, negative, octal = b"\x80" + b"\0" * 4 + b"\xff" * 7, b"\xff" * 11 + b"\0", b"77777777777 "
    damages = {
        b"\xff" * 512: f"no readable tar header at byte {at}",
        _header(b"x", huge): f"no readable tar header at byte {at}",  # further headers of absurd length
        _header(b"L", octal): f"no readable tar header at byte {at}",
        _header(b"0", negative): f"header at byte {at}",
        _header(
            b"0", huge
        ): f"the file ends at byte {len(raw)}, inside x.json, which reaches to {at + 512 + (1 << 56) - 1}",
    }
    for header, sentence in damages.items():
        Path(shard).write_bytes(raw[:at] + header + raw[at + 512 :])
        report = build_index(shard, tokenizer)
        assert sentence in report.broken and report.samples in (2, 3)  # the last may be cut: its end is not seen


def _header(kind: bytes, size: bytes) -> bytes:
    """A tar header with a valid checksum and any size."""
    head = bytearray(b"x.json".ljust(100, b"\0") + b"0000644\0" * 3 + size + b"0" * 11 + b"\0" + b" " * 8 + kind)
    head = head.ljust(512, b"\0")
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def test_what_is_no_tar_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    (tmp_path / "zero.tar").touch()
    with tarfile.open(tmp_path / "b.tar", "w:gz") as tar:
        tar.add(__file__, "a.json")
    for name in ("a", "b", "zero"):
        with pytest.raises(ValueError, match=f"{name}.tar is not an uncompressed tar file"):
            build_index(tmp_path / f"{name}.tar", tokenizer)
    with pytest.raises(ValueError, match="no path and no address"):
        build_index(f"pipe:touch {tmp_path}/ran", tokenizer, tmp_path / "x.index")
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "b.tar", "zero.tar"}


def test_an_index_that_does_not_fit_is_refused(make_shard, tokenizer):
    shard, _ = make_shard([("a.json", make_shard.json("a", "b"))])
    file, idx = Path(shard), Path(shard + ".index")
    good = idx.read_bytes()
    with pytest.raises(ValueError, match="made with another tokenizer"):
        load_index(shard, "0" * 64)
    later = idx.stat().st_mtime_ns + 10**9
    os.utime(shard, ns=(later, later))
    assert not is_current(shard, tokenizer)
    with pytest.raises(ValueError, match="is older than the shard"):
        load_index(shard, tokenizer.sha256)
    file.write_bytes(file.read_bytes() + b"\0" * 512)
    with pytest.raises(ValueError, match=r"belongs to another file \(the shard has 10752 bytes"):
        load_index(shard, tokenizer.sha256)
    file.write_bytes(file.read_bytes()[:-512])
    damages = {
        good[:-1]: "is damaged",
        good[:-1] + b"x": "is damaged: its records do not have their checksum",
        b"other" + good: "is not a shard index",
        good.replace(b'"version": 3', b'"version": 9'): "has version 9",
        good.replace(b'"samples": 1', b'"samples": 2'): "damaged header",
        good.replace(b'"read"', b'"raed"'): "damaged header: it does not have its checksum",
        MAGIC + good[8:16] + b"\xff" * 200: "damaged header",
        MAGIC + b"\xff" * 8 + good[16:]: "damaged header",
        MAGIC + (2).to_bytes(8, "little") + b"[]": "damaged header",
        good[:20]: "damaged header",
        b"": "is not a shard index",
    }
    for content, sentence in damages.items():
        idx.write_bytes(content)
        with pytest.raises(ValueError, match=sentence):
            load_index(shard, tokenizer.sha256)
        assert not is_current(shard, tokenizer)
    idx.write_bytes(good)
    assert is_current(shard, tokenizer)
    other = file.with_name("other.tar")
    other.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"is the index of 'shard-0000.tar', not of .*other.tar"):
        load_index(other, tokenizer.sha256, idx)
    idx.unlink()
    with pytest.raises(ValueError, match=r"has no index; run python launch/index_shards.py .*shard-0000.tar"):
        load_index(shard, tokenizer.sha256)
    with pytest.raises(ValueError, match="nowhere.tar does not exist"):
        load_index("nowhere.tar", tokenizer.sha256)


def test_a_remote_shard_is_read_once_in_order_and_gives_the_same_records(make_shard, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tars, "_READ_AHEAD", {False: 1 << 20, True: 4096})
    members = []
    for n in range(40):
        members += [(f"{n}.0.png", make_shard.image(height=30 + n)), (f"{n}.json", make_shard.json("<image>", "x"))]
    shard, _ = make_shard([*members, ("v.0.mp4", make_video(frames=5)), ("v.json", make_shard.json("<video>", "x"))])
    local, path = load_index(shard, tokenizer.sha256), tmp_path / "indexes.index"
    with serving(Path(shard).parent) as server:
        address = f"{server.url}/{Path(shard).name}"
        report = build_index(address, tokenizer, path)
        fetched = [sent for method, _, sent in server.requests if method == "GET"]
        assert is_current(address, tokenizer, path)
        os.utime(shard, ns=(1, 1))  # another version, the server says
        assert not is_current(address, tokenizer, path)
    assert report.samples == 41 and report.videos == 1
    assert len(fetched) > 10 and sum(fetched) <= os.path.getsize(shard) + 8192
    remote = load_index(address, tokenizer.sha256, path)  # needs no server
    assert remote.digest == local.digest and np.array_equal(remote.media, local.media)
    with pytest.raises(ValueError, match="is remote, so its index needs a file here"):
        load_index(address, tokenizer.sha256)


def test_a_server_that_fails_gives_an_error_and_no_index(make_shard, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.data.shards.storage._PAUSE_S", 0.001)
    shard, _ = make_shard([("a.json", make_shard.json("a", "b"))])
    with serving(Path(shard).parent) as server:
        server.failures = 10**9
        with pytest.raises(OSError, match="cannot be read"):
            build_index(f"{server.url}/shard-0000.tar", tokenizer, tmp_path / "x.index")
    assert not (tmp_path / "x.index").exists()


def test_shards_of_images_load_no_video_library(corpus, tmp_path):
    write_tar(tmp_path / "a.tar", [("a.json", b"{}")])
    code = "import sys; from tandem.data.shards.indexing import build_index; "
    code += "from tandem.data.media.text import Tokenizer; "
    code += "build_index(sys.argv[1], Tokenizer(sys.argv[2]), sys.argv[3]); assert 'av' not in sys.modules"
    arguments = [str(corpus / "train" / "read-0000.tar"), str(corpus / "tokenizer.json"), str(tmp_path / "read.index")]
    subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, check=True)
