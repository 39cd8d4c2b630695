"""The video task: clips of a few seconds in which a digit moves over paper and may change into another.

Five kinds of question: which digit it is, which way it moves, when it changes, which digits are shown, and a stream, in
which the assistant says each digit at the moment it appears. Digits change on whole seconds, so that one frame a second
is enough to answer.
"""

import io
from typing import cast

import av
import numpy as np

from tandem.data.synthesis.maker import Maker, Sample, blot, dialogue

SOUND_RATE = 16_000
SOUND_OPTIONS = {"aac": {"aac_coder": "fast"}, "libmp3lame": {"compression_level": "9"}}  # quickly made

# Per direction: where the digit begins and ends, as shares of the room it has across and down; None is anywhere.
DIRECTIONS = {
    "right": ((0, 1), None),
    "left": ((1, 0), None),
    "down": (None, (0, 1)),
    "up": (None, (1, 0)),
}


class VideoTasks(Maker):
    """Each task makes one sample."""

    def video(self) -> Sample:
        kind = self.choice(("digit", "direction", "change", "list", "stream", "stream"))
        seconds = self.between(2, 6)
        if kind == "digit":
            scans, direction = self.distinct_digits(1), None
            turns = dialogue("<video>Which digit moves?", self.number(scans))
        elif kind == "direction":
            scans, direction = self.distinct_digits(1), self.choice(tuple(DIRECTIONS))
            turns = dialogue("<video>Which way does the digit move?", direction)
        else:
            count = 2 if kind == "change" else self.between(2, min(3, seconds))
            scans, direction = self.distinct_digits(count), None
        changes = sorted(self.rng.permutation(np.arange(1, seconds))[: len(scans) - 1].tolist())
        if kind == "change":
            turns = dialogue(
                "<video>When does the digit change?", f"{changes[0]} seconds" if changes[0] > 1 else "1 second"
            )
        elif kind == "list":
            turns = dialogue("<video>Which digits are shown?", ", ".join(self.number(scans)))
        elif kind == "stream":
            turns = self.streamed(scans, changes)
        frames, fps = self.moving(scans, changes, seconds, direction)
        codec = self.choice(("libx264", "mpeg4"))
        return Sample(turns, [("mp4", encode_clip(frames, fps, codec))], scans)

    def streamed(self, scans: list[int], changes: list[int]) -> list[dict]:
        """Turns in which each digit is said as it appears."""
        digits = self.number(scans)
        said = [f"a {digits[0]}"] + [f"now a {digit}" for digit in digits[1:]]
        stream = [
            {"time": time, "role": "assistant", "text": text} for time, text in zip((0, *changes), said, strict=True)
        ]
        return [
            {"role": "system", "text": "Say each digit as soon as it appears."},
            {"role": "user", "text": "<video>Which digits were shown?", "stream": stream},
            {"role": "assistant", "text": ", ".join(digits)},
        ]

    def moving(
        self, scans: list[int], changes: list[int], seconds: int, direction: str | None
    ) -> tuple[np.ndarray, int]:
        """(frames uint8 [F, H, W, 3], frames a second): the scans in turn on one straight way."""
        fps, height, width = self.between(5, 10), 14 * self.between(4, 8), 14 * self.between(4, 8)
        tall = self.between(28, int(0.6 * height))
        wide = int(min(tall * self.rng.uniform(0.65, 0.95), 0.6 * width))
        paper, ink = self.canvas(height, width)
        strokes = [self.stroke(scan, wide, tall) for scan in scans]
        ways = DIRECTIONS[direction] if direction else (None, None)
        rooms = (width - wide, height - tall)
        starts_ends = [ends or tuple(self.rng.uniform(0, 1, 2)) for ends in ways]
        x, y = (
            np.linspace(start, end, seconds * fps) * room for (start, end), room in zip(starts_ends, rooms, strict=True)
        )
        frames = np.broadcast_to(paper, (len(x), *paper.shape)).copy()
        for k, frame in enumerate(frames):
            shown = np.searchsorted(changes, k / fps, side="right")
            blot(frame, ink, strokes[shown], round(x[k]), round(y[k]))
        return np.clip(frames, 0, 255).astype(np.uint8), fps


def encode_clip(
    frames: np.ndarray, fps: int, codec: str, sound_S: np.ndarray | None = None, sound_codec: str = "aac"
) -> bytes:
    """An mp4 of the frames, uint8 [F, H, W, 3] with even sides, and of mono sound at 16 kHz, float32 [S], if given.

    The same frames and sound give the same bytes.
    """
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = cast(av.VideoStream, container.add_stream(codec, rate=fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.gop_size = 2 * fps
        stream.codec_context.thread_count = 1
        if codec == "libx264":
            # Constant quantizer, no weighted prediction: x264's look-ahead may differ from run to run otherwise.
            stream.options = {"preset": "veryfast", "qp": "24", "weightp": "none"}
        else:
            stream.codec_context.qmin = stream.codec_context.qmax = 4
        track = None
        if sound_S is not None:
            options = SOUND_OPTIONS.get(sound_codec, {})
            added = container.add_stream(sound_codec, rate=SOUND_RATE, layout="mono", options=options)
            track = cast(av.AudioStream, added)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
        if track is not None and sound_S is not None:
            for packets in (track.encode(sound_frame(sound_S)), track.encode()):
                container.mux(packets)
    return file.getvalue()


def sound_frame(sound_S: np.ndarray) -> av.AudioFrame:
    frame = av.AudioFrame.from_ndarray(sound_S.astype(np.float32)[None], "fltp", "mono")
    frame.sample_rate = SOUND_RATE
    return frame
