"""A record and the conversation that a format makes of it.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>What is this?"}, ...]}
      -->  turns [{"role": "user", "text": "<image>What is this?"}, ...],  media [Medium("image", "a.jpg")]

The formats exclude each other: a record fits at most one of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from tandem.data.media.turns import KIND_OF_SUFFIX, SampleError

VIDEO_KEYS = ("video", "videos")
IMAGE_KEYS = ("image", "images", "img", "image_path", "file_name", "filename", "file", "jpg", "png")
ROLES = {  # of other formats
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "tool": "user",
    "function": "user",
    "observation": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
}
TOOLS = ("tool", "function", "observation")  # roles whose text is the answer of a tool


@dataclass(frozen=True)
class Medium:
    """An image or a video: a path, a URL, a data URL, bytes, or {"bytes": ..., "path": ...} of a parquet file."""

    kind: str
    source: object


@dataclass(frozen=True)
class Conversation:
    """Turns, the media of their placeholders in order, and further keys of the sample's json."""

    turns: list[dict]
    media: list[Medium] = field(default_factory=list)
    more: dict = field(default_factory=dict)


class RecordFormat:
    """One format. name: of the module.  what: a record of it, for messages."""

    name: str
    what: str
    aliases: tuple[str, ...] = ()

    def fits(self, record: dict) -> bool:
        raise NotImplementedError

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        """prompt: what the user says of a picture or video that has a caption; None for the placeholder alone.

        Raises SampleError.
        """
        raise NotImplementedError


def media_of(record: dict, image_keys: Sequence[str] = IMAGE_KEYS) -> list[Medium]:
    """The media that a record names by itself: under the first key that holds some, images before videos."""
    found: list[Medium] = []
    for kind, keys in (("image", image_keys), ("video", VIDEO_KEYS)):
        values: object = next((record[key] for key in keys if record.get(key) not in (None, "", [])), [])
        found += [Medium(kind_of(value, kind), value) for value in (values if isinstance(values, list) else [values])]
    return found


def kind_of(value: object, kind: str) -> str:
    """The kind of a medium: that of its file's name where that is one of a video, else `kind`."""
    name = value.get("path") if isinstance(value, dict) else value
    suffix = f".{name.rpartition('.')[2].lower()}" if isinstance(name, str) else ""
    return "video" if KIND_OF_SUFFIX.get(suffix) == "video" else kind


def role_of(value: object) -> str:
    """Our role for a role of another format. Raises SampleError for one that is not known."""
    role = ROLES.get(value.lower()) if isinstance(value, str) else None
    if role is None:
        raise SampleError("unknown role", f"it has a turn of the role {value!r}; known are {', '.join(ROLES)}")
    return role


def first_text(record: dict, keys: Sequence[str]) -> str | None:
    """The text under the first of these keys that holds one; the first of several."""
    for key in keys:
        value = record.get(key)
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str):
            return value
    return None


def tool_answer(text: str) -> str:
    """What a tool answered, as Qwen and Hermes write it into a turn of the user."""
    return f"<tool_response>\n{text}\n</tool_response>"


def named(record: dict) -> dict:
    """Keys of a record that stay with its sample."""
    kept = {key: record[key] for key in ("id", "url", "domain", "entity") if isinstance(record.get(key), str | int)}
    return {key: value if key == "id" else str(value) for key, value in kept.items()}
