"""A conversation as its chat template (Jinja) writes it, and which characters of that each turn said.

    template of     [{"role": "user", "content": "(0 Hi 0)"}, {"role": "assistant", "content": "(1 Ho 1)"}]
    becomes         "<|im_start|>user\\n(0 Hi 0)<|im_end|>\\n<|im_start|>assistant\\n(1 Ho 1)<|im_end|>\\n"

(0 and 0) are lone surrogates, which no text holds. They show where a text has gone; without them the string must be
what the template makes of the bare texts. A template may strip a text, or leave out its first or last part, as Qwen3
does with the thoughts of earlier turns: one of the two signs is then gone, and the text is what stands before or behind
the other.

Templates are rendered as transformers renders them (utils/chat_template_utils.py), in a sandbox.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tandem.data.media.turns import BOX_TAGS, IMAGE, KIND_OF, VIDEO, Piece

_START, _END = "\ud800", "\ud801"
_PLACE = dict(zip((IMAGE, VIDEO, *BOX_TAGS), "\ud802\ud803\ud804\ud805", strict=True))
_HELD_BY = {place: name for name, place in _PLACE.items()}
_SIGN = re.compile("[\ud800\ud801][\udc00-\udfff]{2}|[\ud802-\ud805]")

Turn = tuple[str, list[Piece]]  # role, and its text


class ChatError(ValueError):
    """The template cannot write a conversation, or not so that its texts can be found; the message is a predicate."""


@dataclass(frozen=True)
class Segment:
    """A run of the written conversation.  turn: whose text it is, None for the template's own.  spelled: holds special
    tokens by their names, which the text of a turn (False) cannot."""

    text: str
    turn: int | None
    spelled: bool


@dataclass
class _Run:
    """Text of a turn between its media.  alone: there are none."""

    turn: int
    alone: bool
    pieces: list[Piece]


@dataclass
class _Written:
    """What the template wrote, without signs.  begin, end: of runs, by their signs.  inner: places of box tags."""

    text: str
    begin: dict[int, int]
    end: dict[int, int]
    inner: list[tuple[int, int]]


class ChatTemplate:
    """One template, and all that it is given besides the conversation.

    spelled: what stands for placeholders and box tags.  date: what strftime_now knows as today.  image: the token
    that a template must write for an image of its own accord, to get images as parts of a message and not in its text.
    Raises ChatError for a template that cannot be compiled or that loses a turn of the user or the assistant.
    """

    def __init__(self, source: str, spelled: Mapping[str, str], image: str, given: Mapping[str, Any], date: str | None):
        self.spelled, self._given = dict(spelled), dict(given)
        try:
            self._template = _environment(_clock(date)).from_string(source)
        except jinja2.TemplateError as error:
            raise ChatError(f"cannot be compiled: {error}") from error
        self.parts: frozenset[str] = frozenset()  # roles whose messages have parts
        self._choose_parts(image)
        self.probe = list(self.segments([_say("user"), _say("assistant")] * 2))
        try:
            list(self.segments([_say("system"), _say("user"), _say("assistant")]))
        except LostTurnError:
            raise
        except ChatError:  # it refuses a system's turn itself, and such samples one by one
            pass

    def _choose_parts(self, image: str) -> None:
        """Which roles' messages are lists of parts: those of a template that writes the image's token for one."""
        asked: list[Turn] = [("user", [(True, IMAGE), (False, "Q0")]), _say("assistant")]
        for parts in (("system", "user", "assistant"), ("user", "assistant"), ("user",)):
            self.parts = frozenset(parts)
            try:
                turns: list[Turn] = [_say("system")] * ("system" in parts) + asked
                if sum(segment.text.count(image) for segment in self.segments(turns)) == 1:
                    return
            except ChatError:
                pass
        self.parts = frozenset()

    def render(self, turns: Sequence[Turn]) -> str:
        """The conversation as transformers would write it."""
        return self._write(self._messages(turns, self.spelled))

    def segments(self, turns: Sequence[Turn]) -> Iterator[Segment]:
        """What `render` gives, in segments.  Raises ChatError, LostTurnError among them."""
        plain = self.render(turns)
        runs = list(_runs(turns))
        for signs in (_START + _END, _END, _START):  # a template may look at how a text begins or ends
            written = _read(self._write(self._signed(turns, runs, signs)), self.spelled)
            if written.text == plain:
                break
        else:
            raise ChatError("writes its turns so that their texts cannot be found again")
        return _cut(written, self._places(written, turns, runs))

    def _places(self, written: _Written, turns: Sequence[Turn], runs: list[_Run]) -> list[tuple[int, int, int]]:
        """(begin, end, turn) of every run, in order of places."""
        found = []
        for number, run in enumerate(runs):
            text = _joined(run.pieces, self.spelled)
            before, core, behind = _stripped(text, run.alone)
            if before and not core:
                continue
            begin, end = written.begin.get(number), written.end.get(number)
            if begin is None and end is not None:  # the last of it is left
                left = core[len(core) - _shared(written.text[:end][::-1], core[::-1]) :]
                begin = end - len(left.lstrip())
            elif end is None and begin is not None:
                end = begin + len(core[: _shared(written.text[begin:], core)].rstrip())
            if begin is None or end is None or (core and begin == end):
                raise LostTurnError(f"leaves out a turn of the {turns[run.turn][0]}")
            begin -= len(before) * (written.text[:begin].endswith(before))
            end += len(behind) * (written.text[end:].startswith(behind))
            found.append((begin, end, run.turn))
        return sorted(found)

    # ---- messages

    def _messages(self, turns: Sequence[Turn], spelled: Mapping[str, str]) -> list[dict]:
        messages: list[dict] = []
        for role, pieces in turns:
            if role not in self.parts:
                messages.append({"role": role, "content": _joined(pieces, spelled)})
                continue
            parts: list[dict] = []
            for is_mark, piece in pieces or [(False, "")]:
                if is_mark and piece in KIND_OF:
                    parts.append({"type": KIND_OF[piece]})
                elif parts and parts[-1]["type"] == "text":
                    parts[-1]["text"] += _joined([(is_mark, piece)], spelled)
                else:
                    parts.append({"type": "text", "text": _joined([(is_mark, piece)], spelled)})
            messages.append({"role": role, "content": parts})
        return messages

    def _signed(self, turns: Sequence[Turn], runs: list[_Run], signs: str) -> list[dict]:
        """The messages with `signs` around the texts of the runs, and places held for media and box tags."""
        numbers, signed = iter(range(len(runs))), []
        for role, pieces in turns:
            mine: list[Piece] = []
            for is_text, group in itertools.groupby(pieces or [(False, "")], _is_text):
                if is_text:
                    number = next(numbers)
                    text = _enclosed(_joined(runs[number].pieces, _PLACE), number, runs[number].alone, signs)
                    mine.append((False, text))
                else:
                    mine += group
            signed.append((role, mine))
        return self._messages(signed, _PLACE)

    def _write(self, messages: list[dict]) -> str:
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": False}
        try:
            return self._template.render(**given | self._given)
        except Exception as error:  # whatever an expression of the template raises
            raise ChatError(f"cannot write it: {str(error).partition(chr(10))[0]}") from error


class LostTurnError(ChatError):
    """The template leaves out what a turn says."""


def _say(role: str) -> Turn:
    """A turn for trying the template out."""
    return role, [(False, f"{role[0].upper()}0")]


def _joined(pieces: Sequence[Piece], spelled: Mapping[str, str]) -> str:
    return "".join(spelled[piece] if is_mark else piece for is_mark, piece in pieces)


def _is_text(piece: Piece) -> bool:
    """Or a box tag, which stands in a text."""
    return not (piece[0] and piece[1] in KIND_OF)


def _runs(turns: Sequence[Turn]) -> Iterator[_Run]:
    for turn, (_, pieces) in enumerate(turns):
        alone = all(map(_is_text, pieces))
        for is_text, group in itertools.groupby(pieces or [(False, "")], _is_text):
            if is_text:
                yield _Run(turn, alone, list(group))


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _stripped(text: str, alone: bool) -> tuple[str, str, str]:
    """(white space, the rest, white space) of a run; of nothing else, that is the rest where the turn has no more."""
    core = text.strip()
    if not core:
        return ("", text, "") if alone else (text, "", "")
    at = text.index(core)
    return text[:at], core, text[at + len(core) :]


def _enclosed(text: str, number: int, alone: bool, signs: str) -> str:
    """A run with its signs inside the white space at its ends, which templates strip."""
    before, core, behind = _stripped(text, alone)
    if before and not core:
        return text
    name = chr(0xDC00 + number // 1024) + chr(0xDC00 + number % 1024)
    begin, end = (sign + name if sign in signs else "" for sign in (_START, _END))
    return before + begin + core + end + behind


def _read(signed: str, spelled: Mapping[str, str]) -> _Written:
    out: list[str] = []
    written, length, at = _Written("", {}, {}, []), 0, 0
    for sign in _SIGN.finditer(signed):
        out.append(signed[at : sign.start()])
        length += sign.start() - at
        at, mark = sign.end(), sign[0]
        if mark in _HELD_BY:
            name = spelled[_HELD_BY[mark]]
            written.inner.append((length, length + len(name)))
            out.append(name)
            length += len(name)
            continue
        number = (ord(mark[1]) - 0xDC00) * 1024 + ord(mark[2]) - 0xDC00
        places = written.begin if mark[0] == _START else written.end
        if number in places:
            raise ChatError("writes a text twice")
        places[number] = length
    written.text = "".join([*out, signed[at:]])
    return written


def _cut(written: _Written, places: list[tuple[int, int, int]]) -> Iterator[Segment]:
    text, at = written.text, 0
    for begin, end, turn in places:
        if begin < at:
            raise ChatError("writes one text inside another")
        if at < begin:
            yield Segment(text[at:begin], None, True)
        at = begin
        for low, high in written.inner:
            if begin <= low and high <= end:
                if at < low:
                    yield Segment(text[at:low], turn, False)
                yield Segment(text[low:high], turn, True)
                at = high
        if at < end or begin == end:
            yield Segment(text[at:end], turn, False)
        at = end
    if at < len(text):
        yield Segment(text[at:], None, True)


# ---- the environment of transformers' templates


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: writes what is inside."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller) -> str:
        return caller()


def _environment(clock: Callable[[str], str]) -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = clock
    return environment


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own would escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str):
    raise jinja2.TemplateError(message)


def _clock(date: str | None) -> Callable[[str], str]:
    """strftime_now on that day. Raises ChatError for what is no date."""
    if date is None:
        return lambda form: _raise("it asks for today's date, and rows must not depend on it: set data.chat.date")
    try:
        today = datetime.strptime(date, "%Y-%m-%d")
    except (TypeError, ValueError):
        raise ValueError(f"data.chat.date={date}: must be a day, as in 2025-01-31") from None
    return today.strftime
