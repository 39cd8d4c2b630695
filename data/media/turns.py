"""The turns of a sample's json, checked: roles, texts with placeholders for media and tags for boxes, streams.

A backslash before a placeholder or box tag makes it text (`split_marks`).
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from tandem.data.media.encoding import RESERVED

ROLES = ("system", "user", "assistant")
IMAGE, VIDEO = "<image>", "<video>"  # placeholders
BOX_TAGS = ("<bbox>", "</bbox>")
KIND_OF = {IMAGE: "image", VIDEO: "video"}
# Of files, by the ends of their names in small letters.
KIND_OF_SUFFIX = dict.fromkeys((".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"), "image")
KIND_OF_SUFFIX |= dict.fromkeys((".mp4", ".mkv", ".webm", ".mov", ".avi"), "video")
MAX_SECONDS = 4_294_967  # of an event: milliseconds are kept in 32 bits

_MARKS = re.compile(r"(?<!\\)(\\*)(" + "|".join(re.escape(mark) for mark in (*KIND_OF, *BOX_TAGS)) + ")")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class SampleError(ValueError):
    """One sample is not usable; the message is one sentence. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


Piece = tuple[bool, str]  # whether it is a mark, a placeholder or box tag; and it


class Turn(NamedTuple):
    """pieces: its text, see `split_marks`.  stream: (time in ms, role, pieces)."""

    role: str
    pieces: list[Piece]
    stream: list[tuple[int, str, list[Piece]]]


def split_marks(text: str) -> list[Piece]:
    r"""(whether it is a mark, piece) of a text, in order; pieces of text are not empty.

    A mark behind an odd number of backslashes is text, and of these backslashes half remain: `\<image>` is the text
    "<image>", and `\\<image>` is a backslash and a placeholder. Elsewhere a backslash is a backslash.
    """
    if "<" not in text:
        return [(False, text)] if text else []
    pieces, plain, at = [], "", 0
    for match in _MARKS.finditer(text):
        backslashes, mark = len(match[1]), match[2]
        plain += text[at : match.start()] + "\\" * (backslashes // 2)
        at = match.end()
        if backslashes % 2:
            plain += mark
            continue
        pieces += [(False, plain)] * bool(plain) + [(True, mark)]
        plain = ""
    plain += text[at:]
    return pieces + [(False, plain)] * bool(plain)


def escaped(text: str) -> str:
    """The text that `split_marks` takes as this text, whatever marks it holds."""
    return _MARKS.sub(lambda match: "\\" * (2 * len(match[1]) + 1) + match[2], text)


def placeholders(text: str) -> list[str]:
    """Kinds of media ("image", "video") that a text has placeholders for, in order."""
    return [KIND_OF[mark] for mark in media_of(split_marks(text))]


def media_of(pieces: Sequence[Piece]) -> list[str]:
    """The placeholders among the pieces of a text."""
    return [piece for is_mark, piece in pieces if is_mark and piece in KIND_OF]


def check_text(value: object, what: str, reason: str) -> None:
    """Raises SampleError for what is no text."""
    if not isinstance(value, str):
        raise SampleError(reason, f"{what} that is not a string")
    if _LONE_SURROGATE.search(value):
        raise SampleError(reason, f"{what} with a lone surrogate, which is no character")


def checked_turns(turns: Sequence[dict], name: str) -> list[Turn]:
    """Each turn, its stream by time. Raises SampleError."""
    if not isinstance(turns, list) or not turns:
        raise SampleError("bad turns", f"{name} has no list of turns")
    checked = []
    for turn in turns:
        role, pieces = _checked_role_and_text(turn, f"{name} has a turn", "bad turns")
        stream = turn.get("stream", [])
        if not isinstance(stream, list):
            raise SampleError("bad stream", f'{name} has a "stream" that is not a list')
        if stream and (videos := pieces.count((True, VIDEO))) != 1:
            seen = f"a turn with a stream and {videos} {VIDEO} placeholders"
            raise SampleError("bad stream", f"{name} has {seen}; a stream belongs to exactly one video")
        entries = [_checked_entry(entry, name) for entry in stream]
        checked.append(Turn(role, pieces, sorted(entries, key=lambda entry: entry[0])))
    return checked


def _checked_role_and_text(item: object, what: str, reason: str) -> tuple[str, list[Piece]]:
    """Role and pieces."""
    if not isinstance(item, dict) or item.get("role") not in ROLES:
        raise SampleError(reason, f"{what} without a role out of {', '.join(ROLES)}")
    text: Any = item.get("text")
    check_text(text, f"{what} with a text", reason)
    assert isinstance(text, str), "checked"
    if RESERVED in text:
        raise SampleError(reason, f"{what} with a text that holds U+{ord(RESERVED):04X}, which is no character")
    return item["role"], split_marks(text)


def _checked_entry(entry: object, name: str) -> tuple[int, str, list[Piece]]:
    role, pieces = _checked_role_and_text(entry, f"{name} has a stream entry", "bad stream")
    time = entry["time"] if isinstance(entry, dict) and "time" in entry else None
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time <= MAX_SECONDS:
        raise SampleError("bad stream", f"{name} has a stream entry whose time is not a number of seconds from 0")
    if media_of(pieces):
        raise SampleError("bad stream", f"{name} has a placeholder in a stream entry; media belong into a turn's text")
    return int(time * 1000 + 0.5), role, pieces


def check_kinds(found: Sequence[str], kinds: Sequence[str], name: str) -> None:
    """Placeholders and media agree one by one, or SampleError."""
    if list(found) == list(kinds):
        return
    for mark, kind in KIND_OF.items():
        named, held = found.count(kind), list(kinds).count(kind)
        if named != held:
            message = f"{name} has {named} {mark} placeholders in its text but {held} {kind}s"
            raise SampleError("placeholder mismatch", message)
    first = next(i for i, (mark, kind) in enumerate(zip(found, kinds, strict=True)) if mark != kind)
    message = f"{name} has {kinds[first]} number {first} where its text has <{found[first]}>"
    raise SampleError("placeholder mismatch", message)
