"""Conversations:  KEY.json with "turns", and its media KEY.0.jpg, KEY.1.mp4, ... or KEY.jpg where there is one."""

from collections.abc import Sequence

from tandem.data.formats.in_place.base import Entry, Format, Text, parsed
from tandem.data.media.text import parse_sample
from tandem.data.media.turns import SampleError
from tandem.data.shards.tars import Sample


class TurnsFormat(Format):
    name = "turns"
    members = 'a sample is KEY.json with "turns" and media KEY.0.jpg, KEY.1.mp4, ...'
    kinds = frozenset({"json", "image", "video"})
    medium = None

    def fits(self, sample: Sample) -> bool:
        fields = next(map(parsed, sample.of_kind("json")), None)
        return isinstance(fields, dict) and "turns" in fields

    def entries(self, sample: Sample) -> list[Entry]:
        json = next(iter(sample.of_kind("json")), None)
        if json is None:
            raise SampleError("no json", f"{sample.name} has no .json member")
        name = sample.name
        if not sample.media and sample.unnumbered:
            ignored = ", ".join(f".{member.rest}" for member in sample.unnumbered)
            name += f" (its media {ignored} have no number, as in KEY.0.jpg)"
        return [Entry(name, Text(json.offset, json.taken, plain=False), sample.media)]

    def content(self, data: bytes, plain: bool, kinds: Sequence[str], prompt: str | None, name: str) -> dict:
        return parse_sample(data, name)


FORMAT = TurnsFormat()
