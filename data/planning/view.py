"""One shard at the resolution of a run: how long its samples are and where their images go, for all samples at once.

    still image:   ... [SOI] visual tokens [EOI] ...
    video:         ... (stamp [SOI] visual tokens [EOI] events)  (stamp [SOI] ...)  ...      one bracket a frame

An image and a frame are alike from here on: an image of the plan, with a time in the second case. A stamp with its
frame, or an image with its marks, is a unit: a sample that is cut to fit a row is never cut inside one. Where sound is
read, a video's sound is one more image behind its frames, a unit of no tokens that goes where the last frame goes.

Shapes: N samples, M media, I images and frames, E events of a shard; G its groups; X entries of a list of places.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from tandem.data.media.audio import sound_grid
from tandem.data.media.video import sample_frames
from tandem.data.planning.corpus import Corpus
from tandem.data.planning.plan import AUDIO, STILL
from tandem.data.shards.index import VIDEO, ShardIndex
from tandem.data.vision import VisionSpec

TOO_LONG = "samples longer than a row"
IMAGE_TOO_LONG = "rows shorter than one image"
FIRST_IMAGE_CUT = "samples whose first image would be cut off"
NO_TEXT_LEFT = "samples cut until no text was left"
NO_SOUND = "samples without a sound track"
SOUND_CUT = "samples whose sound would be cut off"
# refused_N counts into these; 0 is accepted
REASONS = ("", TOO_LONG, IMAGE_TOO_LONG, FIRST_IMAGE_CUT, NO_TEXT_LEFT, NO_SOUND, SOUND_CUT)


@dataclass(frozen=True)
class Resolution:
    """How many visual tokens images and videos become, and what happens to a sample longer than a row.

    video_budget: visual tokens of one video; video_levels: tokens of a frame to choose from, falling: the first with
    which all frames fit the budget, or else fewer frames at the last (Seed1.5-VL, section 2.2). audio_seconds: sound
    heard of each video at most; above 0, a sample is used only if it has a video and each of its videos has sound.
    """

    seq_length: int
    too_long: str  # refuse | cut
    vision: VisionSpec
    video_budget: int
    video_levels: tuple[int, ...]
    audio_seconds: float


@dataclass(frozen=True)
class ShardView:
    """Samples and images of one shard. Of a cut sample, the first images_N images remain."""

    length_N: np.ndarray  # int64, tokens it takes in a row; where refused, those that it would need
    refused_N: np.ndarray  # uint8, into REASONS
    cut_N: np.ndarray  # bool
    domain_N: np.ndarray  # int16, into Corpus.domains
    first_image_N: np.ndarray  # int64
    images_N: np.ndarray  # int64
    media_I: np.ndarray  # int32, medium in the shard's index
    time_I: np.ndarray  # int32, milliseconds, or STILL or AUDIO
    grid_hw_I2: np.ndarray  # int32, patches down and across
    tokens_I: np.ndarray  # int32, visual tokens; 0 of a sound
    offset_I: np.ndarray  # int64, first visual token (of a sound, its place) counted from the sample's first token


@dataclass(frozen=True)
class _Images:
    """Images and frames of a shard in order, before they are placed."""

    first_M1: np.ndarray  # first image of each medium, and their number
    media_I: np.ndarray
    time_I: np.ndarray
    grid_hw_I2: np.ndarray


def view_shard(
    index: ShardIndex,
    domain_G: np.ndarray,
    fps: float,
    resolution: Resolution,
    stamp_lengths: Callable[[np.ndarray], np.ndarray],
) -> ShardView:
    """The view of a shard. stamp_lengths maps times in milliseconds to the tokens of their stamps."""
    samples, media = np.asarray(index.samples), np.asarray(index.media)
    vision, layout = resolution.vision, resolution.vision.layout
    images = _images(media, fps, resolution)
    frame_I, sound_I = images.time_I >= 0, images.time_I == AUDIO
    tokens_I = np.where(sound_I, 0, vision.tokens(images.grid_hw_I2)).astype(np.int64)
    # Tokens of the unit before its visual tokens: the stamp and [SOI].
    lead_I = np.where(sound_I, 0, len(layout.before))
    lead_I[frame_I] += stamp_lengths(images.time_I[frame_I])
    # What a medium adds to the text: an image its visual tokens, a frame its whole unit and the events behind it.
    events_I = _event_tokens(media, np.asarray(index.events), images)
    added_I = np.where(frame_I, lead_I + tokens_I + len(layout.after), tokens_I) + events_I

    first_media_N = samples["first_media"].astype(np.int64)
    first_N, end_N = images.first_M1[first_media_N], images.first_M1[first_media_N + samples["media"]]
    added_I1 = np.concatenate([[0], np.cumsum(added_I)])
    length_N = samples["text_tokens"] + added_I1[end_N] - added_I1[first_N]
    before_I = added_I1[:-1] - np.repeat(added_I1[first_N], end_N - first_N)
    offset_I = media["at"][images.media_I] + before_I + np.where(frame_I, lead_I, 0)
    offset_I[sound_I] -= events_I[np.flatnonzero(sound_I) - 1]  # right behind the last frame, before its events

    units_I = (offset_I - lead_I, offset_I + tokens_I + np.where(sound_I, 0, len(layout.after)))
    kept_N, images_N, refused_N = _fit(length_N, first_N, end_N, units_I, resolution)
    if resolution.audio_seconds:
        videos_N, sounds_N = _sums(images.time_I == 0, first_N, end_N), _sums(sound_I, first_N, end_N)
        lost_N = _sums(sound_I, first_N, first_N + images_N) < sounds_N
        refused_N[lost_N & (refused_N == 0)] = REASONS.index(SOUND_CUT)
        refused_N[(videos_N == 0) | (sounds_N < videos_N)] = REASONS.index(NO_SOUND)
    kept_N = np.where(refused_N > 0, length_N, kept_N)
    return ShardView(
        length_N=kept_N,
        refused_N=refused_N,
        cut_N=kept_N < length_N,
        domain_N=domain_G[samples["group"]],
        first_image_N=first_N,
        images_N=images_N,
        media_I=images.media_I.astype(np.int32),
        time_I=images.time_I.astype(np.int32),
        grid_hw_I2=images.grid_hw_I2,
        tokens_I=tokens_I.astype(np.int32),
        offset_I=offset_I,
    )


def _images(media: np.ndarray, fps: float, resolution: Resolution) -> _Images:
    vision = resolution.vision
    grid_hw_M2 = vision.views(media["height"], media["width"])
    frames_M, times, level_V = np.ones(len(media), np.int64), [], []
    videos = np.flatnonzero(media["kind"] == VIDEO)
    for video, duration_ms in zip(videos.tolist(), media["duration_ms"][videos].tolist(), strict=True):
        times_ms, level = sample_frames(duration_ms, fps, resolution.video_budget, resolution.video_levels)
        if resolution.audio_seconds and media["audio"][video]:
            times_ms = np.append(times_ms, AUDIO)
        frames_M[video] = len(times_ms)
        times.append(times_ms)
        level_V.append(level)
    for level in set(level_V):
        here = videos[np.array(level_V) == level]
        grid_hw_M2[here] = vision.views(media["height"][here], media["width"][here], level)
    media_I = np.repeat(np.arange(len(media)), frames_M)
    time_I = np.full(len(media_I), STILL, np.int64)
    if times:
        time_I[media["kind"][media_I] == VIDEO] = np.concatenate(times)
    grid_hw_I2, sound_I = grid_hw_M2[media_I], time_I == AUDIO
    duration_I = media["duration_ms"][media_I[sound_I]]
    grid_hw_I2[sound_I] = sound_grid(duration_I, resolution.audio_seconds, vision)
    return _Images(np.concatenate([[0], np.cumsum(frames_M)]), media_I, time_I, grid_hw_I2)


def _event_tokens(media: np.ndarray, events: np.ndarray, images: _Images) -> np.ndarray:
    """Tokens of the events that follow each frame: those from its time to the next frame's. First frames are at 0."""
    if not len(events):
        return np.zeros(len(images.media_I), np.int64)
    events_M = np.diff(np.append(media["first_event"].astype(np.int64), len(events)))
    media_E = np.repeat(np.arange(len(media)), events_M)
    time_I = np.where(images.time_I == AUDIO, (1 << 33) - 1, images.time_I)  # a sound follows all frames and events
    key_I, key_E = (images.media_I << 33) + time_I, (media_E << 33) + events["time_ms"].astype(np.int64)
    frame_E = np.searchsorted(key_I, key_E, side="right") - 1
    return np.bincount(frame_E, events["tokens"], len(images.media_I)).astype(np.int64)


