"""Turns of conversation to token ids.

A turn becomes   role-token  text  <eos>,   or what a chat template makes of it (data/media/chat.py). In its text each
<image> becomes   [SOI]  (visual tokens)  [EOI],   and each <video> becomes, frame by frame,
stamp  [SOI]  (visual tokens)  [EOI],   where the stamp is text like "[1.5 second]". A turn with a video may be
streamed: texts with a time, its events, stand between the frames (data/reading/sample_layout.py).

How many visual tokens and frames there are depends on the run's resolution. So a sample is encoded without them: its
base text, and the places where media go in. Whoever reads a row lays both out. Text can never spell a special token
other than the box tags (data/media/encoding.py).

Shapes: T base text tokens of a sample, M media of a sample, I images and frames planned for a sample.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from tandem.data.media.encoding import Encoder
from tandem.data.media.own_format import OwnFormat
from tandem.data.media.tokenizer_files import OURS, ChatConfig, SpecialTokens, TokenizerFiles, read_files, resolve
from tandem.data.media.turns import KIND_OF, VIDEO, SampleError, check_kinds, check_text, checked_turns, media_of
from tandem.data.vision import VisionSpec

if TYPE_CHECKING:  # loads Jinja, which our own format does without
    from tandem.data.media.chat_format import ChatFormat

PAD, EOS = OURS.pad, OURS.end_of_turn
LAYOUT = VisionSpec.layout
SPECIALS = tuple(vars(OURS).values())
UNLABELLED = "unlabelled"  # domain of a sample whose json names none


@dataclass(frozen=True)
class Event:
    """A text said at a time of a streamed video, and what closes and opens turns around it."""

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
    """A `tokenizers` file or a Hugging Face folder, what its special tokens mean, and its chat template if it has one.

    Special tokens that the vocabulary lacks get new ids behind all others.  added: those, by name; known: ids before
    them.  meaning: tokens by the names of `SpecialTokens`; ids: by those of our format.  sha256: of all that decides a
    sample's ids; file_sha256: of tokenizer.json.
    Raises ValueError, one sentence, for files that cannot be read, and for tokens or a template that cannot work.
    """

    def __init__(self, path: str | Path, special: SpecialTokens | None = None, chat: ChatConfig | None = None):
        self.path, self._special, self._chat = str(path), special or SpecialTokens(), chat or ChatConfig()
        self._files = files = read_files(path, self._chat)
        if files.template is None and (self._chat.date or self._chat.variables):
            raise ValueError(f"data.chat has a date or variables, but data.tokenizer={path} has no chat template")
        self.meaning = resolve(self._special, files)
        try:
            inner = files.build()
        except Exception as error:
            raise ValueError(f"tokenizer file {path} cannot be read: {error}") from error
        self.known = max(inner.get_vocab().values(), default=-1) + 1
        self.added = _add_missing(inner, self.meaning.values(), f"tokenizer file {path}")
        self._encoder = Encoder(inner)
        self._format = self._open_format(files)
        self.ids = {getattr(OURS, key): self._encoder.specials[name] for key, name in self.meaning.items()}
        self.pad_id, self.eos_id, self.image_id = (self.ids[name] for name in (PAD, EOS, OURS.image))
        self.before_ids = [self.ids[name] for name in LAYOUT.before]  # of a view
        self.after_ids = [self.ids[name] for name in LAYOUT.after]
        self.file_sha256 = hashlib.sha256(files.raw).hexdigest()
        self.sha256 = self._digest(files)
        self._stamps: dict[int, list[int]] = {}  # by tenths of a second
        self._stamp_lengths = np.zeros(1024, np.uint8)  # 0 where not yet known

    @classmethod
    def of(cls, settings: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that has these `settings`."""
        special, chat = SpecialTokens(**settings["special"]), ChatConfig(**settings["chat"])
        return cls(settings["path"], special, chat)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the same tokenizer in another process; fit for JSON."""
        special, chat = dataclasses.asdict(self._special), dataclasses.asdict(self._chat)
        return {"path": os.path.abspath(self.path), "special": special, "chat": chat}

    @property
    def named(self) -> dict[str, str]:
        """The folder's named tokens, as bos_token."""
        return self._files.named

    @property
    def template(self) -> str | None:
        """Source of the chat template; None for our format."""
        return self._files.template

    @property
    def is_ours(self) -> bool:
        """Whether turns are written in our format with our tokens."""
        return self.template is None and self.meaning == vars(OURS)

    def to_json(self) -> str:
        """Content of a tokenizer.json with all tokens."""
        if not self.added and not self._files.added:
            return self._files.raw.decode()
        inner = self._files.build()
        _add_missing(inner, self.meaning.values(), self.path)
        return inner.to_str(pretty=True)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that it can size an embedding even where ids have gaps."""
        return self._encoder.vocab_size

    def id_of(self, token: str) -> int | None:
        """Id of a token of the vocabulary, or None."""
        return self._encoder.token_id(token)

    def is_file(self, raw: bytes) -> bool:
        """Whether these are the bytes of its tokenizer.json."""
        return raw == self._files.raw

    def _digest(self, files: TokenizerFiles) -> str:
        """That of the file alone where nothing else decides."""
        if self.is_ours and not files.added and not self.added:
            return self.file_sha256
        chat = vars(self._chat) | {"template": files.template} if files.template is not None else None
        added = [repr(token) for token in files.added]
        parts = [self.file_sha256, added, list(self.added), files.named, self.meaning, chat]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _open_format(self, files: TokenizerFiles) -> "OwnFormat | ChatFormat":
        """What writes turns.  Where no setting says what ends a turn, the chat template does."""
        if files.template is None:
            return OwnFormat(self._encoder, self.meaning)
        from tandem.data.media.chat_format import ChatFormat

        try:
            found = ChatFormat(files.template, self._encoder, self.meaning, files.named, self._chat)
        except ValueError as error:
            raise ValueError(f"the chat template of data.tokenizer={self.path} {error}") from error
        self.meaning["end_of_turn"] = found.end_of_turn
        return found

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings in it are ordinary characters."""
        return self._encoder.encode(text)[0].tolist()

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool = False) -> str:
        return self._encoder.decode(list(ids), skip_special)

    def stamp(self, time_ms: int) -> list[int]:
        """Ids of the time of a frame, "[1.5 second]": tenths of a second, rounded half up."""
        tenths = (int(time_ms) + 50) // 100
        if tenths not in self._stamps:
            behind, before = (self._encoder.mark(self.meaning[key]) for key in ("end_of_image", "start_of_image"))
            self._stamps[tenths] = self._encoder.encode(f"{behind}{LAYOUT.stamp(tenths)}{before}")[0][1:-1].tolist()
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

        A turn or event whose role is in train_roles trains its text and the token that ends it; all else that stands
        around texts, [SOI], [EOI] and stamps are never targets. The encoding itself does not depend on train_roles.
        `kinds` are the kinds ("image", "video") of the sample's media in order, and `name` is how an error calls the
        sample. Raises SampleError.
        """
        checked = checked_turns(turns, name)
        media = [(mark, turn) for turn in checked for mark in media_of(turn.pieces)]
        found = tuple(KIND_OF[mark] for mark, _ in media)
        check_kinds(found, kinds, name)
        tokens_T, trained_T, media_at_M = self._format.encode(checked, train_roles, name)
        events = tuple(
            tuple(
                Event(time_ms, *self._format.event(role, pieces, turn, train_roles, name))
                for time_ms, role, pieces in (turn.stream if mark == VIDEO else ())
            )
            for mark, turn in media
        )
        return EncodedSample(tokens_T, trained_T, media_at_M.astype(np.int32), found, events)


def _add_missing(inner: tokenizers.Tokenizer, names: Iterable[str], what: str) -> dict[str, int]:
    """New special tokens for names that the vocabulary lacks, with their ids.  Raises ValueError for a plain token."""
    special = {token.content for token in inner.get_added_tokens_decoder().values() if token.special}
    missing = [name for name in dict.fromkeys(names) if inner.token_to_id(name) is None]
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in missing])
    for name in names:
        if name not in special and name not in missing:
            raise ValueError(f"{what} holds {name} but not as a special token: text could spell it")
    vocabulary = inner.get_added_tokens_decoder().items()
    place = {token.content: number for number, token in vocabulary}
    return {name: place[name] for name in missing}


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
    check_text(domain, f"{name} has a domain", "bad json")
    if entity is not None:
        check_text(entity, f"{name} has an entity", "bad json")
    return content | {"domain": domain, "entity": entity}


def texts_of(turns: Sequence[dict], name: str) -> list[str]:
    """The pieces of text in a sample's turns and streams, without placeholders and box tags. Raises SampleError."""
    texts: list[str] = []
    for turn in checked_turns(turns, name):
        for pieces in (turn.pieces, *(said for _, _, said in turn.stream)):
            texts += [piece for is_mark, piece in pieces if not is_mark]
    return texts


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
