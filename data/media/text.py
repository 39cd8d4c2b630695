"""Turns of conversation to token ids.

A turn becomes   role-token  text  <eos>.  In its text each <image> becomes   [SOI]  (visual tokens)  [EOI],   and each
<video> becomes, frame by frame,   stamp  [SOI]  (visual tokens)  [EOI],   where the stamp is text like "[1.5 second]".
A turn with a video may be streamed: texts with a time, its events, stand between the frames
(data/reading/sample_layout.py).

How many visual tokens and frames there are depends on the run's resolution. So a sample is encoded without them: its
base text, and the places where media go in. Whoever reads a row lays both out. Text can never spell a special token
other than the box tags. A backslash before a placeholder or box tag makes it text (`split_marks`).

Shapes: T base text tokens of a sample, M media of a sample, I images and frames planned for a sample.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tandem.data.vision import VisionSpec

PAD, EOS, IMAGE, VIDEO = "<pad>", "<eos>", "<image>", "<video>"
LAYOUT = VisionSpec.layout
ROLES = {"system": "<system>", "user": "<user>", "assistant": "<assistant>"}
BOX_TAGS = ("<bbox>", "</bbox>")
SPECIALS = (PAD, EOS, *ROLES.values(), *LAYOUT.before, *LAYOUT.after, IMAGE, VIDEO, *BOX_TAGS)
KIND_OF = {IMAGE: "image", VIDEO: "video"}
UNLABELLED = "unlabelled"  # domain of a sample whose json names none
MAX_SECONDS = 4_294_967  # of an event: milliseconds are kept in 32 bits

_MARKS = re.compile(r"(?<!\\)(\\*)(" + "|".join(re.escape(mark) for mark in (IMAGE, VIDEO, *BOX_TAGS)) + ")")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class SampleError(ValueError):
    """One sample is not usable; the message is one sentence. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Event:
    """A text said at a time of a streamed video: role-token text <eos>, then the role-token of the turn it is in."""

    time_ms: int
    tokens: np.ndarray  # int32
    trained: np.ndarray  # bool


@dataclass(frozen=True)
class EncodedSample:
    """Base text of one sample, without the visual tokens of images and without all that makes up a video."""

    tokens_T: np.ndarray  # int32
    trained_T: np.ndarray  # bool: this token is a target
    media_at_M: np.ndarray  # int32: base text tokens before the medium's content; of an image that includes its [SOI]
    kinds_M: tuple[str, ...]  # "image" or "video"
    events_M: tuple[tuple[Event, ...], ...]  # of a streamed video, by time; () for all others


