"""Interleaved documents of OBELICS:  {"texts": ["...", null, "..."], "images": [null, "a.jpg", null]}

A document is one turn of the assistant: texts and pictures in their order, a line break between neighbouring texts.
"""

from tandem.data.formats.records.base import Conversation, Medium, RecordFormat, named
from tandem.data.media.turns import IMAGE, SampleError, escaped


class ObelicsFormat(RecordFormat):
    name = "obelics"
    what = '"texts" and "images" of equal length, one of the two null at each place'

    def fits(self, record: dict) -> bool:
        texts, images = record.get("texts"), record.get("images")
        return isinstance(texts, list) and isinstance(images, list) and all(_is_text(text) for text in texts)

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        texts, images = record.get("texts"), record.get("images")
        if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
            raise SampleError("bad document", 'it has no "texts" and "images" of equal length')
        said, media = "", []
        for text, image in zip(texts, images, strict=True):
            if (text is None) == (image is None):
                raise SampleError("bad document", "it has a place with both a text and an image, or with neither")
            if image is not None:
                media.append(Medium("image", image))
                said += IMAGE
            else:
                said += ("\n\n" if said and not said.endswith(IMAGE) else "") + escaped(text)
        return Conversation([{"role": "assistant", "text": said}], media, named(record))


def _is_text(text: object) -> bool:
    return text is None or isinstance(text, str)


FORMAT = ObelicsFormat()
