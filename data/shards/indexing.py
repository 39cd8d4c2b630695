"""Building the index of a shard: one sequential pass over a plain tar in webdataset naming (data/shards/tars.py).

Nothing in the tar is trusted. Damaged samples are left out and counted by reason; a damaged tar is indexed up to the
byte where it breaks. Of an image only the header is decoded, of a video the container's header and its first frame.
Members that are neither the json nor a medium are passed over.
"""

import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tandem.data.media.image import MAX_PIXELS, ImageError, image_size
from tandem.data.media.text import SampleError, Tokenizer, parse_sample
from tandem.data.shards.index import EVENT, IMAGE, MEDIA, SAMPLE, SUFFIX, VIDEO, ShardIndex, load_index, write_index
from tandem.data.shards.storage import base_name, is_url, open_range, shown
from tandem.data.shards.tars import Member, Sample, TarSamples

MAX_MEDIA = (1 << 16) - 1  # of a sample, as its record counts them in 16 bits


@dataclass
class IndexReport:
    """What indexing one shard found. `broken` is a sentence with the byte where a damaged tar ends, else None."""

    shard: str
    samples: int = 0
    images: int = 0
    videos: int = 0
    skipped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> sentence about the first such sample
    broken: str | None = None

    @classmethod
    def of(cls, index: ShardIndex) -> "IndexReport":
        """The report of an index made earlier, without examples."""
        videos = int(np.count_nonzero(index.media["kind"] == VIDEO))
        counts = (index.n_samples, index.n_media - videos, videos)
        return cls(shown(index.shard), *counts, Counter(index.skipped), {}, index.broken)

    def skip(self, error: SampleError) -> None:
        self.skipped[error.reason] += 1
        self.examples.setdefault(error.reason, str(error))

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        media = f"{self.images} images" + (f", {self.videos} videos" if self.videos else "")
        out = [f"{self.shard}: {self.samples} samples, {media}"]
        for reason, n in self.skipped.items():
            example = f" (first: {self.examples[reason]})" if reason in self.examples else ""
            out.append(f"  skipped {n}: {reason}{example}")
        return out + ([f"  {self.broken}"] if self.broken else [])


def build_index(shard: str | Path, tokenizer: Tokenizer, path: str | Path | None = None) -> IndexReport:
    """Write the index of a shard, `<shard>.index` where no path is given. The file appears whole or not at all.

    Raises ValueError if the shard is not an uncompressed tar, OSError if it cannot be read.
    """
    shard = str(shard)
    report = IndexReport(shown(shard))
    samples: list[tuple] = []
    media: list[tuple] = []
    events: list[tuple] = []
    groups: dict[tuple[str, str | None], list[int]] = {}  # -> [number, samples]
    with open_range(shard) as file:
        tar = TarSamples(file, _taken)
        for sample in tar:
            try:
                record, found, said, group = _records(sample, tokenizer, len(media), len(events))
            except SampleError as error:
                report.skip(error)
                continue
            number = groups.setdefault(group, [len(groups), 0])
            number[1] += 1
            samples.append((*record, number[0]))
            media += found
            events += said
    report.broken, kinds = tar.broken, Counter(medium[-3] for medium in media)
    report.samples, report.images, report.videos = len(samples), kinds[IMAGE], kinds[VIDEO]
    header = {
        "shard": base_name(shard),
        "shard_bytes": file.size,
        "stamp": file.stamp,
        "tokenizer_sha256": tokenizer.sha256,
        "groups": [[*group, n] for group, (_, n) in groups.items()],
        "skipped": dict(report.skipped),
        "broken": report.broken,
    }
    records = (np.array(samples, SAMPLE), np.array(media, MEDIA), np.array(events, EVENT))
    write_index(str(path or shard + SUFFIX), header, *records)
    return report


def is_current(shard: str | Path, tokenizer: Tokenizer, path: str | Path | None = None) -> bool:
    """Whether the shard has a whole index, made of it as it is now with this tokenizer. Raises OSError."""
    try:
        index = load_index(shard, tokenizer.sha256, path)
    except ValueError:
        return False
    if not is_url(index.shard):
        return True
    with open_range(index.shard) as file:
        return (file.size, file.stamp) == (index.shard_bytes, index.stamp)


def _taken(member: Member) -> bytes | tuple[Any, ...] | None:
    """What the index needs of a member: the bytes of the json; of a medium its offset, size, crc, height, width,
    duration in ms, frames a second, kind and audio. Raises SampleError.
    """
    if member.kind == "json":
        return member.read()
    if member.kind == "other":
        return None
    place = (member.offset, member.size)
    crc, file = member.checksum()
    try:
        if member.kind == "image":
            return (*place, crc, *image_size(file, MAX_PIXELS), 0, 0.0, IMAGE, 0)
        from tandem.data.media.video import probe  # loads FFmpeg, which shards of images do without

        found = probe(file)
        return (*place, crc, found.height, found.width, found.duration_ms, found.fps, VIDEO, int(found.audio))
    except ImageError as error:
        raise SampleError(f"unreadable {member.kind}", str(error)) from error


def _records(
    sample: Sample, tokenizer: Tokenizer, first_media: int, first_event: int
) -> tuple[tuple, list, list, tuple]:
    """(SAMPLE record without its group, MEDIA records, EVENT records, (domain, entity)). Raises SampleError."""
    json, media = sample.sound(), sample.media
    if len(media) > MAX_MEDIA:
        raise SampleError("too many media", f"{sample.name} has {len(media)} media; the limit is {MAX_MEDIA}")
    content = parse_sample(json.taken, sample.name)
    encoded = tokenizer.encode_sample(content["turns"], (), [medium.kind for medium in media], sample.name)
    found: list[tuple] = []
    said: list[tuple] = []
    for medium, at, events in zip(media, encoded.media_at_M.tolist(), encoded.events_M, strict=True):
        (*place, height, width, duration_ms, fps, kind, audio) = medium.taken
        found.append((*place, height, width, at, duration_ms, fps, first_event + len(said), kind, audio, 0))
        said += [(event.time_ms, len(event.tokens)) for event in events]
    record = (json.offset, json.size, zlib.crc32(json.taken), len(encoded.tokens_T), first_media, len(media), 0)
    return record, found, said, (content["domain"], content["entity"])
