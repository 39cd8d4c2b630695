"""What is read and decoded in one go, as a message that any process can work on: some images, or some texts.

    plan  ->  Job (words and arrays)  ->  JobRunner.run(job, memory)  ->  Done (bytes read, what failed)

A job says where bytes lie in shards and where their result goes in the batch's memory; it needs nothing else. What
cannot be used leaves black patches, or <image> where the plan has visual tokens and untrained padding elsewhere.

Shapes: M media (images and videos), I images and frames, S samples, N patches, P positions of a row.
"""

import io
import json
import zlib
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np

from tandem.data.formats.in_place import find_format
from tandem.data.media.audio import spectrogram
from tandem.data.media.image import ImageError, decode_image, to_patches
from tandem.data.media.text import Tokenizer
from tandem.data.media.turns import SampleError
from tandem.data.media.video import SoundError, VideoError, decode_frames
from tandem.data.planning.plan import AUDIO
from tandem.data.reading.sample_layout import lay_out
from tandem.data.shards.index import IMAGE, VIDEO
from tandem.data.shards.storage import RangeFiles, Section, shown
from tandem.data.vision import VisionSpec

WHOLE_VIDEO_BYTES = 8 << 20  # a longer video is read in ranges, and so not checked against its checksum
KINDS = {IMAGE: "image", VIDEO: "video"}


@dataclass(frozen=True)
class Job:
    """Words (anything JSON holds) and arrays by name."""

    words: dict
    arrays: dict[str, np.ndarray]

    def pack(self) -> bytes:
        shapes = [(name, array.dtype.str, array.shape) for name, array in self.arrays.items()]
        head = json.dumps([self.words, shapes]).encode()
        raw = [np.ascontiguousarray(array).tobytes() for array in self.arrays.values()]
        return b"".join([len(head).to_bytes(8, "little"), head, *raw])

    @classmethod
    def unpack(cls, message: bytes) -> "Job":
        at = 8 + int.from_bytes(message[:8], "little")
        words, shapes = json.loads(message[8:at])
        arrays = {}
        for name, dtype, shape in shapes:
            count = int(np.prod(shape))
            arrays[name] = np.frombuffer(message, dtype, count, at).reshape(shape)
            at += arrays[name].nbytes
        return cls(words, arrays)


