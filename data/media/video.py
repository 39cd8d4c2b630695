"""Which frames of a video are sampled, at what resolution, and decoding of these frames alone.

The tokens per frame fall as the number of frames rises, so that a video stays within its budget (Seed1.5-VL section
2.2):

    tokens per frame    640   512   384   256   160   128     then 128, with frames spread evenly over the video
    frames that fit     128   160   213   320   512   640     in 81,920 tokens

Times are in milliseconds from the first frame. Shapes: F frames, H W pixels.
"""

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO

import av
import numpy as np

from tandem.data.media.image import ImageError

MAX_FRAME_PIXELS = 1 << 26  # 8192 x 8192
MAX_DURATION_MS = 24 * 3600 * 1000
LAST_FRAME_MS = 1000  # a last frame stands at least this long, since headers round durations up
BUFFER_BYTES = 1 << 17

# Other demuxers are never tried: some of them (playlists) would open files and addresses named in the data.
CONTAINERS = "mov,mp4,matroska,webm,avi"
_OPEN = {"format_whitelist": CONTAINERS, "protocol_whitelist": ""}
_STREAMS = {"max_pixels": str(MAX_FRAME_PIXELS)}  # for what is decoded while the header is read


class VideoError(ImageError):
    """A video cannot be used; the message is one sentence."""


class SoundError(VideoError):
    """A video's sound cannot be used; the message is one sentence."""


@dataclass(frozen=True)
class Probe:
    """What a video declares, and the size of its first frame as shown (rotation applied, pixels taken as square)."""

    height: int
    width: int
    duration_ms: int
    fps: float  # mean rate, 0 where the container gives none
    audio: bool


# ---------------------------------------------------------------------------------------------------------------------
# Sampling: pure functions


def sample_frames(duration_ms: int, fps: float, budget: int, levels: Sequence[int]) -> tuple[np.ndarray, int]:
    """Return (times int64 [F] in ms, most visual tokens per frame) of a video sampled at `fps` frames per second.

    The level is the first of the descending `levels` at which all frames fit `budget` tokens. If none fits, the last
    level is used and as many frames as fit are spread evenly over the video.
    """
    frames = max(1, math.ceil(duration_ms * fps / 1000 - 1e-6))
    for level in levels:
        if frames * level <= budget:
            return np.floor(np.arange(frames) * (1000 / fps) + 1e-6).astype(np.int64), int(level)
    frames = max(1, budget // levels[-1])
    return np.arange(frames, dtype=np.int64) * duration_ms // frames, int(levels[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def probe(file: BinaryIO, max_pixels: int = MAX_FRAME_PIXELS) -> Probe:
    """Read the header and decode the first frame. Raises VideoError if the video cannot be sampled."""
    with opened(file, "video") as (container, stream):
        _limit_pixels(stream, max_pixels)
        duration_ms = _duration_ms(container, stream)
        if duration_ms < 1:
            raise VideoError("the video declares no duration")
        if duration_ms > MAX_DURATION_MS:
            raise VideoError(f"the video declares {duration_ms} ms; the limit is {MAX_DURATION_MS} ms")
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError("the video has no frame")
        height, width = (frame.width, frame.height) if _quarter_turns(frame) % 2 else (frame.height, frame.width)
        rate = stream.average_rate or stream.guessed_rate
        return Probe(height, width, duration_ms, float(rate or 0), bool(container.streams.audio))


def decode_frames(
    file: BinaryIO, times_ms: Sequence[int] | np.ndarray, max_pixels: int = MAX_FRAME_PIXELS
) -> Generator[np.ndarray, None, None]:
    """Yield, for each of the ascending times t, the last frame with start time <= t.

    Frames are RGB pixels uint8 [H, W, 3], with rotation applied. Decoding is sequential, but seeks to a later keyframe
    if one precedes the next requested time. Raises VideoError, also for a video that ends before a requested time.
    """
    with opened(file, "video") as (container, stream):
        _limit_pixels(stream, max_pixels)
        frames = _Frames(container, stream)
        shown, pixels_HW3 = None, np.empty((0, 0, 3), np.uint8)
        for time_ms in times_ms:
            frame = frames.at(int(time_ms))
            if frame is not shown:
                turned = np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))
                shown, pixels_HW3 = frame, np.ascontiguousarray(turned)
            yield pixels_HW3


