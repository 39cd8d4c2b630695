"""Turns as a chat template writes them, to ids: those of transformers' apply_chat_template for the same conversation.

    written     <|im_start|>assistant\\n No parking. <|im_end|> \\n      the template's text, a turn's text
    trained                              ^^^^^^^^^^^ ^^^^^^^^^^           the turn's text, and what ends the turn

Shapes: T base text tokens, M media, X segments.
"""

import itertools
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from tandem.data.media.chat import ChatError, ChatTemplate, Segment
from tandem.data.media.encoding import Encoder
from tandem.data.media.own_format import without
from tandem.data.media.tokenizer_files import ChatConfig
from tandem.data.media.turns import BOX_TAGS, IMAGE, VIDEO, Piece, SampleError, Turn, media_of

REASON = "chat template"


class ChatFormat:
    """Writes turns by a chat template.

    meaning: token of each meaning, see `SpecialTokens`; without an end_of_turn it is the special token that the
    template writes first behind a text of the assistant.  named: tokens that templates know by name, as bos_token.
    Raises ValueError, one predicate of the template, for one that cannot be used.
    """

    def __init__(
        self, source: str, encoder: Encoder, meaning: Mapping[str, str], named: Mapping[str, str], chat: ChatConfig
    ):
        self._encoder = encoder
        spelled = {
            IMAGE: meaning["start_of_image"] + meaning["image"] + meaning["end_of_image"],
            VIDEO: meaning["video"],
            BOX_TAGS[0]: meaning["start_of_box"],
            BOX_TAGS[1]: meaning["end_of_box"],
        }
        self.template = ChatTemplate(source, spelled, meaning["image"], {**named, **chat.variables}, chat.date)
        self.end_of_turn = self._end_of_turn(meaning.get("end_of_turn"))
        ids = encoder.specials
        self._end_id, self._image_id, self._video_id = (
            ids[name] for name in (self.end_of_turn, meaning["image"], meaning["video"])
        )
        self._framed = [ids[meaning[key]] for key in ("start_of_image", "video", "end_of_image")]
        self._behind_frame = encoder.mark(meaning["end_of_image"])

    def _end_of_turn(self, chosen: str | None) -> str:
        after = self._between(1)
        end = chosen or self._encoder.first_special(after)
        if end is None or end not in after:
            raise ChatError(
                f"ends a turn of the assistant with {after!r}, which has no {end or 'special token'}: set "
                "data.special_tokens.end_of_turn to the token that ends a turn"
            )
        return end

    def _between(self, turn: int) -> str:
        """What the template writes between a turn of its probe and the next: 0 is the user's, 1 the assistant's."""
        probe = self.template.probe
        begin, end = (next(i for i, each in enumerate(probe) if each.turn == number) for number in (turn, turn + 1))
        return "".join(each.text for each in probe[begin + 1 : end])

    def encode(
        self, turns: Sequence[Turn], train_roles: Collection[str], name: str
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens int32 [T], trained bool [T], tokens before each medium [M]).  Raises SampleError."""
        try:
            segments = list(self.template.segments([(turn.role, turn.pieces) for turn in turns]))
        except ChatError as error:
            raise SampleError(REASON, f"{name} has turns of which the chat template {error}") from error
        tokens_T, trained_T, marked_T = self._ids(segments, [turn.role for turn in turns], train_roles, name)
        video_T = marked_T & (tokens_T == self._video_id)
        dropped_T = video_T | marked_T & (tokens_T == self._image_id)
        at_M = np.flatnonzero(dropped_T)
        wanted = [mark == VIDEO for turn in turns for mark in media_of(turn.pieces)]
        if video_T[at_M].tolist() != wanted:
            what = f"{name} has media of which the chat template writes {len(at_M)}, not {len(wanted)} in their order"
            raise SampleError(REASON, what)
        for at in np.flatnonzero(video_T[1:]).tolist():  # every frame has marks of its own
            around = slice(at, at + 3)
            dropped_T[around] |= tokens_T[around].tolist() == self._framed
        return without(dropped_T, tokens_T, trained_T, at_M)

    def event(
        self, role: str, pieces: list[Piece], turn: Turn, train_roles: Collection[str], name: str
    ) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, trained) of a text inside a turn with a video: `turn` ends, that text is a turn, `turn` goes on."""
        if {role, turn.role} != {"user", "assistant"}:
            what = f"{name} has a stream entry of the {role} in a turn of the {turn.role}"
            raise SampleError(REASON, f"{what}; with a chat template one is the user's and one the assistant's")
        first = int(role == "user")
        opening, closing = self._between(first), self._between(1 - first if first else 1)
        spelled = self.template.spelled
        said = [Segment(spelled[piece] if is_mark else piece, 0, is_mark) for is_mark, piece in pieces]
        segments = [Segment(opening, None, True), *said, Segment(closing, None, True)]
        tokens_T, trained_T, _ = self._ids(segments, [role], train_roles, name, behind=self._behind_frame)
        return tokens_T[1:], trained_T[1:]

    def _ids(
        self,
        segments: Sequence[Segment],
        roles: Sequence[str],
        train_roles: Collection[str],
        name: str,
        behind: str = "",
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(tokens, trained, which are special tokens of the template) [T] of one text, `behind` a mark."""
        texts = [self._encoder.marked(each.text) if each.spelled else each.text for each in segments]
        tokens_T, marked_T, place_T2 = self._encoder.encode_with_places("".join([behind, *texts]))
        begin_T, end_T = place_T2.T
        border_X1 = list(itertools.accumulate(map(len, texts), initial=len(behind)))
        stop_T = np.flatnonzero(marked_T & (tokens_T == self._end_id))
        trained_T = np.zeros(len(tokens_T), bool)
        last = {each.turn: k for k, each in enumerate(segments)}
        following = len(tokens_T)
        for k in range(len(segments) - 1, -1, -1):
            turn = segments[k].turn
            if turn is None:
                continue
            low = int(np.searchsorted(end_T, border_X1[k], side="right"))
            high = max(low, int(np.searchsorted(begin_T, border_X1[k + 1])))
            if roles[turn] in train_roles:
                whole_T = (begin_T[low:high] >= border_X1[k]) & (end_T[low:high] <= border_X1[k + 1])
                trained_T[low:high] |= whole_T | ~marked_T[low:high]  # a role's token may take a space of the text
                if last[turn] == k:
                    stop = stop_T[np.searchsorted(stop_T, high) :][:1]
                    if stop.size and stop[0] < following:
                        trained_T[high : stop[0] + 1] = True
                    elif roles[turn] == "assistant":
                        what = f"{name} has a turn of the assistant that the chat template does not end with"
                        raise SampleError(REASON, f"{what} {self.end_of_turn} (data.special_tokens.end_of_turn)")
            following = low
        return tokens_T, trained_T, marked_T
