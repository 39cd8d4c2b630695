"""Images without text, for an encoder alone:  KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ..."""

from collections.abc import Sequence

from tandem.data.formats.in_place.base import Entry, Format, named, parsed
from tandem.data.media.text import sample_content
from tandem.data.media.turns import IMAGE, SampleError
from tandem.data.shards.tars import Sample


class ImagesFormat(Format):
    name = "images"
    members = "a sample is one image KEY.jpg, or several, KEY.0.jpg, KEY.1.jpg, ..."
    kinds = frozenset({"image"})
    medium = None
    lacking = True

    def fits(self, sample: Sample) -> bool:
        held = list(map(parsed, sample.of_kind("json")))
        silent = all(isinstance(json, dict) and "turns" not in json and not self._key(json) for json in held)
        return {medium.kind for medium in sample.media} == {"image"} and silent and not sample.of_kind("text", "lines")

    def entries(self, sample: Sample) -> list[Entry]:
        if {member.kind for member in sample.media} != {"image"}:
            raise SampleError("not one image", f"{sample.name} has {named(sample)}; {self.members}")
        return [Entry(sample.name, None, sample.media)]

    def content(self, data: bytes, plain: bool, kinds: Sequence[str], prompt: str | None, name: str) -> dict:
        return sample_content({"turns": [{"role": "user", "text": IMAGE * len(kinds)}]}, name)


FORMAT = ImagesFormat()
