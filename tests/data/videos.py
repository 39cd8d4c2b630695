"""Small videos for tests: frame k is as bright as its number, and its top left quarter is white."""

import io

import av
import numpy as np

LEVELS_APART = 4


def make_video(
    frames=30, fps=10, size=(48, 64), kind="mp4", codec="libx264", gop=10, rotation=None, tone=None, first_pts=0
) -> bytes:
    """An encoded video; size is (height, width) before rotation, tone the Hz of a sound in two channels."""
    file = io.BytesIO()
    with av.open(file, "w", format={"mkv": "matroska"}.get(kind, kind)) as container:
        video = container.add_stream(codec, rate=fps)
        video.height, video.width = size
        video.pix_fmt, video.gop_size = "yuvj420p" if codec == "mjpeg" else "yuv420p", gop
        if codec == "mpeg4":
            video.bit_rate = 4_000_000
        if rotation is not None:
            video.set_display_rotation(rotation)
        sound = container.add_stream("libopus" if kind == "webm" else "aac", rate=48_000) if tone else None
        for k in range(frames):
            pixels = np.full((*size, 3), LEVELS_APART * k, np.uint8)
            pixels[: size[0] // 2, : size[1] // 2] = 255
            frame = av.VideoFrame.from_ndarray(pixels, "rgb24")
            frame.pts = first_pts + k
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound:
            time = np.arange(48_000 * frames // fps) / 48_000
            wave = np.tile(0.25 * np.sin(2 * np.pi * tone * time), (2, 1)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(wave, "fltp", "stereo")
            frame.sample_rate = 48_000
            container.mux(sound.encode(frame))
            container.mux(sound.encode())
    return file.getvalue()


def only_sound() -> bytes:
    """An mp4 without a video track."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=48_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), "fltp", "mono")
        frame.sample_rate = 48_000
        container.mux(sound.encode(frame))
        container.mux(sound.encode())
    return file.getvalue()


def number_of(pixels_HW3: np.ndarray) -> int:
    """Which frame this is."""
    return round(float(pixels_HW3[-8:, -8:].mean()) / LEVELS_APART)


class Counted:
    """A file that counts the bytes read."""

    def __init__(self, data):
        self._file, self.bytes_read = io.BytesIO(data), 0

    def read(self, size):
        data = self._file.read(size)
        self.bytes_read += len(data)
        return data

    def seek(self, offset, whence=0):
        return self._file.seek(offset, whence)

    def tell(self):
        return self._file.tell()
