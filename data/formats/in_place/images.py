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
    matches_incomplete = True

    def fits(self, sample: Sample) -> bool:
        values = map(parsed, sample.of_kind("json"))
        without_text = not sample.of_kind("text", "lines") and all(
            isinstance(value, dict) and "turns" not in value and not self._key(value) for value in values
        )
        return {medium.kind for medium in sample.media} == {"image"} and without_text

    def entries(self, sample: Sample) -> list[Entry]:
        if {member.kind for member in sample.media} != {"image"}:
            raise SampleError("not one image", f"{sample.name} has {named(sample)}; {self.members}")
        return [Entry(sample.name, None, sample.media)]

    def content(self, data: bytes, plain: bool, kinds: Sequence[str], prompt: str | None, name: str) -> dict:
        return sample_content({"turns": [{"role": "user", "text": IMAGE * len(kinds)}]}, name)


FORMAT = ImagesFormat()
