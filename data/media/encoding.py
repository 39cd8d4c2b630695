"""Strings to ids with special tokens out of band, so that text cannot spell them and yet is encoded as a whole.

    text        a template's "<|im_start|>user\n" and a text that holds "<|im_end|>" by chance
    as encoded  (mark)user\n ... <|im_end|> ...        a mark is an added token like the one it stands for

Pieces encoded one by one would not do: a tokenizer may begin a string otherwise than it goes on (Metaspace with
prepend_scheme="first"), and some tokens take the space beside them.

Shapes: T tokens of a string.
"""

import functools
import re
from collections.abc import Sequence

import numpy as np
import tokenizers
from tokenizers import AddedToken

RESERVED = "\ufdd0"  # a noncharacter, with which every mark begins; no text holds it
_FIRST = 0xF0000  # of the private characters that end one


class Encoder:
    """A tokenizer of the `tokenizers` library; of its special tokens, only marks become ids.

    vocab_size: one more than the largest id, so that it can size an embedding even where ids have gaps.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        inner.no_truncation()
        inner.no_padding()
        inner.encode_special_tokens = True
        self._inner = inner
        self.vocab_size = max(inner.get_vocab().values()) + 1
        special = {place: token for place, token in inner.get_added_tokens_decoder().items() if token.special}
        self.specials = {token.content: place for place, token in special.items()}
        self._marks = {name: RESERVED + chr(_FIRST + i) for i, name in enumerate(self.specials)}
        inner.add_tokens([_like(token, self._marks[token.content]) for token in special.values()])
        self._meant = np.arange(max(inner.get_vocab().values()) + 1, dtype=np.int32)
        for name, mark in self._marks.items():
            self._meant[inner.token_to_id(mark)] = self.specials[name]
        longest_first = sorted(map(re.escape, self.specials), key=len, reverse=True)
        self._spelled = re.compile("|".join(longest_first) or "(?!)")
        self.marked = functools.lru_cache(maxsize=4096)(self._marked)

    def mark(self, name: str) -> str:
        """What stands for a special token in a string."""
        return self._marks[name]

    def _marked(self, text: str) -> str:
        """A template's text with marks for the special tokens that it spells."""
        return self._spelled.sub(lambda match: self._marks[match[0]], text)

    def first_special(self, text: str) -> str | None:
        """The first special token that a template's text spells."""
        found = self._spelled.search(text)
        return found[0] if found else None

    def token_id(self, name: str) -> int | None:
        return self._inner.token_to_id(name)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(ids int32 [T], whether each came from a mark, bool [T])."""
        raw_T = np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)
        return self._meant[raw_T], raw_T >= self.vocab_size

    def encode_with_places(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As `encode`, and (begin, end) of each token in the characters of the text, int64 [T, 2]."""
        encoding = self._inner.encode(text, add_special_tokens=False)
        raw_T = np.array(encoding.ids, np.int32)
        places_T2 = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        return self._meant[raw_T], raw_T >= self.vocab_size, places_T2

    def decode(self, ids: Sequence[int] | np.ndarray, skip_special: bool) -> str:
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=skip_special)


def _like(token: AddedToken, mark: str) -> AddedToken:
    """The mark that splits text and takes spaces as the token does."""
    return AddedToken(
        mark,
        special=False,
        normalized=token.normalized,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
    )
