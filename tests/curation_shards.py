"""Shards with known defects, for the tests of curation."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from tests.support import write_tar


def picture(number: int, height: int = 96, width: int = 128) -> Image.Image:
    """A smooth random picture: unlike those of other numbers, and itself under scaling and recompression."""
    pixels = np.random.default_rng(number).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def content(text: str = "A picture.", images: int = 1, **more) -> bytes:
    turns = [{"role": "user", "text": "<image>" * images + "What is it?"}, {"role": "assistant", "text": text}]
    return json.dumps({"turns": turns, **more}).encode()


def pair(key: str, image: bytes, text: str = "A picture.", **more) -> list[tuple[str, bytes]]:
    """Members of a sample of one image."""
    return [(f"{key}.json", content(text, **more)), (f"{key}.0.png", image)]


def defective_shards(folder: Path) -> tuple[list[str], dict[str, str | None]]:
    """Three shards and, for every key, why the default rules drop it or None; `spam.example.com` is to be blocked."""
    fine = encoded(picture(0))
    resized = picture(1).resize((90, 68), Image.Resampling.LANCZOS)
    first = [
        *pair("fine", fine),
        *pair("original", encoded(picture(1))),
        *pair("tiny", encoded(picture(2, 27, 40))),
        *pair("strip", encoded(picture(3, 40, 201))),
        *pair("mute", encoded(picture(4)), text=" \n"),
        *pair("spam", encoded(picture(5)), url="https://www.cdn.spam.example.com/a.png"),
        *pair("welcome", encoded(picture(6)), url="https://example.com/a.png"),
        *pair("garbled", fine[:40]),
        ("broken.json", b'{"turns": '),
        ("alone.0.png", encoded(picture(7))),
        ("words.json", content("Only words.", images=0)),
    ]
    second = [
        *pair("again", fine),
        *pair("copy", encoded(resized, "JPEG", quality=70)),
        ("mixed.json", content(images=2)),
        ("mixed.0.png", fine),
        ("mixed.1.png", encoded(picture(8))),
        ("both.json", content(images=2)),
        ("both.0.png", encoded(picture(8))),
        ("both.1.png", fine),
        ("film.json", b'{"turns": [{"role": "user", "text": "<video>"}, {"role": "assistant", "text": "A film."}]}'),
        ("film.0.mp4", b"not looked into"),
        ("film2.json", b'{"turns": [{"role": "user", "text": "<video>"}, {"role": "assistant", "text": "Again."}]}'),
        ("film2.0.mp4", b"not looked into"),
        ("missing.json", content(images=2)),
        ("missing.0.png", encoded(picture(9))),
    ]
    third = [member for i in range(3) for member in pair(f"more{i}", encoded(picture(20 + i)))]
    shards = [write_tar(folder / f"s-{i}.tar", members) for i, members in enumerate((first, second, third))]
    with tarfile.open(shards[2]) as tar, open(shards[2], "r+b") as file:
        file.truncate(tar.getmember("more2.0.png").offset_data + 100)
    dropped = {
        "tiny": "image too small",
        "strip": "extreme aspect ratio",
        "mute": "text too short",
        "spam": "blocked URL",
        "garbled": "unreadable image",
        "broken": "bad json",
        "alone": "text too short",
        "again": "exact duplicate",
        "copy": "near duplicate",
        "both": "exact duplicate",
        "film2": "exact duplicate",
        "missing": "placeholder mismatch",
        "more2": "cut off by the end of the shard",
    }
    kept = ["fine", "original", "welcome", "words", "mixed", "film", "more0", "more1"]
    return shards, dropped | dict.fromkeys(kept)
