"""Documents of MMC4:  {"text_list": ["...", ...], "image_info": [{"image_name": ..., "matched_text_index": 0}, ...]}

A document is one turn of the assistant, in which each picture stands before the sentence that it matches.
"""

from tandem.data.formats.records.base import Conversation, Medium, RecordFormat, named
from tandem.data.media.turns import IMAGE, SampleError, escaped


class Mmc4Format(RecordFormat):
    name = "mmc4"
    what = '"text_list" and "image_info" with "image_name" and "matched_text_index"'

    def fits(self, record: dict) -> bool:
        return isinstance(record.get("text_list"), list) and isinstance(record.get("image_info"), list)

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        texts = record["text_list"]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise SampleError("bad document", 'its "text_list" is not a list of texts')
        before: dict[int, list[Medium]] = {}
        for image in record["image_info"]:
            place = image.get("matched_text_index") if isinstance(image, dict) else None
            if not isinstance(place, int) or not 0 <= place < len(texts):
                raise SampleError("bad document", f"it has an image at sentence {place!r} of {len(texts)}")
            source = image.get("image_name") or image.get("image") or image.get("raw_url")
            before.setdefault(place, []).append(Medium("image", source))
        said = [IMAGE * len(before.get(place, [])) + escaped(text) for place, text in enumerate(texts)]
        media = [medium for place in sorted(before) for medium in before[place]]
        return Conversation([{"role": "assistant", "text": " ".join(said)}], media, named(record))


FORMAT = Mmc4Format()
