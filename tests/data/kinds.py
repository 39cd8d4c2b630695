"""The kinds of data that people have, each made small from the same pictures, clips and texts, with what it must give.

A kind writes its files into a folder and returns a `Made`: what to index or import, and the samples that must come out.
"""

import base64
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.data.videos import make_video
from tests.support import write_tar

COUNT = 6


@dataclass(frozen=True)
class Expected:
    """Turns as (role, text), and the bytes of the media in order."""

    turns: tuple[tuple[str, str], ...]
    media: tuple[bytes, ...] = ()


@dataclass
class Made:
    """source: a shard to index, or what to import with these options."""

    source: str
    expected: list[Expected]
    options: list[str] = field(default_factory=list)
    imported: bool = True


@cache
def picture(i: int, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (40 + i, 56, 3), np.uint8)
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


@cache
def clip(i: int) -> bytes:
    return make_video(frames=6 + i, fps=3, size=(48, 64))


def caption(i: int) -> str:
    return f"Bild {i}: größer als <image>"


def pair(i: int, medium: str = "image") -> Expected:
    said = caption(i).replace("<image>", r"\<image>")
    return Expected((("user", f"<{medium}>"), ("assistant", said)), (picture(i) if medium == "image" else clip(i),))


def text(i: int) -> Expected:
    return Expected((("assistant", caption(i).replace("<image>", r"\<image>")),))


def _shard(folder: Path, members: list[tuple[str, bytes]], expected: list[Expected]) -> Made:
    return Made(write_tar(folder / "shard-0000.tar", members), expected, imported=False)


def _lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def _pictures(folder: Path) -> Path:
    for i in range(COUNT):
        (folder / "pictures").mkdir(exist_ok=True)
        (folder / "pictures" / f"{i}.jpg").write_bytes(picture(i))
    return folder / "pictures"


# ---------------------------------------------------------------------------------------------------------------------
# Read in place


def image_and_txt(folder: Path) -> Made:
    members = [
        (f"{i:04}.{end}", data)
        for i in range(COUNT)
        for end, data in (("jpg", picture(i)), ("txt", caption(i).encode()))
    ]
    return _shard(folder, members, [pair(i) for i in range(COUNT)])


def img2dataset(folder: Path) -> Made:
    """Both texts, in img2dataset's order; its parquet and statistics lie beside the shard."""
    members = []
    for i in range(COUNT):
        held = json.dumps({"caption": "not this one", "url": f"http://x/{i}", "key": f"{i:09}", "status": "success"})
        members += [(f"{i:09}.jpg", picture(i)), (f"{i:09}.json", held.encode()), (f"{i:09}.txt", caption(i).encode())]
    (folder / "shard-0000.parquet").write_bytes(b"PAR1")
    (folder / "shard-0000_stats.json").write_text("{}")
    return _shard(folder, members, [pair(i) for i in range(COUNT)])


def image_and_json(folder: Path) -> Made:
    members = []
    for i in range(COUNT):
        members += [(f"{i}.JSON", json.dumps({"caption": caption(i)}).encode()), (f"{i}.JPG", picture(i))]
    return _shard(folder, members, [pair(i) for i in range(COUNT)])


def images_alone(folder: Path) -> Made:
    members = [(f"{i}.jpg", picture(i)) for i in range(COUNT)]
    return _shard(folder, members, [Expected((("user", "<image>"),), (picture(i),)) for i in range(COUNT)])


def video_and_txt(folder: Path) -> Made:
    members = [
        (f"{i}.{end}", data) for i in range(COUNT) for end, data in (("mp4", clip(i)), ("txt", caption(i).encode()))
    ]
    return _shard(folder, members, [pair(i, "video") for i in range(COUNT)])


def text_lines(folder: Path) -> Made:
    lines = "".join(json.dumps({"text": caption(i)}) + "\n" for i in range(COUNT))
    return _shard(folder, [("a.jsonl", lines.encode())], [text(i) for i in range(COUNT)])


# ---------------------------------------------------------------------------------------------------------------------
# Imported


def llava(folder: Path) -> Made:
    records, expected = [], []
    for i in range(COUNT):
        said = [{"from": "human", "value": f"<image>\nWas {i}?"}, {"from": "gpt", "value": f"é {i}"}]
        records.append({"id": str(i), "image": f"{i}.jpg", "conversations": said})
        expected.append(Expected((("user", f"<image>\nWas {i}?"), ("assistant", f"é {i}")), (picture(i),)))
    (folder / "llava.json").write_text(json.dumps(records, indent=1))
    return Made(str(folder / "llava.json"), expected, ["--images", str(_pictures(folder))])


def sharegpt(folder: Path) -> Made:
    records, expected = [], []
    for i in range(COUNT):
        said = [("system", "Brief."), ("human", f"a {i}"), ("gpt", "b"), ("tool", "42"), ("gpt", "c")]
        records.append({"conversations": [{"from": role, "value": value} for role, value in said]})
        tool = "<tool_response>\n42\n</tool_response>"
        turns = (("system", "Brief."), ("user", f"a {i}"), ("assistant", "b"), ("user", tool), ("assistant", "c"))
        expected.append(Expected(turns))
    return Made(_lines(folder / "sharegpt.jsonl", records), expected)