class _Frames:
    """Frames of one stream in ascending time: the one last shown, and the one after it."""

    def __init__(self, container, stream):
        self._container, self._stream = container, stream
        self._ms = float(1000 * stream.time_base)
        self._seekable = self._seek(0)  # Matroska loads its index of keyframes at the first seek
        self._frames = container.decode(stream)
        self._next = next(self._frames, None)
        if self._next is None:
            raise VideoError("the video has no frame")
        self._shown = self._next
        first = _pts(self._next)
        self._start = first if stream.start_time is None else min(stream.start_time, first)

    def at(self, time_ms: int):
        """Return the frame shown at a time, which must not precede the last requested one."""
        if self._seekable and self._keyframe_ahead(time_ms):
            self._jump(time_ms)
        while self._next is not None and self._time(self._next) <= time_ms:
            self._shown, self._next = self._next, next(self._frames, None)
        if self._next is None:
            length_ms = max(LAST_FRAME_MS, (self._shown.duration or 0) * self._ms)
            if time_ms >= self._time(self._shown) + length_ms:
                raise VideoError(f"the video ends at {self._time(self._shown)} ms, before {time_ms} ms")
        return self._shown

    def _time(self, frame) -> int:
        """The millisecond in which a frame begins."""
        return math.floor((_pts(frame) - self._start) * self._ms + 1e-6)

    def _keyframe_ahead(self, time_ms: int) -> bool:
        """Whether a keyframe lies after the next frame and at or before `time_ms`, by the container's index."""
        entries = self._stream.index_entries
        if self._next is None or self._time(self._next) > time_ms:
            return False
        at = entries.search_timestamp(self._start + int(time_ms / self._ms), backward=True)
        return at >= 0 and entries[at].timestamp > _pts(self._next)

    def _jump(self, time_ms: int) -> None:
        """Seek to the keyframe before `time_ms`, or further back if the index was inaccurate."""
        for earlier_ms in (0, 2000, 20_000, time_ms):
            if not self._seek(max(0, time_ms - earlier_ms)):
                break
            frames = self._container.decode(self._stream)
            frame = next(frames, None)
            if frame is not None and (self._time(frame) <= time_ms or earlier_ms >= time_ms):
                self._frames, self._shown, self._next = frames, frame, frame
                return
        raise VideoError(f"the video cannot be decoded from {time_ms} ms on")

    def _seek(self, time_ms: int) -> bool:
        try:
            start = getattr(self, "_start", self._stream.start_time or 0)
            self._container.seek(start + int(time_ms / self._ms), stream=self._stream)
            return True
        except av.FFmpegError:
            return False


@contextmanager
def opened(file: BinaryIO, kind: str) -> Iterator[tuple]:
    """Open a file as (container, its first track of `kind`, "video" or "audio").

    Errors in the body are raised as VideoError; for kind "audio", errors after the file is open as SoundError.
    """
    unusable = VideoError
    try:
        with av.open(file, container_options=_OPEN, options=_STREAMS, buffer_size=BUFFER_BYTES) as container:
            unusable = SoundError if kind == "audio" else VideoError
            tracks = [track for track in container.streams if track.type == kind]
            if not tracks:
                raise unusable(f"the file has no {kind} track")
            if tracks[0].codec_context is None:
                raise unusable(f"the {kind} track has a codec that cannot be decoded")
            for other in container.streams:
                if other is not tracks[0]:
                    other.discard = av.stream.Discard.all
            tracks[0].codec_context.thread_count = 1
            yield container, tracks[0]
    except ImageError:
        raise
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise unusable(f"the {kind} cannot be decoded: {text[:120]}") from error


def _limit_pixels(stream, max_pixels: int) -> None:
    codec = stream.codec_context
    if codec.width < 1 or codec.height < 1 or codec.width * codec.height > max_pixels:
        size = f"{codec.width} x {codec.height}"
        raise VideoError(f"the video declares {size} pixels per frame; the limit is {max_pixels} pixels in all")
    codec.options = {"max_pixels": str(max_pixels)}  # applies to the sizes that the frames themselves declare too


def _duration_ms(container, stream) -> int:
    """Duration of the video track; of the whole file if the track declares none."""
    if stream.duration is not None:
        return int(stream.duration * stream.time_base * 1000)
    parts = stream.metadata.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = (float(part) for part in parts)
        return int(1000 * (3600 * hours + 60 * minutes + seconds))
    except ValueError:
        return int((container.duration or 0) * 1000 / av.time_base)


def _pts(frame) -> int:
    time = frame.pts if frame.pts is not None else frame.dts
    if time is None:
        raise VideoError("the video has frames without a time")
    return time


def _quarter_turns(frame) -> int:
    """Number of quarter turns to the left that rotate a frame upright."""
    return round(frame.rotation / 90) % 4
