"""Questions and answers of The Cauldron:  {"images": [...], "texts": [{"user": "...", "assistant": "..."}, ...]}

The pictures stand before the first question.
"""

from tandem.data.formats.records.base import Conversation, RecordFormat, media_of, named
from tandem.data.media.turns import SampleError, escaped


class CauldronFormat(RecordFormat):
    name = "cauldron"
    what = '"texts" of {"user", "assistant"}, and "images"'

    def fits(self, record: dict) -> bool:
        texts = record.get("texts")
        return isinstance(texts, list) and bool(texts) and all(isinstance(text, dict) for text in texts)

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        media, turns = media_of(record), []
        for text in record["texts"]:
            if not isinstance(text.get("user"), str) or not isinstance(text.get("assistant"), str):
                raise SampleError("bad turn", 'it has a pair of texts without "user" or "assistant"')
            turns += [{"role": role, "text": escaped(text[role])} for role in ("user", "assistant")]
        turns[0]["text"] = "".join(f"<{medium.kind}>" for medium in media) + turns[0]["text"]
        return Conversation(turns, media, named(record))


FORMAT = CauldronFormat()
