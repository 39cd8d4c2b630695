"""What a format of shards is: which members of a sample are its text and its media, and what is said with them.

    members of one key  --entries-->  where text and media lie   (indexing)
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
    """The bytes of a text and where they lie in the shard. plain: text itself, where others are JSON."""

    offset: int
    data: bytes
    plain: bool


@dataclass(frozen=True)
class Entry:
    """One sample for the index. `name` is how messages call it."""

    name: str
    text: Text | None
    media: Sequence[Member]


class Format:
    """Bare media with one text beside them; a format that is more overrides what differs.

    name: of the module.  members: what a sample consists of, for messages.  kinds: of the members that it uses
    (tars.MAX_BYTES).  medium: the kind of its only medium, None for none.  keys: of a JSON text, the first that is
    there counts.  lacking: a sample of another format that lacks a member fits this one.
    """

    name: str
    members: str
    kinds: frozenset[str]
    medium: str | None
    keys: tuple[str, ...] = ("caption", "text")
    lacking = False

    def fits(self, sample: Sample) -> bool:
        """Whether a sample has these members. `taken` of its members of texts must be their bytes."""
        kinds = [medium.kind for medium in all_media(sample)]
        return kinds == [self.medium] * (self.medium is not None) and self._has_text(sample)

    def entries(self, sample: Sample) -> list[Entry]:
        """The samples of one key, most often one. Raises SampleError."""
        text = next(iter(sample.of_kind("text", "json")), None)
        if text is None:
            raise SampleError("no text", f"{sample.name} has neither a .txt nor a .json member")
        media = all_media(sample) if self.medium else []
        if [medium.kind for medium in media] != [self.medium] * (self.medium is not None):
            raise SampleError(f"not one {self.medium}", f"{sample.name} has {named(sample)}; {self.members}")
        return [Entry(sample.name, Text(text.offset, text.taken, text.kind == "text"), media)]

    def content(self, data: bytes, plain: bool, kinds: Sequence[str], prompt: str | None, name: str) -> dict:
        """Turns, domain and entity of a sample, from the bytes of its text and the kinds of its media.

        prompt: the turn of the user, None for the placeholder alone. Raises SampleError, calling the sample `name`.
        """
        held, text = ({}, decoded(data, name)) if plain else self._found(load_json(data, name), name)
        if not text.strip():
            raise SampleError("no text", f"{name} has an empty text")
        return sample_content(held | {"turns": self.turns(escaped(text), prompt)}, name)

    def turns(self, text: str, prompt: str | None) -> list[dict]:
        """The conversation around a text whose marks are escaped."""
        said = [{"role": "assistant", "text": text}]
        if self.medium is None:
            return said
        return [{"role": "user", "text": f"<{self.medium}>" if prompt is None else prompt}, *said]

    def check_prompt(self, prompt: str | None) -> None:
        """Raises ValueError for a prompt that this format cannot have."""
        if prompt is None:
            return
        if self.medium is None:
            raise ValueError(f"--prompt is {prompt!r}, but samples of format {self.name} have no prompt; leave it out")
        if (found := placeholders(prompt)) != [self.medium]:
            seen = f"{len(found)} placeholders" if len(found) != 1 else f"<{found[0]}>"
            raise ValueError(f"--prompt is {prompt!r} with {seen}; format {self.name} needs one <{self.medium}>")

    def _has_text(self, sample: Sample) -> bool:
        texts = sample.of_kind("text")
        return bool(texts) or any(self._key(parsed(member)) for member in sample.of_kind("json"))

    def _key(self, held: object) -> str | None:
        if not isinstance(held, dict) or "turns" in held:
            return None
        return next((key for key in self.keys if isinstance(held.get(key), str)), None)

    def _found(self, held: object, name: str) -> tuple[dict, str]:
        """(what a JSON holds, the text in it). Raises SampleError."""
        key = self._key(held)
        if key is None or not isinstance(held, dict):
            raise SampleError("no text", f"{name} has a json member without a text under {' or '.join(self.keys)}")
        return held, held[key]


def all_media(sample: Sample) -> list[Member]:
    """The media of a sample, with numbers and without."""
    return [*sample.numbered.values(), *sample.unnumbered]


def parsed(member: Member) -> object:
    """What a json member holds, None where it is damaged."""
    try:
        return json.loads(member.taken)
    except (ValueError, RecursionError, TypeError):
        return None


def decoded(data: bytes, name: str) -> str:
    """UTF-8 text, with or without a byte order mark. Raises SampleError for another encoding."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        sentence = f"{name} has a text that is not UTF-8 (byte {error.start}); convert it, for example with iconv"
        raise SampleError("not UTF-8", sentence) from error


def named(sample: Sample) -> str:
    """The members of a sample by the ends of their names, for messages."""
    return ", ".join(f".{rest}" for rest in list(sample.members)[:6]) or "no member"