class Tokenizer:
    """A `tokenizers` file plus the ids of the special tokens, looked up by name.

    Raises ValueError if the file cannot be read or lacks a special token.
    """

    def __init__(self, path: str | Path):
        try:
            raw = Path(path).read_bytes()
            self._inner = tokenizers.Tokenizer.from_str(raw.decode())
        except Exception as error:
            raise ValueError(f"tokenizer file {path} cannot be read: {error}") from error
        self.path = str(path)
        self.sha256 = hashlib.sha256(raw).hexdigest()
        self._inner.no_truncation()
        self._inner.no_padding()
        self._inner.encode_special_tokens = True
        self.ids = {}
        for name in SPECIALS:
            token_id = self._inner.token_to_id(name)
            if token_id is None:
                raise ValueError(f"tokenizer file {path} has no special token {name}; it needs {', '.join(SPECIALS)}")
            self.ids[name] = token_id
            if token_id in self.encode_text(name):
                raise ValueError(f"tokenizer file {path} holds {name} but not as a special token: text could spell it")
        self.pad_id, self.eos_id, self.image_id = self.ids[PAD], self.ids[EOS], self.ids[IMAGE]
        self.before_ids = [self.ids[name] for name in LAYOUT.before]  # of a view
        self.after_ids = [self.ids[name] for name in LAYOUT.after]
        self._stamps: dict[int, list[int]] = {}  # by tenths of a second
        self._stamp_lengths = np.zeros(1024, np.uint8)  # 0 where not yet known

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that it can size an embedding even where ids have gaps."""
        return max(self._inner.get_vocab().values()) + 1

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings in it are ordinary characters."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def stamp(self, time_ms: int) -> list[int]:
        """Ids of the time of a frame, "[1.5 second]": tenths of a second, rounded half up."""
        tenths = (int(time_ms) + 50) // 100
        if tenths not in self._stamps:
            self._stamps[tenths] = self.encode_text(LAYOUT.stamp(tenths))
        return list(self._stamps[tenths])

    def stamp_lengths(self, times_ms: np.ndarray) -> np.ndarray:
        """Number of ids, int64, of the stamp of each time."""
        tenths = (np.asarray(times_ms, np.int64) + 50) // 100
        lengths, top = self._stamp_lengths, int(tenths.max(initial=0))
        if top >= len(lengths):
            lengths = np.zeros(max(top + 1, 2 * len(lengths)), np.uint8)
            lengths[: len(self._stamp_lengths)] = self._stamp_lengths
            self._stamp_lengths = lengths
        for unknown in np.unique(tenths[lengths[tenths] == 0]).tolist():
            lengths[unknown] = len(self.stamp(100 * unknown))
        return lengths[tenths].astype(np.int64)

    def encode_sample(
        self, turns: Sequence[dict], train_roles: Collection[str], kinds: Sequence[str], name: str
    ) -> EncodedSample:
        """Encode [{"role": "user", "text": "<image>What number?"}, {"role": "assistant", "text": "42"}].

        A turn or event whose role is in train_roles trains its text and its <eos>; role tokens, [SOI], [EOI] and stamps
        are never targets. The encoding itself does not depend on train_roles. `kinds` are the kinds ("image", "video")
        of the sample's media in order, and `name` is how an error calls the sample. Raises SampleError.
        """
        tokens: list[int] = []
        trained: list[bool] = []
        media_at: list[int] = []
        found: list[str] = []
        events: list[tuple[Event, ...]] = []
        for role, text, stream in _checked_turns(turns, name):
            train = role in train_roles
            tokens.append(self.ids[ROLES[role]])
            trained.append(False)
            for is_mark, piece in split_marks(text):
                if is_mark and piece in KIND_OF:
                    before, after = (self.before_ids, self.after_ids) if piece == IMAGE else ([], [])
                    media_at.append(len(tokens) + len(before))
                    tokens += before + after
                    trained += [False] * len(before + after)
                    found.append(KIND_OF[piece])
                    said = stream if piece == VIDEO else ()
                    events.append(tuple(self._event(entry, role, train_roles) for entry in said))
                    continue
                ids = self._ids_of(is_mark, piece)
                tokens += ids
                trained += [train] * len(ids)
            tokens.append(self.eos_id)
            trained.append(train)
        _check_kinds(found, kinds, name)
        return EncodedSample(
            np.array(tokens, np.int32),
            np.array(trained, bool),
            np.array(media_at, np.int32),
            tuple(found),
            tuple(events),
        )

    def _ids_of(self, is_mark: bool, piece: str) -> list[int]:
        """Ids of one piece of a text that was split at its marks, a box tag or text."""
        return [self.ids[piece]] if is_mark else self.encode_text(piece)

    def _event(self, entry: tuple[int, str, str], turn_role: str, train_roles: Collection[str]) -> Event:
        time_ms, role, text = entry
        said = [token for piece in split_marks(text) for token in self._ids_of(*piece)] + [self.eos_id]
        tokens = [self.ids[ROLES[role]], *said, self.ids[ROLES[turn_role]]]
        trained = [False, *[role in train_roles] * len(said), False]
        return Event(time_ms, np.array(tokens, np.int32), np.array(trained, bool))


# ---------------------------------------------------------------------------------------------------------------------
# Marks in texts: placeholders and box tags


def split_marks(text: str) -> list[tuple[bool, str]]:
    r"""(whether it is a mark, piece) of a text, in order; pieces of text are not empty.

    A mark behind an odd number of backslashes is text, and of these backslashes half remain: `\<image>` is the text
    "<image>", and `\\<image>` is a backslash and a placeholder. Elsewhere a backslash is a backslash.
    """
    pieces, plain, at = [], "", 0
    for match in _MARKS.finditer(text):
        backslashes, mark = len(match[1]), match[2]
        plain += text[at : match.start()] + "\\" * (backslashes // 2)
        at = match.end()
        if backslashes % 2:
            plain += mark
            continue
        pieces += [(False, plain)] * bool(plain) + [(True, mark)]
        plain = ""
    plain += text[at:]
    return pieces + [(False, plain)] * bool(plain)


def escaped(text: str) -> str:
    """The text that `split_marks` takes as this text, whatever marks it holds."""
    return _MARKS.sub(lambda match: "\\" * (2 * len(match[1]) + 1) + match[2], text)


def placeholders(text: str) -> list[str]:
    """Kinds of media ("image", "video") that a text has placeholders for, in order."""
    return [KIND_OF[piece] for is_mark, piece in split_marks(text) if is_mark and piece in KIND_OF]


# ---------------------------------------------------------------------------------------------------------------------
# What a sample's json may hold


def load_json(data: bytes, name: str) -> object:
    """What a sample's json member holds. Raises SampleError, calling the sample `name`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("bad json", f"{name} has a json member that cannot be parsed: {error}") from error


def parse_sample(data: bytes, name: str) -> dict:
    """A sample's json as {"turns": [...], "domain": str, "entity": str or None, ...}. Raises SampleError.

    `name` is how an error calls the sample. Turns are checked when they are encoded.
    """
    content = load_json(data, name)
    if not isinstance(content, dict) or "turns" not in content:
        raise SampleError("bad json", f'{name} has a json member that is not an object with "turns"')
    return sample_content(content, name)


