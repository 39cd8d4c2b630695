"""Building the index of a shard: one sequential pass over a plain tar in webdataset naming (data/shards/tars.py).

Nothing in the tar is trusted. Damaged samples are left out and counted by reason; a damaged tar is indexed up to the
byte where it breaks. Of an image only the header is decoded, of a video the container's header and its first frame.
The format of the samples (data/formats/in_place) is the given one, or the one that most of the first samples fit;
members that it does not use are passed over.
"""

import zlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

import numpy as np

from tandem.data.formats.in_place import AUTO, TEXTS, Entry, Format, find_format, format_of, likely_format
from tandem.data.media.image import MAX_PIXELS, ImageError, image_size
from tandem.data.media.text import Tokenizer
from tandem.data.media.turns import SampleError
from tandem.data.shards.index import EVENT, IMAGE, MEDIA, SAMPLE, SUFFIX, VIDEO, ShardIndex, load_index, write_index
from tandem.data.shards.storage import base_name, is_url, open_range, shown
from tandem.data.shards.tars import Member, Sample, TarSamples, printable

MAX_MEDIA = (1 << 16) - 1  # of a sample, as its record counts them in 16 bits
LOOKED_AT = 32  # samples that decide the format
_NAMED = 8  # ends of members' names that a report gives
_ROLES = ("assistant",)  # of turns without which a sample counts as untrained


@dataclass
class IndexReport:
    """What indexing one shard found. `broken` is a sentence with the byte where a damaged tar ends, else None."""

    shard: str
    format: str = ""
    samples: int = 0
    images: int = 0
    videos: int = 0
    untrained: int = 0  # samples without a turn of the assistant
    skipped: Counter = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)  # reason -> sentence about the first such sample
    broken: str | None = None
    found: dict[str, int] = field(default_factory=dict)  # members by the ends of their names
    looks_like: str | None = None  # the format that most of the first samples fit

    @classmethod
    def of(cls, index: ShardIndex) -> "IndexReport":
        """The report of an index made earlier, without examples."""
        videos = int(np.count_nonzero(index.media["kind"] == VIDEO))
        return cls(
            shown(index.shard),
            index.format,
            index.n_samples,
            index.n_media - videos,
            videos,
            index.untrained,
            Counter(index.skipped),
            {},
            index.broken,
            index.found,
            index.looks_like,
        )

    def skip(self, error: SampleError) -> None:
        self.skipped[error.reason] += 1
        self.examples.setdefault(error.reason, str(error))

    def lines(self) -> list[str]:
        """The report as a person reads it."""
        media = f"{self.images} images" + (f", {self.videos} videos" if self.videos else "")
        out = [f"{self.shard}: {self.format}, {self.samples} samples, {media}"]
        for reason, n in self.skipped.items():
            example = f" (first: {self.examples[reason]})" if reason in self.examples else ""
            out.append(f"  skipped {n}: {reason}{example}")
        if self.untrained:
            out.append(f"  {self.untrained} samples have no turn of the assistant, the role that is trained by default")
        return out + ([f"  {self.broken}"] if self.broken else [])

    def nothing(self) -> str:
        """Why a shard without a usable sample has none, in one sentence."""
        held = ", ".join(f"{n} {ending}" for ending, n in self.found.items()) or "no member"
        sentence = f"{self.shard} holds no usable sample of format {self.format}: it has {held}"
        if self.looks_like not in (None, self.format):
            return f"{sentence}, which looks like format {self.looks_like}"
        reason = next(iter(self.skipped), None)
        first = f"; the first sample: {self.examples.get(reason, reason)}" if reason else ""
        return f"{sentence}, where {find_format(self.format).members}{first}"


def build_index(
    shard: str | Path,
    tokenizer: Tokenizer,
    path: str | Path | None = None,
    format: str = AUTO,
    prompt: str | None = None,
) -> IndexReport:
    """Write the index of a shard, `<shard>.index` where no path is given. The file appears whole or not at all.

    format: of the samples.  prompt: the user's turn of pairs and videos, with one placeholder; None for that alone.
    Raises ValueError if the shard is not an uncompressed tar or its format has no such prompt, OSError if it cannot be
    read.
    """
    shard, builder = str(shard), _Builder(tokenizer, prompt, None if format == AUTO else find_format(format))
    with open_range(shard) as file:
        tar = TarSamples(file, builder.take)
        samples = iter(tar)
        first = list(islice(samples, LOOKED_AT))
        builder.choose(first)
        for sample in chain(first, samples):
            builder.add(sample)
    report = builder.report(shown(shard), tar.broken)
    header = {
        "shard": base_name(shard),
        "shard_bytes": file.size,
        "stamp": file.stamp,
        "tokenizer_sha256": tokenizer.sha256,
        "groups": [[*group, n] for group, (_, n) in builder.groups.items()],
        "skipped": dict(report.skipped),
        "broken": report.broken,
        "format": report.format,
        "prompt": prompt,
        "untrained": report.untrained,
        "found": report.found,
        "looks_like": report.looks_like,
    }
    records = (np.array(builder.samples, SAMPLE), np.array(builder.media, MEDIA), np.array(builder.events, EVENT))
    write_index(str(path or shard + SUFFIX), header, *records)
    return report


