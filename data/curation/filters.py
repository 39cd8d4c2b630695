"""What makes one sample worth keeping: pure checks, each of which raises SampleError(reason, sentence) for a drop.

The text of a sample is what its assistant says (turns and streamed texts, placeholders removed): the caption of a
captioned image, the answer to a question. Lengths are in characters with runs of white space counted as one.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from urllib.parse import urlsplit

from tandem.data.curation.similar import MAX_DISTANCE
from tandem.data.media.image import MAX_PIXELS, ImageError, image_size
from tandem.data.media.turns import KIND_OF, SampleError, placeholders, split_marks


@dataclass(frozen=True)
class Rules:
    """Thresholds; samples on a threshold are kept. Raises ValueError on values that mean nothing."""

    min_side: int = 28  # pixels of an image's shorter side
    max_aspect: float = 5.0  # longer side over shorter side
    min_chars: int = 1
    max_chars: int | None = None
    near: int | None = 6  # bits of the perceptual hash; None keeps duplicates
    min_similarity: float = 0.2  # cosine of image and text, where there is a scorer
    blocked: tuple[str, ...] = ()  # hosts, or host/path prefixes, see read_block_list

    def __post_init__(self):
        least = {"min_side": 1, "max_aspect": 1, "min_chars": 0, "max_chars": self.min_chars}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in least and value is not None and not value >= least[field.name]:
                flag = "--" + field.name.replace("_", "-")
                raise ValueError(f"{flag} is {value}; it must be at least {least[field.name]}")
        if self.near is not None and not 0 <= self.near <= MAX_DISTANCE:
            raise ValueError(f"--near is {self.near}; it must lie between 0 and {MAX_DISTANCE} bits")
        if not -1 <= self.min_similarity <= 1:
            raise ValueError(f"--min-similarity is {self.min_similarity}; a cosine lies between -1 and 1")


def check_turns(content: dict, name: str) -> None:
    """The turns are as curation reads them. Raises SampleError."""
    turns = content["turns"]
    if not isinstance(turns, list) or not turns:
        raise SampleError("bad turns", f"{name} has no list of turns")
    spoken = [*turns, *(event for turn in turns if isinstance(turn, dict) for event in _events(turn))]
    if not all(isinstance(part, dict) and _is_text(part.get("text")) for part in spoken):
        raise SampleError("bad turns", f"{name} has a turn or a streamed text that is not an object with a text")


def assistant_text(content: dict) -> str:
    """What the assistant says, in one line. See the top of this file."""
    spoken = [part for turn in content["turns"] for part in (turn, *_events(turn)) if part.get("role") == "assistant"]
    return " ".join(" ".join(_without_placeholders(part["text"]) for part in spoken).split())


def _without_placeholders(text: str) -> str:
    return "".join(" " if is_mark and piece in KIND_OF else piece for is_mark, piece in split_marks(text))


def check_media(content: dict, kinds: Sequence[str], name: str) -> None:
    """Placeholders of the text and media of the sample agree, in order and kind."""
    wanted = [kind for turn in content["turns"] for kind in placeholders(turn["text"])]
    if wanted != list(kinds):
        sentence = (
            f"{name} names {len(wanted)} media in its text ({_list(wanted)}) and has {len(kinds)} ({_list(kinds)})"
        )
        raise SampleError("placeholder mismatch", sentence)


def check_text(text: str, rules: Rules, name: str) -> None:
    if len(text) < rules.min_chars:
        raise SampleError("text too short", f"{name} has {len(text)} characters; the least is {rules.min_chars}")
    if rules.max_chars is not None and len(text) > rules.max_chars:
        raise SampleError("text too long", f"{name} has {len(text)} characters; the most is {rules.max_chars}")


def check_url(content: dict, blocked: frozenset[str], name: str) -> None:
    """No "url" of the sample (a string or a list of them) is on the block list."""
    urls = content.get("url") or []
    for url in [urls] if isinstance(urls, str) else urls if isinstance(urls, list) else []:
        entry = blocking_entry(url, blocked) if blocked and isinstance(url, str) else None
        if entry is not None:
            raise SampleError("blocked URL", f"{name} comes from {url}, which {entry} blocks")


def check_image(data: bytes, rules: Rules, name: str) -> None:
    """Size and aspect ratio, from the header alone."""
    try:
        height, width = image_size(io.BytesIO(data), MAX_PIXELS)
    except ImageError as error:
        raise SampleError("unreadable image", f"{name}: {error}") from error
    short, long = sorted((height, width))
    if short < rules.min_side:
        raise SampleError("image too small", f"{name} is {width} x {height}; the least side is {rules.min_side}")
    if long > rules.max_aspect * short:
        sentence = f"{name} is {width} x {height}; the largest aspect ratio is {rules.max_aspect:g}"
        raise SampleError("extreme aspect ratio", sentence)


def read_block_list(path: str | Path) -> tuple[str, ...]:
    """Entries of a block list: one a line, `#` begins a comment. Raises ValueError.

    `example.com` blocks that host and every host below it; `example.com/ads/` blocks what begins so on that host.
    A scheme and `www.` before an entry do not count.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"block list {path} cannot be read: {error}") from error
    entries = {}
    for number, line in enumerate(lines, 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        host, path_part = _host_and_path(entry)
        if "." not in host or any(c.isspace() for c in entry):
            raise ValueError(f"line {number} of block list {path} is {entry!r}; it must be a host or host/path")
        entries[host + (path_part if path_part != "/" else "")] = None
    return tuple(entries)


def blocking_entry(url: str, blocked: frozenset[str]) -> str | None:
    """The entry that blocks this URL, or None. Work grows with the URL, not with the list."""
    host, path = _host_and_path(url)
    labels = host.split(".")
    for i in range(len(labels) - 1):
        if (entry := ".".join(labels[i:])) in blocked:
            return entry
    return next((host + path[:end] for end in range(1, len(path) + 1) if host + path[:end] in blocked), None)


def _host_and_path(url: str) -> tuple[str, str]:
    """("example.com", "/ads/x?y") of a URL with or without a scheme; ("", "") where there is no host."""
    try:
        parts = urlsplit(url if "://" in url else f"//{url}")
        host = (parts.hostname or "").removeprefix("www.").rstrip(".")
    except ValueError:
        return "", ""
    return host, parts.path + (f"?{parts.query}" if parts.query else "")


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= c <= "\udfff" for c in value)


def _events(turn: dict) -> list:
    events = turn.get("stream", [])
    return events if isinstance(events, list) else [events]


def _list(kinds: Sequence[str]) -> str:
    shown = ", ".join(kinds[:4]) + (", ..." if len(kinds) > 4 else "")
    return shown or "none"
