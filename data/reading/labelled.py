"""Labelled images and videos to evaluate an encoder on, from folders of classes or from shards, one by one in order.

    FOLDER/cat/1.jpg         the label is "cat"
    SHARD.tar                the label is "label" of a sample's json, the captions are the texts of its assistant turns

What cannot be used is passed over and named in `Labelled.skipped`.  Files are read one after another, while threads
decode the samples a little ahead.

Shapes: N patches, P values of a patch, I images (frames of a video count one by one).
"""

import hashlib
import io
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tandem.data.formats.in_place import contents, format_of
from tandem.data.media.audio import sound_grid, spectrogram
from tandem.data.media.image import ImageError, decode_image, image_size, to_patches
from tandem.data.media.text import load_json, texts_of
from tandem.data.media.turns import KIND_OF_SUFFIX, SampleError
from tandem.data.media.video import Probe, SoundError, decode_frames, probe, sample_frames
from tandem.data.shards.catalog import expand_shards
from tandem.data.shards.storage import open_range, shown
from tandem.data.shards.tars import MAX_BYTES, Member, Sample, TarSamples, printable
from tandem.data.vision import VisionSpec

AHEAD = 2  # samples read ahead of each decoding thread


@dataclass(frozen=True)
class Sizes:
    """How media become patches, as a run's settings say it.  audio_seconds: most sound heard of a video, 0 for none."""

    vision: VisionSpec
    max_pixels: int
    fps: float
    video_budget: int
    video_levels: tuple[int, ...]
    audio_seconds: float


@dataclass(frozen=True)
class Patches:
    """Patches of I images end to end, uint8 [N, P], and their grids, int32 [I, 2]."""

    patches_NP: np.ndarray
    grid_hw_I2: np.ndarray

    @staticmethod
    def of(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> "Patches":
        """From (patches, grid) of each image, one or more."""
        grid_hw_I2 = np.array([grid for _, grid in parts], np.int32).reshape(-1, 2)
        return Patches(np.concatenate([patches for patches, _ in parts]), grid_hw_I2)


@dataclass(frozen=True)
class LabelledSample:
    """images: still images and frames in order.  sound: the spectrogram of the first video, one image, or None;
    unheard: why there is none, where sound was asked for of a video.  captions: one a turn of the assistant, None
    for an empty one.  content: a hash of the media."""

    name: str
    label: str | None
    captions: tuple[str | None, ...]
    images: Patches
    sound: Patches | None = None
    unheard: str | None = None
    content: str = ""


@dataclass(frozen=True)
class _Raw:
    """A sample as it is read; media are ("image" or "video", bytes)."""

    name: str
    label: str | None
    captions: tuple[str | None, ...]
    media: Sequence[tuple[str, bytes]]


@dataclass
class Labelled:
    """The samples of `places`, each once an iteration.

    places: folders of classes, folders of shards, and shards (paths with braces and globs, or addresses).  After an
    iteration, `skipped` has (name, why) of what was passed over, and `unheard` of videos used without their sound.
    Raises ValueError for a place that is none of these, and where nothing at all can be used.
    """

    places: Sequence[str]
    sizes: Sizes
    threads: int = 1
    skipped: list[tuple[str, str]] = field(default_factory=list)
    unheard: list[tuple[str, str]] = field(default_factory=list)

    def __iter__(self) -> Iterator[LabelledSample]:
        self.skipped, self.unheard, used = [], [], 0
        with ThreadPoolExecutor(self.threads) as pool:
            for name, future in self._decoded(pool):
                try:
                    sample = future.result()
                except ImageError as error:
                    self.skipped.append((name, str(error)))
                    continue
                if sample.unheard:
                    self.unheard.append((name, sample.unheard))
                used += 1
                yield sample
        if not used:
            first = f"; the first: {': '.join(self.skipped[0])}" if self.skipped else ""
            raise ValueError(f"none of the samples in {', '.join(self.places)} can be used{first}")

    def _decoded(self, pool: ThreadPoolExecutor) -> Iterator[tuple[str, Future]]:
        flight: deque[tuple[str, Future]] = deque()
        for raw in self._read():
            flight.append((raw.name, pool.submit(decode, raw, self.sizes)))
            if len(flight) > AHEAD * self.threads:
                yield flight.popleft()
        yield from flight

    def _read(self) -> Iterator[_Raw]:
        for place in self.places:
            if os.path.isdir(place) and not (shards := sorted(map(str, Path(place).glob("*.tar")))):
                yield from self._read_folder(place)
                continue
            for shard in shards if os.path.isdir(place) else expand_shards([place], urls=True):
                try:
                    with open_range(shard) as file:
                        yield from self._read_shard(shown(shard), TarSamples(file, _bytes_of))
                except (OSError, ValueError) as error:
                    self.skipped.append((shown(shard), str(error)))

    def _read_shard(self, shard: str, tar: TarSamples) -> Iterator[_Raw]:
        for sample in tar:
            name = f"{shard}: {sample.name}"
            try:
                yield _raw(sample, name)
            except SampleError as error:
                self.skipped.append((name, str(error)))
        if tar.broken:
            self.skipped.append((shard, tar.broken))

    def _read_folder(self, place: str) -> Iterator[_Raw]:
        """A class is a folder in `place`; its files may lie deeper."""
        found = False
        for label in sorted(path for path in Path(place).iterdir() if path.is_dir()):
            for folder, _, names in sorted(os.walk(label)):
                for path in (Path(folder, name) for name in sorted(names)):
                    if kind := KIND_OF_SUFFIX.get(path.suffix.lower()):
                        found = True
                        yield from self._read_file(path, kind, printable(label.name))
        if not found:
            raise ValueError(f"{place} holds neither shards (*.tar) nor folders, one a class, of images or videos")

    def _read_file(self, path: Path, kind: str, label: str) -> Iterator[_Raw]:
        name = printable(str(path))
        try:
            if (size := path.stat().st_size) > MAX_BYTES[kind]:
                raise OSError(f"the file has {size} bytes; the limit is {MAX_BYTES[kind]}")
            yield _Raw(name, label, (), [(kind, path.read_bytes())])
        except OSError as error:
            self.skipped.append((name, str(error)))


# ---------------------------------------------------------------------------------------------------------------------
# One sample


def _bytes_of(member: Member) -> bytes | None:
    """What the pass over a tar takes of a member."""
    return member.read() if member.kind in ("json", "text", "image", "video") else None


def _content_of(sample: Sample) -> dict:
    """What is said of a sample: its json, or what its format makes of its members. Raises SampleError."""
    if sample.problem is not None:
        raise sample.problem
    json, format = next(iter(sample.of_kind("json")), None), format_of(sample)
    if json is None and format is not None and format.matches_incomplete:
        raise SampleError("no json", f"{sample.name} has no .json member and no .txt member")
    said = {} if json is None else load_json(json.taken, sample.name)
    if not isinstance(said, dict):
        raise SampleError("bad json", f"{sample.name} has a json member that is not an object")
    if "label" in said and format is None:
        return said
    return said | contents(sample)[0][1]


def _raw(sample: Sample, name: str) -> _Raw:
    """Raises SampleError for a sample that breaks a rule of shards, or that has no medium."""
    content = _content_of(sample)
    label = content.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | None) or label == "":
        raise SampleError("bad json", f"{sample.name} has a label that is neither a text nor a whole number")
    captions = captions_of(content["turns"], sample.name) if "turns" in content else ()
    media = [(medium.kind, medium.taken) for medium in sample.media]
    if not media:
        raise SampleError("no medium", f"{sample.name} has no image and no video")
    return _Raw(name, None if label is None else printable(str(label)), captions, media)


