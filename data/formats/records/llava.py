"""LLaVA and ShareGPT:  {"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>..."}, ...]}"""

from typing import Any

from tandem.data.formats.records.base import TOOLS, Conversation, RecordFormat, media_of, named, role_of, tool_answer
from tandem.data.media.turns import SampleError


class LlavaFormat(RecordFormat):
    name = "llava"
    what = (
        '"conversations" of {"from", "value"}, with "image", "images" or "video" where the text has <image> or <video>'
    )
    aliases = ("sharegpt",)

    def fits(self, record: dict) -> bool:
        return isinstance(_turns(record), list)

    def conversation(self, record: dict, prompt: str | None) -> Conversation:
        turns = []
        if isinstance(record.get("system"), str) and record["system"]:
            turns.append({"role": "system", "text": record["system"]})
        for turn in _turns(record):
            if not isinstance(turn, dict):
                raise SampleError("bad turn", f"it has a turn that is a {type(turn).__name__}, not an object")
            said = str(turn.get("from", turn.get("role")))
            text = turn.get("value", turn.get("content"))
            if not isinstance(text, str):
                raise SampleError("bad turn", 'it has a turn without a text under "value"')
            role = role_of(said)
            turns.append({"role": role, "text": tool_answer(text) if said.lower() in TOOLS else text})
        if not turns:
            raise SampleError("no turn", "it has an empty conversation")
        return Conversation(turns, media_of(record), named(record))


def _turns(record: dict) -> Any:
    return record.get("conversations", record.get("conversation"))


FORMAT = LlavaFormat()
