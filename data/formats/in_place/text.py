"""Texts without media:  KEY.txt, KEY.json with "text" or "content", or KEY.jsonl with such an object in each line."""

from tandem.data.formats.in_place.base import Entry, Format, Text, all_media
from tandem.data.shards.tars import Sample


class TextFormat(Format):
    name = "text"
    members = 'a sample is KEY.txt, or KEY.json with "text", or a line of KEY.jsonl'
    kinds = frozenset({"text", "json", "lines"})
    medium = None
    matches_incomplete = True
    keys = ("text", "content")

    def fits(self, sample: Sample) -> bool:
        return not all_media(sample) and (bool(sample.of_kind("lines")) or self._has_text(sample))

    def entries(self, sample: Sample) -> list[Entry]:
        lines = sample.of_kind("lines")
        if not lines:
            return super().entries(sample)
        found, offset = [], lines[0].offset
        for number, line in enumerate(lines[0].taken.splitlines(keepends=True), 1):
            if line.strip():
                found.append(Entry(f"{sample.name}, line {number}", Text(offset, line, plain=False), []))
            offset += len(line)
        return found


FORMAT = TextFormat()