def is_current(
    shard: str | Path,
    tokenizer: Tokenizer,
    path: str | Path | None = None,
    format: str = AUTO,
    prompt: str | None = None,
) -> bool:
    """Whether the shard has a whole index, made of it as it is now as `build_index` would. Raises OSError."""
    try:
        index = load_index(shard, tokenizer.sha256, path)
    except ValueError:
        return False
    if format not in (AUTO, index.format) or prompt != index.prompt or not index.n_samples:
        return False
    if not is_url(index.shard):
        return True
    with open_range(index.shard) as file:
        return (file.size, file.stamp) == (index.shard_bytes, index.stamp)


class _Builder:
    """Records of a shard's samples, gathered one by one."""

    def __init__(self, tokenizer: Tokenizer, prompt: str | None, format: Format | None):
        self.samples: list[tuple] = []
        self.media: list[tuple] = []
        self.events: list[tuple] = []
        self.groups: dict[tuple[str, str | None], list[int]] = {}  # (domain, entity) -> [number, samples]
        self._tokenizer, self._prompt = tokenizer, prompt
        self._format = format or find_format("turns")
        self._chosen = format is not None
        self._uses = None if format is None else format.kinds  # kinds of members; None while all may be used
        self._report = IndexReport("")
        self._found: Counter[str] = Counter()

    def take(self, member: Member) -> bytes | tuple | SampleError | None:
        """What the index needs of a member: the bytes of a text; of a medium its offset, size, crc, height, width,
        duration in ms, frames a second, kind and audio, or why it cannot be used.
        """
        ending = member.rest.rpartition(".")[2].lower()
        self._found["." + ending if len(ending) <= 8 else "others"] += 1
        if member.kind in TEXTS:
            return member.read() if self._uses is None or member.kind in self._uses else None
        if member.kind == "other" or (self._uses is not None and member.kind not in self._uses):
            return None
        try:
            return _looked_at(member)
        except ImageError as error:
            return SampleError(f"unreadable {member.kind}", f"{printable(member.name)}: {error}")

    def choose(self, first: list[Sample]) -> None:
        """Fix the format, by the first samples. Raises ValueError where it has no such prompt."""
        likely = likely_format(sample for sample in first if sample.problem is None)
        if likely is not None and not self._chosen:
            self._format = likely
        self._uses = self._format.kinds
        self._report.format, self._report.looks_like = self._format.name, None if likely is None else likely.name
        self._format.check_prompt(self._prompt)

    def add(self, sample: Sample) -> None:
        """The records of one key, or the reason why it has none."""
        try:
            if sample.problem is not None:
                raise sample.problem
            for entry in self._entries(sample):
                try:
                    self._add(entry)
                except SampleError as error:
                    self._report.skip(error)
        except SampleError as error:
            self._report.skip(error)

    def _entries(self, sample: Sample) -> list[Entry]:
        try:
            return self._format.entries(sample)
        except SampleError as error:
            other = format_of(sample)
            if other in (None, self._format) or other.matches_incomplete:
                raise
            sentence = f"{sample.name} is of format {other.name}, but the shard's is {self._format.name}"
            raise SampleError(f"of format {other.name}, not {self._format.name}", sentence) from error

    def _add(self, entry: Entry) -> None:
        """SAMPLE, MEDIA and EVENT records of one sample. Raises SampleError."""
        name, media = entry.name, entry.media
        if len(media) > MAX_MEDIA:
            raise SampleError("too many media", f"{name} has {len(media)} media; the limit is {MAX_MEDIA}")
        for medium in media:
            if isinstance(medium.taken, SampleError):
                raise SampleError(medium.taken.reason, f"{name}, {medium.taken}")
        text, kinds = entry.text, [medium.kind for medium in media]
        data, plain = (text.data, text.plain) if text else (b"", False)
        content = self._format.content(data, plain, kinds, self._prompt, name)
        encoded = self._tokenizer.encode_sample(content["turns"], _ROLES, kinds, name)
        first_media = len(self.media)
        for medium, at, said in zip(media, encoded.media_at_M.tolist(), encoded.events_M, strict=True):
            (*place, height, width, duration_ms, fps, kind, audio) = medium.taken
            record = (*place, height, width, at, duration_ms, fps, len(self.events), kind, audio, 0)
            self.media.append(record)
            self.events += [(event.time_ms, len(event.tokens)) for event in said]
        said = (event for medium in encoded.events_M for event in medium)
        self._report.untrained += not (encoded.trained_T.any() or any(event.trained.any() for event in said))
        group = self.groups.setdefault((content["domain"], content["entity"]), [len(self.groups), 0])
        group[1] += 1
        place = (text.offset if text else 0, len(data), zlib.crc32(data))
        self.samples.append((*place, len(encoded.tokens_T), first_media, len(media), plain, group[0]))

    def report(self, shard: str, broken: str | None) -> IndexReport:
        report, kinds = self._report, Counter(medium[-3] for medium in self.media)
        report.shard, report.broken, report.found = shard, broken, dict(self._found.most_common(_NAMED))
        report.samples, report.images, report.videos = len(self.samples), kinds[IMAGE], kinds[VIDEO]
        return report


def _looked_at(member: Member) -> tuple:
    """What an index says of a medium. Raises ImageError."""
    place, (crc, file) = (member.offset, member.size), member.checksum()
    if member.kind == "image":
        return (*place, crc, *image_size(file, MAX_PIXELS), 0, 0.0, IMAGE, 0)
    from tandem.data.media.video import probe  # loads FFmpeg, which shards of images do without

    found = probe(file)
    return (*place, crc, found.height, found.width, found.duration_ms, found.fps, VIDEO, int(found.audio))