def openai(folder: Path) -> Made:
    records, expected = [], []
    for i in range(COUNT):
        url = {"url": "data:image/jpeg;base64," + base64.b64encode(picture(i)).decode()}
        call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": 3}'}}
        records.append(
            {
                "messages": [
                    {"role": "developer", "content": "Brief."},
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a <image> "}, {"type": "image_url", "image_url": url}],
                    },
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "tool_call_id": "1", "content": f"{i}"},
                    {"role": "assistant", "content": "done"},
                ]
            }
        )
        turns = (
            ("system", "Brief."),
            ("user", r"a \<image> <image>"),
            ("assistant", '\n<tool_call>\n{"name": "look", "arguments": {"at": 3}}\n</tool_call>'),
            ("user", f"<tool_response>\n{i}\n</tool_response>"),
            ("assistant", "done"),
        )
        expected.append(Expected(turns, (picture(i),)))
    return Made(_lines(folder / "messages.jsonl", records), expected)


def parquet(folder: Path) -> Made:
    images = [{"bytes": picture(i, "PNG"), "path": f"{i}.png"} for i in range(COUNT)]
    names = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": [i % 2 for i in range(COUNT)]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table, folder / "train-00000-of-00001.parquet", row_group_size=4)
    label = ["cat", "dog"]
    expected = [
        Expected((("user", "<image>"), ("assistant", label[i % 2])), (picture(i, "PNG"),)) for i in range(COUNT)
    ]
    return Made(str(folder), expected)


def obelics(folder: Path) -> Made:
    _pictures(folder)
    records = [
        {"texts": ["a", None, "b", "c", None], "images": [None, f"{i}.jpg", None, None, f"{i}.jpg"]}
        for i in range(COUNT)
    ]
    expected = [Expected((("assistant", "a<image>b\n\nc<image>"),), (picture(i),) * 2) for i in range(COUNT)]
    return Made(_lines(folder / "obelics.jsonl", records), expected, ["--images", str(folder / "pictures")])


def mmc4(folder: Path) -> Made:
    _pictures(folder)
    found = [[{"image_name": f"{i}.jpg", "matched_text_index": 1, "raw_url": "http://x/y.jpg"}] for i in range(COUNT)]
    records = [{"text_list": ["One.", "Two."], "image_info": found[i], "url": "http://x"} for i in range(COUNT)]
    expected = [Expected((("assistant", "One. <image>Two."),), (picture(i),)) for i in range(COUNT)]
    return Made(_lines(folder / "mmc4.jsonl", records), expected, ["--images", str(folder / "pictures")])


def text_zst(folder: Path) -> Made:
    lines = "".join(json.dumps({"text": caption(i)}) + "\n" for i in range(COUNT)).encode()
    (folder / "text.jsonl.zst").write_bytes(pa.compress(lines, codec="zstd", asbytes=True))
    return Made(str(folder / "text.jsonl.zst"), [text(i) for i in range(COUNT)])


def text_gz(folder: Path) -> Made:
    lines = "".join(json.dumps({"text": caption(i)}) + "\n" for i in range(COUNT)).encode()
    (folder / "text.jsonl.gz").write_bytes(gzip.compress(lines))
    return Made(str(folder / "text.jsonl.gz"), [text(i) for i in range(COUNT)])


def class_folders(folder: Path) -> Made:
    for i in range(COUNT):
        (folder / "images" / f"n{i % 2}").mkdir(parents=True, exist_ok=True)
        (folder / "images" / f"n{i % 2}" / f"{i}.jpg").write_bytes(picture(i))
    (folder / "images" / "classes.txt").write_text("n0 tabby cat\nn1 dog\n")
    names = ["tabby cat", "dog"]
    order = [0, 2, 4, 1, 3, 5]
    return Made(
        str(folder / "images"),
        [Expected((("user", "<image>"), ("assistant", names[i % 2])), (picture(i),)) for i in order],
    )


def captioned_folder(folder: Path) -> Made:
    with open(_pictures(folder) / "metadata.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "text"])
        rows.writerows([f"{i}.jpg", caption(i)] for i in range(COUNT))
    return Made(str(folder / "pictures"), [pair(i) for i in range(COUNT)])


def video_folder(folder: Path) -> Made:
    for i in range(COUNT):
        (folder / "videos").mkdir(exist_ok=True)
        (folder / "videos" / f"{i}.mp4").write_bytes(clip(i))
        (folder / "videos" / f"{i}.txt").write_text(caption(i))
    return Made(str(folder / "videos"), [pair(i, "video") for i in range(COUNT)])


def tar_gz(folder: Path) -> Made:
    made = image_and_txt(folder)
    with tarfile.open(folder / "pairs.tar.gz", "w:gz") as packed, tarfile.open(made.source) as plain:
        for info in plain:
            packed.addfile(info, plain.extractfile(info))
    return Made(str(folder / "pairs.tar.gz"), made.expected)


KINDS: dict[str, Callable[[Path], Made]] = {
    each.__name__: each
    for each in (
        image_and_txt,
        img2dataset,
        image_and_json,
        images_alone,
        video_and_txt,
        text_lines,
        llava,
        sharegpt,
        openai,
        parquet,
        obelics,
        mmc4,
        text_zst,
        text_gz,
        class_folders,
        captioned_folder,
        video_folder,
        tar_gz,
    )
}
