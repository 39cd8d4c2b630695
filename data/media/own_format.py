"""Our format: a turn is   role-token  text  <eos>,   an image in it   [SOI] [EOI],   and a video nothing at all.

Shapes: T base text tokens, M media, X special tokens.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tandem.data.media.encoding import Encoder
from tandem.data.media.turns import BOX_TAGS, IMAGE, KIND_OF, ROLES, VIDEO, Piece, Turn


class OwnFormat:
    """Writes turns in our format.  meaning: token of each meaning, see `SpecialTokens`."""

    def __init__(self, encoder: Encoder, meaning: Mapping[str, str]):
        mark = {key: encoder.mark(name) for key, name in meaning.items()}
        self._encoder, self._video_id = encoder, encoder.specials[meaning["video"]]
        self._role = {role: mark[role] for role in ROLES}
        self._end = mark["end_of_turn"]
        self._placed = {
            IMAGE: mark["start_of_image"] + mark["end_of_image"],
            VIDEO: mark["video"],  # so that it parts the texts around it; dropped
            BOX_TAGS[0]: mark["start_of_box"],
            BOX_TAGS[1]: mark["end_of_box"],
        }

    def encode(
        self, turns: Sequence[Turn], train_roles: Collection[str], name: str = ""
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens int32 [T], trained bool [T], tokens before each medium [M])."""
        out: list[str] = []
        trained: list[bool] = []  # of each special token, and of the text behind it
        media: list[int] = []  # which special tokens stand right behind
        videos = False
        for turn in turns:
            train = turn.role in train_roles
            out.append(self._role[turn.role])
            trained += (False, train)
            for is_mark, piece in turn.pieces:
                if is_mark and piece in KIND_OF:
                    media.append(len(trained) // 2 + (piece == IMAGE))
                    trained += (False, train) * (1 + (piece == IMAGE))
                    videos |= piece == VIDEO
                elif is_mark:
                    trained += (train, train)
                out.append(self._placed[piece] if is_mark else piece)
            out.append(self._end)
            trained += (train, False)
        tokens_T, marked_T = self._encoder.encode("".join(out))
        place_X = np.flatnonzero(marked_T)
        count_X2 = np.ones((len(place_X), 2), np.int64)
        count_X2[:-1, 1] = place_X[1:] - place_X[:-1] - 1
        count_X2[-1, 1] = len(tokens_T) - place_X[-1] - 1
        trained_T, at_M = np.repeat(np.array(trained), count_X2.reshape(-1)), place_X[media]
        return without(tokens_T == self._video_id, tokens_T, trained_T, at_M) if videos else (tokens_T, trained_T, at_M)

    def event(
        self, role: str, pieces: list[Piece], turn: Turn, train_roles: Collection[str], name: str = ""
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, trained) of a text inside a turn with a video: that text as a turn, then the role of `turn`."""
        tokens_T, trained_T, _ = self.encode([Turn(role, pieces, []), Turn(turn.role, [], [])], train_roles)
        return tokens_T[:-1], trained_T[:-1]


def without(
    dropped_T: np.ndarray, tokens_T: np.ndarray, trained_T: np.ndarray, at_M: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, trained, kept tokens before each place) without the dropped ones."""
    before_T = np.cumsum(dropped_T) - dropped_T
    return tokens_T[~dropped_T], trained_T[~dropped_T], at_M - before_T[at_M]