@dataclass
class Done:
    """What a job did. failures: (medium or sample of the job, reason, sentence)."""

    bytes_read: int = 0
    failures: list[tuple[int, str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Areas:
    """Where a batch's arrays lie in its memory: patches, then tokens, then which of them are trained."""

    patches: int
    positions: int  # rows * seq_length
    values: int  # of a patch

    @property
    def size(self) -> int:
        return self._tokens_at + 5 * self.positions

    @property
    def _tokens_at(self) -> int:
        return -(-self.patches * self.values // 64) * 64

    def patches_NP(self, memory_B: np.ndarray) -> np.ndarray:
        return memory_B[: self.patches * self.values].reshape(-1, self.values)

    def tokens(self, memory_B: np.ndarray) -> np.ndarray:
        return memory_B[self._tokens_at : self._tokens_at + 4 * self.positions].view(np.int32)

    def trained(self, memory_B: np.ndarray) -> np.ndarray:
        return memory_B[self._tokens_at + 4 * self.positions : self.size].view(bool)


class JobRunner:
    """Does jobs, one at a time, in whichever process it lives."""

    def __init__(
        self, tokenizer: Tokenizer, train_roles: Sequence[Collection[str]], max_pixels: int, vision: VisionSpec
    ):
        """train_roles: of each source of the corpus."""
        self._tokenizer = tokenizer
        self._train_roles = [frozenset(roles) for roles in train_roles]
        self._max_pixels, self._vision = max_pixels, vision
        self._files = RangeFiles()

    def run(self, job: Job, memory_B: np.ndarray) -> Done:
        """Do one job into the batch's memory, uint8. What cannot be read or decoded is told in the result."""
        areas = Areas(job.words["patches"], job.words["positions"], self._vision.patch_values)
        if job.words["kind"] == "images":
            return self._images(job, areas.patches_NP(memory_B))
        return self._texts(job, areas.tokens(memory_B), areas.trained(memory_B))

    def close(self) -> None:
        self._files.close()

    # Images, frames and sounds. Arrays: path_M, offset_M, size_M, crc_M, kind_M, first_M1 into I; out_I, grid_hw_I2,
    # time_I (ascending inside a medium, so that a sound, being AUDIO, comes before the frames).

    def _images(self, job: Job, patches_NP: np.ndarray) -> Done:
        done, arrays = Done(), job.arrays
        patches_I = arrays["grid_hw_I2"].prod(1)
        for m, kind in enumerate(arrays["kind_M"].tolist()):
            here = slice(*arrays["first_M1"][m : m + 2].tolist())
            out_I = [patches_NP[at : at + n] for at, n in zip(arrays["out_I"][here], patches_I[here], strict=True)]
            grid_I = arrays["grid_hw_I2"][here].tolist()
            try:
                if kind == VIDEO:
                    self._video(job, m, out_I, grid_I, arrays["time_I"][here], done)
                else:
                    self._image(job, m, out_I, grid_I, done)
            except (ImageError, SampleError, OSError) as error:
                for patches in out_I:
                    patches[:] = 0
                sentence = f"{KINDS[kind]} at byte {arrays['offset_M'][m]} of {shown(_path(job, m))}: {error}"
                done.failures.append((m, _reason(error), sentence))
        return done

    def _image(self, job: Job, m: int, out_I: list[np.ndarray], grid_I: list, done: Done) -> None:
        data = self._read(job, m, "the image", done)
        first_grid, patches = None, None
        for out, grid in zip(out_I, grid_I, strict=True):
            if grid != first_grid:
                pixels_HW3 = decode_image(data, self._max_pixels, self._vision.pixels_hw(grid))
                first_grid, patches = grid, to_patches(pixels_HW3, grid, self._vision)
            out[:] = patches

    def _video(self, job: Job, m: int, out_I: list[np.ndarray], grid_I: list, time_I: np.ndarray, done: Done) -> None:
        size, sounds = int(job.arrays["size_M"][m]), int(np.searchsorted(time_I, AUDIO, side="right"))
        if size <= WHOLE_VIDEO_BYTES:
            file = io.BytesIO(self._read(job, m, "the video", done))
            self._sounds(file, out_I[:sounds], grid_I[:sounds])
            return self._frames(file, out_I[sounds:], grid_I[sounds:], time_I[sounds:])
        section = Section(self._files.open(_path(job, m)), int(job.arrays["offset_M"][m]), size)
        try:
            section.keep = True  # what the sound needs lies between the first frames, and is not read again for them
            self._sounds(section, out_I[:sounds], grid_I[:sounds])
            section.keep = False
            self._frames(section, out_I[sounds:], grid_I[sounds:], time_I[sounds:])
        finally:
            done.bytes_read += section.bytes_read

    def _sounds(self, file, out_I: list[np.ndarray], grid_I: list) -> None:
        """One sound, as often as the batch has the sample."""
        if not out_I:
            return
        widest_HW3 = spectrogram(file, *self._vision.pixels_hw(max(grid_I)))
        for out, grid in zip(out_I, grid_I, strict=True):
            out[:] = self._vision.cut(widest_HW3[:, : self._vision.pixels_hw(grid)[1]])

    def _frames(self, file, out_I: list[np.ndarray], grid_I: list, time_I: np.ndarray) -> None:
        if not out_I:
            return
        file.seek(0)
        frames = decode_frames(file, time_I, self._max_pixels)
        with closing(frames):
            for out, grid, pixels_HW3 in zip(out_I, grid_I, frames, strict=True):
                out[:] = to_patches(pixels_HW3, grid, self._vision)

    # Texts. Arrays: path_M, offset_M, size_M, crc_M, plain_M, source_M, out_M, length_M of each sample's text;
    # first_kind_M1 into kind; first_M1 into I; media_I, time_I, tokens_I, start_I.

    def _texts(self, job: Job, tokens: np.ndarray, trained: np.ndarray) -> Done:
        done, arrays = Done(), job.arrays
        for s, (out, length) in enumerate(zip(arrays["out_M"].tolist(), arrays["length_M"].tolist(), strict=True)):
            here = slice(*arrays["first_M1"][s : s + 2].tolist())
            place = slice(out, out + length)
            try:
                tokens[place], trained[place] = self._text(job, s, here, length, done)
            except (SampleError, OSError) as error:
                for start, count in zip(
                    arrays["start_I"][here].tolist(), arrays["tokens_I"][here].tolist(), strict=True
                ):
                    tokens[out + start : out + start + count] = self._tokenizer.image_id
                done.failures.append((s, _reason(error), f"{_text_name(job, s)}: {error}"))
        return done

    def _text(self, job: Job, s: int, here: slice, length: int, done: Done) -> tuple[np.ndarray, np.ndarray]:
        """(tokens, trained) of one sample, checked against the places that the plan has for its images."""
        arrays, name = job.arrays, "the sample"
        data = self._read(job, s, name, done)
        kinds = [KINDS[kind] for kind in arrays["kind"][slice(*arrays["first_kind_M1"][s : s + 2])].tolist()]
        format, prompt = job.words["formats"][arrays["path_M"][s]]
        content = find_format(format).content(data, bool(arrays["plain_M"][s]), kinds, prompt, name)
        roles = self._train_roles[int(arrays["source_M"][s])]
        encoded = self._tokenizer.encode_sample(content["turns"], roles, kinds, name)
        tokens, trained, start_I = lay_out(
            encoded,
            self._tokenizer,
            arrays["media_I"][here],
            arrays["time_I"][here],
            arrays["tokens_I"][here],
            length,
            name,
        )
        if not np.array_equal(start_I, arrays["start_I"][here]):
            raise SampleError("changed", f"{name} no longer matches its index: its images stand elsewhere")
        return tokens, trained

    def _read(self, job: Job, m: int, name: str, done: Done) -> bytes:
        data = self._files.read(_path(job, m), int(job.arrays["offset_M"][m]), int(job.arrays["size_M"][m]))
        done.bytes_read += len(data)
        if zlib.crc32(data) != job.arrays["crc_M"][m]:
            raise SampleError("changed", f"{name} is not what was indexed: its checksum differs")
        return data


def _path(job: Job, m: int) -> str:
    return job.words["paths"][job.arrays["path_M"][m]]


def _text_name(job: Job, s: int) -> str:
    return f"sample at byte {job.arrays['offset_M'][s]} of {shown(_path(job, s))}"


def _reason(error: Exception) -> str:
    """The short name under which a failure is counted."""
    if isinstance(error, SampleError):
        return error.reason
    if isinstance(error, SoundError):
        return "no sound"
    if isinstance(error, VideoError):
        return "unreadable video"
    return "unreadable image" if isinstance(error, ImageError) else "unreadable shard"