def sample_content(content: dict, name: str) -> dict:
    """The content of a sample with its domain and entity checked. Raises SampleError."""
    domain, entity = content.get("domain", UNLABELLED), content.get("entity")
    _check_text(domain, f"{name} has a domain", "bad json")
    if entity is not None:
        _check_text(entity, f"{name} has an entity", "bad json")
    return content | {"domain": domain, "entity": entity}


def texts_of(turns: Sequence[dict], name: str) -> list[str]:
    """The pieces of text in a sample's turns and streams, without placeholders and box tags. Raises SampleError."""
    texts: list[str] = []
    for _, text, stream in _checked_turns(turns, name):
        texts += (text, *(said for _, _, said in stream))
    return [piece for text in texts for is_mark, piece in split_marks(text) if not is_mark]


def _check_text(value: object, what: str, reason: str) -> None:
    if not isinstance(value, str):
        raise SampleError(reason, f"{what} that is not a string")
    if _LONE_SURROGATE.search(value):
        raise SampleError(reason, f"{what} with a lone surrogate, which is no character")


def _checked_turns(turns: Sequence[dict], name: str) -> list[tuple[str, str, list[tuple[int, str, str]]]]:
    """(role, text, stream as (time in ms, role, text) by time) of each turn. Raises SampleError."""
    if not isinstance(turns, list) or not turns:
        raise SampleError("bad turns", f"{name} has no list of turns")
    checked = []
    for turn in turns:
        role, text = _checked_role_and_text(turn, f"{name} has a turn", "bad turns")
        stream = turn.get("stream", [])
        if not isinstance(stream, list):
            raise SampleError("bad stream", f'{name} has a "stream" that is not a list')
        if stream and (videos := placeholders(text).count("video")) != 1:
            seen = f"a turn with a stream and {videos} {VIDEO} placeholders"
            raise SampleError("bad stream", f"{name} has {seen}; a stream belongs to exactly one video")
        entries = [_checked_entry(entry, name) for entry in stream]
        checked.append((role, text, sorted(entries, key=lambda entry: entry[0])))
    return checked


def _checked_role_and_text(item: object, what: str, reason: str) -> tuple[str, str]:
    if not isinstance(item, dict) or item.get("role") not in tuple(ROLES):
        raise SampleError(reason, f"{what} without a role out of {', '.join(ROLES)}")
    _check_text(item.get("text"), f"{what} with a text", reason)
    return item["role"], item["text"]


def _checked_entry(entry: object, name: str) -> tuple[int, str, str]:
    role, text = _checked_role_and_text(entry, f"{name} has a stream entry", "bad stream")
    time = entry["time"] if isinstance(entry, dict) and "time" in entry else None
    if isinstance(time, bool) or not isinstance(time, (int, float)) or not 0 <= time <= MAX_SECONDS:
        raise SampleError("bad stream", f"{name} has a stream entry whose time is not a number of seconds from 0")
    if placeholders(text):
        raise SampleError("bad stream", f"{name} has a placeholder in a stream entry; media belong into a turn's text")
    return int(time * 1000 + 0.5), role, text


def _check_kinds(found: Sequence[str], kinds: Sequence[str], name: str) -> None:
    """Placeholders and media agree one by one, or SampleError."""
    if list(found) == list(kinds):
        return
    for mark, kind in KIND_OF.items():
        named, held = found.count(kind), list(kinds).count(kind)
        if named != held:
            message = f"{name} has {named} {mark} placeholders in its text but {held} {kind}s"
            raise SampleError("placeholder mismatch", message)
    first = next(i for i, (mark, kind) in enumerate(zip(found, kinds, strict=True)) if mark != kind)
    message = f"{name} has {kinds[first]} number {first} where its text has <{found[first]}>"
    raise SampleError("placeholder mismatch", message)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer files


def build_byte_tokenizer(path: str | Path) -> None:
    """Write a byte-level tokenizer.json: 256 byte symbols, no merges, and the special tokens. Nothing is trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    _save(inner, path)


def train_bpe_tokenizer(path: str | Path, texts: Iterable[str], vocab_size: int) -> int:
    """Train a byte-level BPE on texts and write it with the special tokens; returns its size, at most vocab_size.

    Digits stand alone, and words, numbers and punctuation are never merged with each other. The same texts give the
    same file. Raises ValueError if vocab_size has no room for the 256 byte symbols and the special tokens.
    """
    smallest = 256 + len(SPECIALS)
    if vocab_size < smallest:
        raise ValueError(f"--vocab-size is {vocab_size}; it must be at least {smallest}: 256 bytes and special tokens")
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    _save(inner, path)
    return inner.get_vocab_size()


def _save(inner: tokenizers.Tokenizer, path: str | Path) -> None:
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        inner.save(temporary)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
