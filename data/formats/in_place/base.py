"""Formats of shards: which members of a sample are text and media, and which conversation they form.

    members of one key  --entries-->  offsets of text and media  (indexing)
    bytes of the text   --content-->  {"turns": ..., "domain": ..., "entity": ...}   (indexing and reading)

The formats exclude each other: a sample fits at most one of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from tandem.data.media.text import load_json, sample_content
from tandem.data.media.turns import SampleError, escaped, placeholders
from tandem.data.shards.tars import Member, Sample


@dataclass(frozen=True)
class Text:
    """The bytes of a text and their offset in the shard. plain: whether they are plain text, not JSON."""

    offset: int
    data: bytes
    plain: bool


@dataclass(frozen=True)
class Entry:
    """One sample for the index. `name` names it in messages."""

    name: str
    text: Text | None
    media: Sequence[Member]


class Format:
    """A format. Default: one medium with one text; subclasses override the rest.

    name: name of the module.  members: the members of a sample, described for messages.  kinds: kinds of the members
    that it uses (tars.MAX_BYTES).  medium: kind of its only medium, None if it has none.  keys: keys of the text in a
    JSON member, tried in order.  matches_incomplete: True if a sample of another format that lacks a member also fits
    this one, as a pair without its caption fits `images`.
    """

    name: str
    members: str
    kinds: frozenset[str]
    medium: str | None
    keys: tuple[str, ...] = ("caption", "text")
    matches_incomplete = False

    def fits(self, sample: Sample) -> bool:
        """Return whether the members fit this format.

        Requires `Member.taken` to hold the bytes of each text and JSON member.
        """
        kinds = [medium.kind for medium in all_media(sample)]
        return kinds == [self.medium] * (self.medium is not None) and self._has_text(sample)

    def entries(self, sample: Sample) -> list[Entry]:
        """Return the samples of one key, usually one. Raises SampleError."""
        text = next(iter(sample.of_kind("text", "json")), None)
        if text is None:
            raise SampleError("no text", f"{sample.name} has neither a .txt nor a .json member")
        media = all_media(sample) if self.medium else []
        if [medium.kind for medium in media] != [self.medium] * (self.medium is not None):
            raise SampleError(f"not one {self.medium}", f"{sample.name} has {named(sample)}; {self.members}")
        return [Entry(sample.name, Text(text.offset, text.taken, text.kind == "text"), media)]

    def content(self, data: bytes, plain: bool, kinds: Sequence[str], prompt: str | None, name: str) -> dict:
        """Return turns, domain and entity of a sample, from the bytes of its text and the kinds of its media.

        prompt: the user's turn, None for the placeholder alone. Raises SampleError, naming the sample `name`.
        """
        fields, text = ({}, decoded(data, name)) if plain else self._found(load_json(data, name), name)
        if not text.strip():
            raise SampleError("no text", f"{name} has an empty text")
        return sample_content(fields | {"turns": self.turns(escaped(text), prompt)}, name)

    def turns(self, text: str, prompt: str | None) -> list[dict]:
        """Return the conversation that trains `text`, in which placeholders and box tags are escaped."""
        answer = {"role": "assistant", "text": text}
        if self.medium is None:
            return [answer]
        return [{"role": "user", "text": f"<{self.medium}>" if prompt is None else prompt}, answer]

    def check_prompt(self, prompt: str | None) -> None:
        """Raise ValueError if this format cannot have the prompt."""
        if prompt is None:
            return
        if self.medium is None:
            raise ValueError(f"--prompt is {prompt!r}, but samples of format {self.name} have no prompt; leave it out")
        if (found := placeholders(prompt)) != [self.medium]:
            has = f"{len(found)} placeholders" if len(found) != 1 else f"<{found[0]}>"
            raise ValueError(f"--prompt is {prompt!r} with {has}; format {self.name} needs one <{self.medium}>")

    def _has_text(self, sample: Sample) -> bool:
        texts = sample.of_kind("text")
        return bool(texts) or any(self._key(parsed(member)) for member in sample.of_kind("json"))

    def _key(self, fields: object) -> str | None:
        if not isinstance(fields, dict) or "turns" in fields:
            return None
        return next((key for key in self.keys if isinstance(fields.get(key), str)), None)

    def _found(self, fields: object, name: str) -> tuple[dict, str]:
        """(fields of a JSON member, its text). Raises SampleError."""
        key = self._key(fields)
        if key is None or not isinstance(fields, dict):
            raise SampleError("no text", f"{name} has a json member without a text under {' or '.join(self.keys)}")
        return fields, fields[key]


def all_media(sample: Sample) -> list[Member]:
    """The media of a sample, numbered and unnumbered."""
    return [*sample.numbered.values(), *sample.unnumbered]


def parsed(member: Member) -> object:
    """Return the JSON value of a member, None if it is damaged."""
    try:
        return json.loads(member.taken)
    except (ValueError, RecursionError, TypeError):
        return None


def decoded(data: bytes, name: str) -> str:
    """Decode UTF-8, with or without a byte order mark. Raises SampleError for another encoding."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        sentence = f"{name} has a text that is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        raise SampleError("not UTF-8", sentence) from error


def named(sample: Sample) -> str:
    """The members of a sample by the ends of their names, for messages."""
    return ", ".join(f".{rest}" for rest in list(sample.members)[:6]) or "no member"
