"""A folder's vocabulary and that of the run: the same tokens have the same ids, and new ones start as the mean of the
others.

    rows of the embedding      0 ............. known            known: ids of the tokenizer before tokens were added
    of the folder              0 ............. known ... rows   some models have more rows than tokens
    of the run                 0 ............. known | added    the mean of rows 0 .. known

Rows between the tokens and the end of the folder's embedding stay as they are.
"""

import json
from pathlib import Path

import torch

from tandem.data.media.text import Tokenizer
from tandem.parallel.engines.state import VOCABULARY
from tandem.train.families.folder import Folder

AT_ONCE = 8192  # rows read for a mean


class GrownFolder:
    """A folder of `rows` rows of `width`, read as a model whose tokens `added` and all from `rows` on are new."""

    def __init__(self, folder: Folder, rows: int, width: int, known: int, added: range):
        self._folder, self._rows, self._width = folder, rows, width
        self._known, self._added = min(known, rows), added
        self._means: dict[str, torch.Tensor] = {}

    @property
    def description(self) -> str:
        """The folder, and which of its rows are new, for a log."""
        new = f"tokens {self._added.start} to {self._added.stop - 1} start as the mean of the {self._known} before"
        return f"{self._folder.description}; {new}" if self._added else self._folder.description

    def has(self, name: str) -> bool:
        """As `Folder.has`."""
        return self._folder.has(name)

    def read(self, name: str, kind: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        """As `Folder.read`."""
        if name not in VOCABULARY:
            return self._folder.read(name, kind, start, size)
        out, first = torch.empty(size), start[0]
        there = max(0, min(first + size[0], self._rows) - first)
        out[:there] = self._folder.read(name, kind, start, (there, *size[1:]))
        id_R = torch.arange(first, first + size[0])
        new_R = (id_R >= self._rows) | ((id_R >= self._added.start) & (id_R < self._added.stop))
        if new_R.any():
            out[new_R] = self._mean(name, kind)[start[1] : start[1] + size[1]]
        return out

    def _mean(self, name: str, kind: str) -> torch.Tensor:
        """Of the rows of all tokens that were known, summed in fp64 in order: equal on all ranks."""
        if name not in self._means:
            total = torch.zeros(self._width, dtype=torch.float64)
            for begin in range(0, self._known, AT_ONCE):
                rows = min(AT_ONCE, self._known - begin)
                total += self._folder.read(name, kind, (begin, 0), (rows, self._width)).double().sum(0)
            self._means[name] = (total / self._known).float()
        return self._means[name]


def check_vocabulary(folder: str | Path, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a token of the folder's own tokenizer has another id in this one, or none."""
    path = Path(folder) / "tokenizer.json"
    try:
        raw = path.read_bytes()
        if tokenizer.is_file(raw):
            return
        said = json.loads(raw)
        theirs = {token["content"]: token["id"] for token in said.get("added_tokens", ())}
        vocabulary = said["model"]["vocab"]
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if isinstance(vocabulary, list):  # of a Unigram: (token, score) by id
        vocabulary = {entry[0]: place for place, entry in enumerate(vocabulary)}
    theirs = vocabulary | theirs
    for token, place in theirs.items():
        if (ours := tokenizer.id_of(token)) != place:
            raise ValueError(
                f"data.tokenizer={tokenizer.path} has {'no token' if ours is None else f'id {ours} for'} {token!r}, "
                f"which is {place} in model.llm.folder={folder}: name a tokenizer with the folder's vocabulary, or set "
                "checkpoint.other_tokenizer=true to start from it all the same"
            )
