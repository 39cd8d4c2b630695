"""The layout of one sample: its base text with the content of its images and videos in place.

    image   [SOI] v v v v [EOI]                            [SOI] and [EOI] are base text
    video   [0.0 second] [SOI] v v [EOI]                   one such run for each planned frame; an event follows the
            [1.0 second] [SOI] v v [EOI] <assistant> ...   last frame whose time is not after it, the first at least

v is the <image> token, held by every visual position of an image or a frame. The planner computes the same places from
lengths alone; here they come from the tokens.

Shapes: T base text tokens, M media of the sample, I its planned images and frames, P planned tokens.
"""

import numpy as np

from tandem.data.media.text import EncodedSample, Tokenizer
from tandem.data.media.turns import SampleError


class _Sequence:
    """Tokens put after one another."""

    def __init__(self):
        self.tokens: list[np.ndarray] = []
        self.trained: list[np.ndarray] = []
        self.length = 0

    def put(self, tokens: np.ndarray, trained: np.ndarray | None = None) -> None:
        self.tokens.append(tokens)
        self.trained.append(np.zeros(len(tokens), bool) if trained is None else trained)
        self.length += len(tokens)


def lay_out(
    encoded: EncodedSample,
    tokenizer: Tokenizer,
    media_I: np.ndarray,
    time_I: np.ndarray,
    tokens_I: np.ndarray,
    length: int,
    name: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens int64 [P], trained bool [P], start int64 [I]) of one sample; start is the first visual token's place.

    media_I is the number inside the sample of each planned image's or frame's medium, ascending; time_I its time in ms
    (-1 for a still image), ascending inside a video; tokens_I its visual tokens. A layout longer than `length` is one
    that was cut: it ends there, and media behind the cut are missing from media_I. Raises SampleError, calling the
    sample `name`, if the text and the media do not fill `length` as planned.
    """
    out = _Sequence()
    start_I = np.zeros(len(media_I), np.int64)
    bounds_M1 = np.searchsorted(media_I, np.arange(len(encoded.kinds_M) + 1))
    text_at = 0
    for medium, kind in enumerate(encoded.kinds_M):
        text_end = encoded.media_at_M[medium]
        out.put(encoded.tokens_T[text_at:text_end], encoded.trained_T[text_at:text_end])
        text_at = text_end
        first, end = bounds_M1[medium], bounds_M1[medium + 1]
        if first == end and out.length - len(tokenizer.before_ids) * (kind == "image") < length:
            raise SampleError(
                "changed", f"{name} has {'an' if kind == 'image' else 'a'} {kind} before its end that was not planned"
            )
        if kind == "image":
            start_I[first:end] = out.length
            out.put(np.full(tokens_I[first:end].sum(), tokenizer.image_id))
        else:
            _put_video(
                out, encoded.events_M[medium], tokenizer, time_I[first:end], tokens_I[first:end], start_I[first:end]
            )
    out.put(encoded.tokens_T[text_at:], encoded.trained_T[text_at:])
    if out.length < length or (start_I + tokens_I >= length).any():
        raise SampleError("changed", f"{name} makes {out.length} tokens, where {length} were planned with other places")
    tokens_P, trained_P = np.concatenate(out.tokens)[:length], np.concatenate(out.trained)[:length]
    return tokens_P.astype(np.int64), trained_P, start_I


def _put_video(out: _Sequence, events, tokenizer: Tokenizer, time_F, tokens_F, start_F) -> None:
    """Put the F planned frames of one video and its events; writes start_F."""
    opening, closing = np.array(tokenizer.before_ids), np.array(tokenizer.after_ids)
    said = 0
    for frame, (time, count) in enumerate(zip(time_F.tolist(), tokens_F.tolist(), strict=True)):
        out.put(np.array(tokenizer.stamp(time)))
        out.put(opening)
        start_F[frame] = out.length
        out.put(np.full(count, tokenizer.image_id))
        out.put(closing)
        last = frame + 1 == len(time_F)
        while said < len(events) and (last or events[said].time_ms < time_F[frame + 1]):
            out.put(events[said].tokens, events[said].trained)
            said += 1