def _fit(length_N, first_N, end_N, units_I, resolution: Resolution) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens, images, refused) of each sample in a row of seq_length; units_I: (begin, end) of units in the sample."""
    seq_length, (begin_I, end_I) = resolution.seq_length, units_I
    size_I = end_I - begin_I
    long_N = length_N > seq_length
    huge_N = long_N & (_sums(size_I > seq_length, first_N, end_N) > 0)
    whole_N = _sums(end_I <= seq_length, first_N, end_N)  # units end in order, so these are the sample's first
    refused_N = np.zeros(len(length_N), np.uint8)
    if resolution.too_long == "refuse":
        refused_N[long_N] = REASONS.index(TOO_LONG)
        refused_N[huge_N] = REASONS.index(IMAGE_TOO_LONG)
        return length_N, end_N - first_N, refused_N

    next_I1 = np.append(begin_I, 0)
    border_N = np.where(first_N + whole_N < end_N, next_I1[np.minimum(first_N + whole_N, len(begin_I))], seq_length)
    kept_N = np.where(long_N, np.minimum(border_N, seq_length), length_N)
    images_N = np.where(long_N, whole_N, end_N - first_N)
    text_N = kept_N - _sums(size_I, first_N, first_N + images_N)
    refused_N[long_N & (text_N <= 1)] = REASONS.index(NO_TEXT_LEFT)  # one token is the role's
    lost_N = long_N & (whole_N == 0) & (end_N > first_N)
    refused_N[lost_N] = REASONS.index(FIRST_IMAGE_CUT)
    refused_N[lost_N & huge_N] = REASONS.index(IMAGE_TOO_LONG)
    return kept_N, images_N, refused_N


def _sums(value_I: np.ndarray, first_N: np.ndarray, until_N: np.ndarray) -> np.ndarray:
    """The sum of the values from first to until, for each sample."""
    sum_I1 = np.concatenate([[0], np.cumsum(value_I)])
    return sum_I1[until_N] - sum_I1[first_N]


class Views:
    """Views of the shards in use, and columns gathered over them. Keeps the `most` latest used."""

    def __init__(
        self, corpus: Corpus, resolution: Resolution, stamp_lengths: Callable[[np.ndarray], np.ndarray], most: int
    ):
        self._corpus, self._resolution, self._stamp_lengths, self._most = corpus, resolution, stamp_lengths, most
        self._views: OrderedDict[int, ShardView] = OrderedDict()

    def of(self, shard: int) -> ShardView:
        """The view of one shard of the corpus."""
        if shard in self._views:
            self._views.move_to_end(shard)
            return self._views[shard]
        corpus = self._corpus
        fps = corpus.sources[int(corpus.source_of(shard))].settings.fps
        view = view_shard(corpus.index(shard), corpus.group_domains(shard), fps, self._resolution, self._stamp_lengths)
        self._views[shard] = view
        while len(self._views) > self._most:
            self._views.popitem(last=False)
        return view

    def gather(self, shard_X: np.ndarray, place_X: np.ndarray, *names: str) -> list[np.ndarray]:
        """Columns of ShardView at (shard, place), each [X, ...]; all of samples, or all of images."""
        order_X = np.argsort(shard_X, kind="stable")
        place_X, (shards, starts) = place_X[order_X], np.unique(shard_X[order_X], return_index=True)
        borders = [*starts.tolist(), len(shard_X)]
        columns: list[list[np.ndarray]] = [[] for _ in names]
        for shard, begin, end in zip(shards.tolist(), borders[:-1], borders[1:], strict=True):
            view, here = self.of(shard), place_X[begin:end]
            for column, name in zip(columns, names, strict=True):
                column.append(getattr(view, name)[here])
        back_X = np.empty(len(order_X), np.int64)
        back_X[order_X] = np.arange(len(order_X))
        return [np.concatenate(column)[back_X] if column else np.zeros(0, np.int64) for column in columns]
