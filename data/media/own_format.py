"""Base text of tandem's format: a turn is   role-token  text  <eos>,   an image is   [SOI] [EOI],   a video is empty.

Visual tokens are inserted later (`reading/sample_layout.py`).  Shapes: T base text tokens, M media, X special tokens.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tandem.data.media.encoding import Encoder
from tandem.data.media.turns import BOX_TAGS, IMAGE, KIND_OF, ROLES, VIDEO, Piece, Turn


class OwnFormat:
    """Writes turns in tandem's format.  meaning: special token of each field of `SpecialTokens`."""

    def __init__(self, encoder: Encoder, meaning: Mapping[str, str]):
        special = {key: encoder.mark(name) for key, name in meaning.items()}
        self._encoder, self._video_id = encoder, encoder.specials[meaning["video"]]
        self._role = {role: special[role] for role in ROLES}
        self._end = special["end_of_turn"]
        self._special = {
            IMAGE: special["start_of_image"] + special["end_of_image"],
            VIDEO: special["video"],  # separates the texts around it; removed after encoding
            BOX_TAGS[0]: special["start_of_box"],
            BOX_TAGS[1]: special["end_of_box"],
        }

    def encode(
        self, turns: Sequence[Turn], train_roles: Collection[str], name: str = ""
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (tokens int32 [T], trained bool [T], tokens before each medium [M])."""
        out: list[str] = []
        trained: list[bool] = []  # for each special token, then for the text after it
        media: list[int] = []  # index of the special token that follows each medium
        videos = False
        for turn in turns:
            train = turn.role in train_roles
            out.append(self._role[turn.role])
            trained += (False, train)
            for is_special, piece in turn.pieces:
                if is_special and piece in KIND_OF:
                    media.append(len(trained) // 2 + (piece == IMAGE))
                    trained += (False, train) * (1 + (piece == IMAGE))
                    videos |= piece == VIDEO
                elif is_special:
                    trained += (train, train)
                out.append(self._special[piece] if is_special else piece)
            out.append(self._end)
            trained += (train, False)
        tokens_T, special_T = self._encoder.encode("".join(out))
        at_X = np.flatnonzero(special_T)
        count_X2 = np.ones((len(at_X), 2), np.int64)
        count_X2[:-1, 1] = at_X[1:] - at_X[:-1] - 1
        count_X2[-1, 1] = len(tokens_T) - at_X[-1] - 1
        trained_T, at_M = np.repeat(np.array(trained), count_X2.reshape(-1)), at_X[media]
        return without(tokens_T == self._video_id, tokens_T, trained_T, at_M) if videos else (tokens_T, trained_T, at_M)

    def event(
        self, role: str, pieces: list[Piece], turn: Turn, train_roles: Collection[str], name: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return (tokens, trained) of a stream text in a video turn: the text as a turn, then the role of `turn`."""
        tokens_T, trained_T, _ = self.encode([Turn(role, pieces, []), Turn(turn.role, [], [])], train_roles)
        return tokens_T[:-1], trained_T[:-1]


def without(
    dropped_T: np.ndarray, tokens_T: np.ndarray, trained_T: np.ndarray, at_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Remove tokens. Returns (tokens, trained, tokens before each medium)."""
    before_T = np.cumsum(dropped_T) - dropped_T
    return tokens_T[~dropped_T], trained_T[~dropped_T], at_M - before_T[at_M]