def captions_of(turns: Sequence[dict], name: str) -> tuple[str | None, ...]:
    """Texts of the assistant's turns without placeholders, None for an empty one, which keeps its place as in training:
    the second is the sound's.  Raises SampleError.
    """
    texts_of(turns, name)
    said = ["".join(texts_of([turn], name)) for turn in turns if turn["role"] == "assistant"]
    return tuple(text or None for text in said)


def decode(raw: _Raw, sizes: Sizes) -> LabelledSample:
    """Raises ImageError where an image or a frame cannot be used; a video without sound is still seen."""
    parts, sound, unheard = [], None, None
    for kind, data in raw.media:
        if kind == "image":
            parts.append(_image(data, sizes))
            continue
        found = probe(io.BytesIO(data), sizes.max_pixels)
        parts += _frames(data, found, sizes)
        if sizes.audio_seconds and sound is None and unheard is None:
            grid = sound_grid(found.duration_ms, sizes.audio_seconds, sizes.vision)
            try:
                pixels_HW3 = spectrogram(io.BytesIO(data), *sizes.vision.pixels_hw(grid))
                sound = Patches.of([(sizes.vision.cut(pixels_HW3), grid)])
            except SoundError as error:
                unheard = str(error)
    return LabelledSample(raw.name, raw.label, raw.captions, Patches.of(parts), sound, unheard, _content(raw.media))


def _content(media: Sequence[tuple[str, bytes]]) -> str:
    """Equal for equal media in the same order."""
    digests = [hashlib.blake2b(data, digest_size=16).digest() for _, data in media]
    return hashlib.blake2b(b"".join(digests), digest_size=16).hexdigest()


def _image(data: bytes, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    height, width = image_size(io.BytesIO(data), sizes.max_pixels)
    grid = sizes.vision.views(height, width)
    pixels_HW3 = decode_image(data, sizes.max_pixels, sizes.vision.pixels_hw(grid))
    return to_patches(pixels_HW3, grid, sizes.vision), grid


def _frames(data: bytes, found: Probe, sizes: Sizes) -> list[tuple[np.ndarray, np.ndarray]]:
    times_ms, level = sample_frames(found.duration_ms, sizes.fps, sizes.video_budget, sizes.video_levels)
    grid = sizes.vision.views(found.height, found.width, level)
    with closing(decode_frames(io.BytesIO(data), times_ms, sizes.max_pixels)) as frames:
        return [(to_patches(pixels_HW3, grid, sizes.vision), grid) for pixels_HW3 in frames]
