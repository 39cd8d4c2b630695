"""Turns of conversation to token ids.

A turn becomes   role-token  text  <eos>,   and each <image> in its text becomes   [SOI]  (visual tokens)  [EOI].
Visual tokens are not in the text's ids: their number depends on the image, so a sample keeps the places where they go
(`image_at_I`) and whoever lays out a row inserts them. Text can never spell a special token other than the box tags.

Shapes: T text tokens of a sample, I images of a sample.
"""

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

PAD, EOS, SOI, EOI, IMAGE = "<pad>", "<eos>", "[SOI]", "[EOI]", "<image>"
ROLES = {"user": "<user>", "assistant": "<assistant>"}
BOX_TAGS = ("<bbox>", "</bbox>")
SPECIALS = (PAD, EOS, *ROLES.values(), SOI, EOI, IMAGE, *BOX_TAGS)

_MARKS = re.compile("(" + "|".join(re.escape(mark) for mark in (IMAGE, *BOX_TAGS)) + ")")


class SampleError(ValueError):
    """One sample is not usable; the message is one sentence. `reason` is the short name under which it is counted."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class EncodedSample:
    """Text of one sample, visual tokens left out."""

    tokens_T: np.ndarray  # int32
    trained_T: np.ndarray  # bool: this token is a target
    image_at_I: np.ndarray  # int32: text tokens before the image's visual tokens


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

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that it can size an embedding even where ids have gaps."""
        return max(self._inner.get_vocab().values()) + 1

    def encode_text(self, text: str) -> list[int]:
        """Ids of plain text; special-token spellings in it are ordinary characters."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def encode_sample(
        self, turns: Sequence[dict], train_roles: Collection[str], n_images: int, name: str
    ) -> EncodedSample:
        """Encode [{"role": "user", "text": "<image>What number?"}, {"role": "assistant", "text": "42"}].

        A turn whose role is in train_roles trains its text and its <eos>; role tokens, [SOI] and [EOI] are never
        targets. The encoding itself does not depend on train_roles. `n_images` is the number of images the sample
        has and `name` is how an error calls it. Raises SampleError.
        """
        tokens: list[int] = []
        trained: list[bool] = []
        image_at: list[int] = []
        for role, text in _checked_turns(turns, name):
            train = role in train_roles
            tokens.append(self.ids[ROLES[role]])
            trained.append(False)
            for piece in _MARKS.split(text):
                if piece == IMAGE:
                    tokens += (self.ids[SOI], self.ids[EOI])
                    trained += (False, False)
                    image_at.append(len(tokens) - 1)
                    continue
                ids = [self.ids[piece]] if piece in BOX_TAGS else self.encode_text(piece)
                tokens += ids
                trained += [train] * len(ids)
            tokens.append(self.eos_id)
            trained.append(train)
        if len(image_at) != n_images:
            message = f"{name} has {len(image_at)} {IMAGE} placeholders in its text but {n_images} images"
            raise SampleError("placeholder mismatch", message)
        return EncodedSample(np.array(tokens, np.int32), np.array(trained, bool), np.array(image_at, np.int32))


def _checked_turns(turns: Sequence[dict], name: str) -> list[tuple[str, str]]:
    """(role, text) of each turn; SampleError where the sample is not a list of such turns."""
    if not isinstance(turns, list) or not turns:
        raise SampleError("bad turns", f"{name} has no list of turns")
    checked = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("text"), str):
            message = f"{name} has a turn without a text or without a role out of {', '.join(ROLES)}"
            raise SampleError("bad turns", message)
        if any("\ud800" <= letter <= "\udfff" for letter in turn["text"]):
            raise SampleError("bad turns", f"{name} has a lone surrogate in its text, which is no character")
        checked.append((turn["role"], turn["text"]))
    return checked


def build_byte_tokenizer(path: str | Path) -> None:
    """Write a byte-level tokenizer.json: 256 byte symbols, no merges, and the special tokens. Nothing is trained."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIALS])
    inner.save(str(path))
