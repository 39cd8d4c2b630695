"""A picture or a video with a caption, with the name of its class, or alone:  {"image": "a.jpg", "caption": "a cat"}

`beside` is the path of a .txt or .json file with the caption, as the listing of a folder has it.
"""

import json
from pathlib import Path

from tandem.data.formats.records.base import (
    IMAGE_KEYS,
    VIDEO_KEYS,
    Conversation,
    RecordFormat,
    first_text,
    media_of,
    named,
)
from tandem.data.media.turns import SampleError, escaped

_CAPTIONS = ("caption", "text", "txt", "captions", "description", "alt_text", "TEXT", "title")
_LABELS = ("label", "class", "class_name", "category", "cls")
_BARE = {*IMAGE_KEYS, *VIDEO_KEYS, "id", "key", "url", "width", "height"}  # keys of which a picture alone may have some
_CONVERSED = ("conversations", "conversation", "messages", "texts", "text_list", "turns")


class PairsFormat(RecordFormat):
    name = "pairs"
    what = 'a file under "image", "file_name" or "video", and "caption", "text" or "label", or the file alone'
    aliases = ("captions", "images", "video")

    def fits(self, record: dict) -> bool:
        if any(isinstance(record.get(key), list) for key in _CONVERSED) or len(media_of(record)) != 1:
            return False
        return any(key in record for key in (*_CAPTIONS, *_LABELS, "beside")) or set(record) <= _BARE

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        media = media_of(record)
        if len(media) != 1:
            raise SampleError("not one medium", f"it names {len(media)} media where a pair has one")
        caption, label = self._caption(record), next((record[key] for key in _LABELS if key in record), None)
        more = named(record) | ({} if label is None else {"label": label})
        said = str(label) if caption is None and label is not None else caption
        turns = [{"role": "user", "text": f"<{media[0].kind}>" if prompt is None else prompt}]
        if said is not None:
            if not said.strip():
                raise SampleError("empty caption", "its caption is empty")
            turns.append({"role": "assistant", "text": escaped(said)})
        elif "caption" in record:
            raise SampleError("no caption", "it has no caption, where others have one")
        return Conversation(turns, media, more)

    def _caption(self, record: dict) -> str | None:
        if "beside" not in record:
            return first_text(record, _CAPTIONS)
        path = Path(record["beside"])
        try:
            text = path.read_bytes().decode("utf-8-sig")
            held = json.loads(text) if path.suffix.lower() == ".json" else None
        except UnicodeDecodeError as error:
            raise SampleError("not UTF-8", f"{path.name} is not UTF-8 (byte {error.start}); convert it") from error
        except (OSError, ValueError) as error:
            raise SampleError("unreadable caption", f"{path.name} cannot be read: {error}") from error
        if held is None:
            return text.strip()
        said = first_text(held, _CAPTIONS) if isinstance(held, dict) else None
        if said is None:
            raise SampleError("no caption", f"{path.name} has no text under {' or '.join(_CAPTIONS[:2])}")
        return said


FORMAT = PairsFormat()
