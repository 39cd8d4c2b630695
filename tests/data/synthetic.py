"""Corpora in memory, without a tar: index records and catalogs as the files would give them, of any size at once; and
what their plans must say, token by token."""

import zlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.stream import StreamConfig
from tandem.data.shards.index import EVENT, IMAGE, MEDIA, SAMPLE, VIDEO


def stream_config(**settings) -> StreamConfig:
    """A stream's settings, with values for those that a test does not care about."""
    others = {
        "video_budget": 81920,
        "video_levels": (640, 512, 384, 256, 160, 128),
        "block_samples": 1024,
        "window_shards": 32,
        "too_long": "refuse",
        "audio_seconds": 0,
    }
    return StreamConfig(**others | settings)


@dataclass(frozen=True)
class Medium:
    """A still image, or with a duration a video; `at` counts the sample's text tokens before its content."""

    at: int
    height: int = 56
    width: int = 56
    duration_ms: int = 0
    events: tuple[tuple[int, int], ...] = ()  # (time in ms, tokens)
    audio: bool = False


@dataclass(frozen=True)
class Sample:
    text_tokens: int
    media: tuple[Medium, ...] = ()
    domain: str = "text"
    entity: str | None = None


class MemoryShard:
    """What a ShardIndex has, from arrays or from samples."""

    def __init__(self, samples, media, events, groups):
        self.samples, self.media, self.events, self.groups = samples, media, events, groups  # [(domain, entity)]
        self.n_samples = len(samples)

    @classmethod
    def of(cls, samples: list[Sample]) -> "MemoryShard":
        groups, records, media, events = {}, [], [], []
        for sample in samples:
            group = groups.setdefault((sample.domain, sample.entity), len(groups))
            records.append((0, 0, 0, sample.text_tokens, len(media), len(sample.media), 0, group))
            for m in sample.media:
                kind = VIDEO if m.duration_ms else IMAGE
                media.append((0, 0, 0, m.height, m.width, m.at, m.duration_ms, 25, len(events), kind, m.audio, 0))
                events += m.events
        return cls(np.array(records, SAMPLE), np.array(media, MEDIA), np.array(events, EVENT), list(groups))


class MemoryCatalog:
    """What a Catalog has, over shards in memory. `opened` counts the indexes asked for."""

    def __init__(self, shards: list[MemoryShard]):
        self.shards, self.opened = shards, Counter()
        self.n_shards = len(shards)
        self.samples_K = np.array([shard.n_samples for shard in shards], np.int64)
        self.n_samples = int(self.samples_K.sum())
        self.domains = tuple(sorted({domain for shard in shards for domain, _ in shard.groups}))
        entities = {entity: None for shard in shards for _, entity in shard.groups if entity is not None}
        number = {entity: i for i, entity in enumerate(entities)}
        self.n_entities = len(number)
        self.group_start_K1 = np.cumsum([0, *(len(shard.groups) for shard in shards)])
        rows = [group for shard in shards for group in shard.groups]
        self.group_domain_X = np.array([self.domains.index(domain) for domain, _ in rows], np.int32)
        self.group_entity_X = np.array([number.get(entity, -1) for _, entity in rows], np.int32)
        counts = [np.bincount(shard.samples["group"], minlength=len(shard.groups)) for shard in shards]
        self.group_samples_X = np.concatenate(counts)
        self.entity_samples_E = np.zeros(self.n_entities, np.int64)
        self.group_base_X = np.zeros(len(rows), np.int64)
        for row, entity in enumerate(self.group_entity_X):
            if entity >= 0:
                self.group_base_X[row] = self.entity_samples_E[entity]
                self.entity_samples_E[entity] += self.group_samples_X[row]
        self.digest = zlib.crc32(self.samples_K.tobytes() + self.group_samples_X.tobytes())

    def shard(self, k: int) -> str:
        return f"memory-{k:04}.tar"

    def index(self, k: int) -> MemoryShard:
        self.opened[k] += 1
        return self.shards[k]


def random_shards(n_shards: int, samples: int, seed: int, images: float = 1.5, median: float = 400, sigma: float = 0.9):
    """Shards of log-normal text lengths with a few photographs a sample."""
    rng, shards = np.random.default_rng(seed), []
    for _ in range(n_shards):
        record, count = np.zeros(samples, SAMPLE), rng.poisson(images, samples)
        record["text_tokens"] = np.clip(rng.lognormal(np.log(median), sigma, samples), 4, 1e6) + 2 * count
        record["first_media"], record["media"] = np.cumsum(count) - count, count
        record["group"] = rng.integers(0, 4, samples)
        media = np.zeros(count.sum(), MEDIA)
        media["height"], media["width"] = rng.integers(100, 800, (2, len(media)))
        media["at"] = 2 + np.arange(len(media)) - np.repeat(record["first_media"], count)
        shards.append(MemoryShard(record, media, np.zeros(0, EVENT), [(f"domain{d}", None) for d in range(4)]))
    return shards


def corpus_of(*sources: list[MemoryShard], settings: list[dict] | None = None) -> Corpus:
    """A corpus of sources a, b, c ..., with further settings of each."""
    settings = settings or [{} for _ in sources]
    named = [
        SourceSettings(name="abcdefghijklmnopqrstuvwxyz"[i], shards=("memory",), **one)
        for i, one in enumerate(settings)
    ]
    return Corpus(named, [MemoryCatalog(shards) for shards in sources], "tokenizer")


def stamp_lengths(times_ms: np.ndarray) -> np.ndarray:
    """A stamp of one token a digit before the point, and four more."""
    return np.array([len(str(int(time) // 1000)) + 4 for time in times_ms], np.int64)


def positions_one_by_one(plan, row: int, cu: np.ndarray) -> list[list[int]]:
    """What `row_positions_thw` is to give, token by token."""
    sides = {
        int(start): (grid // 2).tolist()
        for start, grid, of in zip(plan.start_I, plan.grid_hw_I2, plan.row_I, strict=True)
        if of == row
    }
    out, following = [], 0
    while len(out) < plan.seq_length:
        if len(out) in cu:
            following = 0
        if len(out) not in sides:
            out.append([following] * 3)
            following += 1
        else:
            down, across = sides[len(out)]
            out += [[following, following + y, following + x] for y in range(down) for x in range(across)]
            following += max(down, across)
    return out
