"""Messages of OpenAI's API:  {"messages": [{"role": "user", "content": [{"type": "text", "text": "..."}, ...]}, ...]}

Tool calls become text as Qwen and Hermes write them: <tool_call>{"name": ..., "arguments": ...}</tool_call> in the turn
of the assistant, <tool_response>...</tool_response> in one of the user, and the tools in a turn of the system. Texts in
parts stand beside the images, so that <image> in them is text; a record that lists "images" has placeholders instead.
"""

import json
from typing import Any

from tandem.data.formats.records.base import (
    TOOLS,
    Conversation,
    Medium,
    RecordFormat,
    media_of,
    named,
    role_of,
    tool_answer,
)
from tandem.data.media.turns import SampleError, escaped

_MEDIA = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "video_url": "video",
    "input_video": "video",
    "video": "video",
}
_TEXTS = ("text", "input_text", "output_text", "refusal")
_LISTED = ("images", "image")


class OpenAIFormat(RecordFormat):
    name = "openai"
    what = '"messages" of {"role", "content"}, where content is a text or parts, among them "image_url"'
    aliases = ("messages",)

    def fits(self, record: dict) -> bool:
        return isinstance(record.get("messages"), list)

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        listed = media_of(record, _LISTED)
        turns, media = [], list(listed)
        if record.get("tools"):
            turns.append({"role": "system", "text": _tools(record["tools"])})
        for message in record["messages"]:
            if not isinstance(message, dict):
                raise SampleError("bad turn", f"it has a message that is a {type(message).__name__}, not an object")
            role = role_of(message.get("role"))
            text = self._text(message.get("content"), media, placeholders=bool(listed))
            text += "".join(_call(call) for call in message.get("tool_calls") or [])
            turns.append({"role": role, "text": tool_answer(text) if message["role"] in TOOLS else text})
        if not record["messages"]:
            raise SampleError("no turn", "it has no message")
        return Conversation(turns, media, named(record))

    def _text(self, content: object, media: list[Medium], placeholders: bool) -> str:
        """The text of a message; appends its media."""
        if content is None:
            return ""
        if isinstance(content, str):
            return content if placeholders else escaped(content)
        if not isinstance(content, list):
            raise SampleError("bad turn", f"it has a content that is a {type(content).__name__}, not a text or parts")
        texts = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(part, str) or kind in _TEXTS:
                text = part if isinstance(part, str) else part.get(kind, part.get("text"))
                if not isinstance(text, str):
                    raise SampleError("bad turn", f'it has a part of type "{kind}" without a text')
                texts.append(text if placeholders else escaped(text))
            elif kind in _MEDIA:
                source = part.get(kind, part.get("image_url", part.get("path")))
                source = source.get("url") if isinstance(source, dict) and "url" in source else source
                if not placeholders:
                    media.append(Medium(_MEDIA[kind], source))
                texts.append(f"<{_MEDIA[kind]}>")
            else:
                raise SampleError("unknown part", f"it has a part of type {kind!r}; known are text and image_url")
        return "".join(texts)


def _call(call: Any) -> str:
    """A tool call as text."""
    try:
        function = call.get("function", call)
        arguments = function["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        said = json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SampleError("bad tool call", f"it has a tool call that cannot be read: {error!r}") from error
    return escaped(f"\n<tool_call>\n{said}\n</tool_call>")


def _tools(tools: object) -> str:
    tools = tools if isinstance(tools, list) else [tools]
    lines = [tool if isinstance(tool, str) else json.dumps(tool, ensure_ascii=False) for tool in tools]
    return escaped("\n".join(["# Tools", "<tools>", *lines, "</tools>"]))


FORMAT = OpenAIFormat()
