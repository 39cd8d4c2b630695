"""Text alone:  {"text": "..."}"""

from tandem.data.formats.records.base import Conversation, RecordFormat, first_text, media_of, named
from tandem.data.media.turns import SampleError, escaped

_KEYS = ("text", "content", "raw_content", "document")


class TextFormat(RecordFormat):
    name = "text"
    what = '"text" or "content", and no medium'

    def fits(self, record: dict) -> bool:
        return any(isinstance(record.get(key), str) for key in _KEYS) and not media_of(record)

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        text = first_text(record, _KEYS)
        if text is None or not text.strip():
            raise SampleError("no text", f"it has no text under {' or '.join(_KEYS)}")
        return Conversation([{"role": "assistant", "text": escaped(text)}], [], named(record))


FORMAT = TextFormat()
