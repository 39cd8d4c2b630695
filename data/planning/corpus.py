"""What a run trains on: sources, each a catalog of shards with its own settings, under one numbering of shards.

    source 0: shards 0 .. K0    source 1: shards K0 .. K0 + K1    ...

A plan names a sample by (shard, index) in this numbering; the corpus says which file that is.
"""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tandem.data.formats.in_place import AUTO, find_format
from tandem.data.media.turns import ROLES
from tandem.data.shards.catalog import Catalog, open_catalog
from tandem.data.shards.index import ShardIndex

CACHED_INDEXES = 4096  # an opened index is small: its records are mapped only while they are used
MAX_DOMAINS = 1 << 15  # domains are stored as int16


@dataclass(frozen=True)
class SourceSettings:
    """One source of a mixture. Raises ValueError for a value that cannot work.

    weight: share of the samples, relative to the other sources' weights; None for all sources to follow from their
    sizes: then a source gives min(samples of its epoch, max_samples) * repeat samples while the others give theirs.
    entity_cap, rare_domain_copies: see data/planning/order.py. train_roles: whose turns are trained on. fps: frames
    taken from a second of video. format: that all its shards must have been indexed as, AUTO for any.
    """

    name: str
    shards: tuple[str, ...]  # paths or patterns of shards, or one .catalog file
    weight: float | None = None
    repeat: float = 1.0
    max_samples: int | None = None
    entity_cap: int | None = None
    rare_domain_copies: int = 1
    train_roles: tuple[str, ...] = ("assistant",)
    fps: float = 1.0
    format: str = AUTO

    def __post_init__(self):
        key = f"data.sources.{self.name}"
        if not self.shards:
            raise ValueError(f"{key}.shards is empty: name shards (paths or brace patterns) or one .catalog file")
        for name in ("weight", "repeat", "fps"):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{key}.{name}={value}: must be a number above 0")
        for name in ("max_samples", "entity_cap", "rare_domain_copies"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key}.{name}={value}: must be a whole number, at least 1")
        for name, default in (("repeat", 1), ("max_samples", None)):
            if self.weight is not None and getattr(self, name) != default:
                raise ValueError(
                    f"{key} has weight={self.weight} and {name}={getattr(self, name)}: a weight already says how often "
                    f"the source is visited; leave one of them out"
                )
        if self.format != AUTO:
            try:
                find_format(self.format)
            except ValueError as error:
                raise ValueError(f"{key}.format={self.format}: {error}") from error
        unknown = set(self.train_roles) - set(ROLES)
        if unknown or not self.train_roles:
            raise ValueError(f"{key}.train_roles={list(self.train_roles)}: choose some of {', '.join(ROLES)}")


@dataclass(frozen=True)
class Source:
    """One source and where its shards begin in the corpus."""

    settings: SourceSettings
    catalog: Catalog
    first_shard: int


class Corpus:
    """Sources under one numbering of shards. Indexes are opened when asked for; usable from several threads."""

    def __init__(self, settings: Sequence[SourceSettings], catalogs: Sequence[Catalog], tokenizer_sha256: str):
        _check_together(settings)
        first_C1 = np.cumsum([0, *(catalog.n_shards for catalog in catalogs)])
        for one, catalog in zip(settings, catalogs, strict=True):
            if catalog.n_samples == 0:
                raise ValueError(f"data.sources.{one.name}: its {catalog.n_shards} shards hold no usable sample")
            if one.format != AUTO and (others := set(catalog.formats) - {one.format}):
                raise ValueError(
                    f"data.sources.{one.name}.format={one.format}, but some of its shards were indexed as "
                    f"{', '.join(sorted(others))}; set it to {AUTO}, or index them again with --format {one.format}"
                )
        self.sources = tuple(
            Source(one, catalog, int(first))
            for one, catalog, first in zip(settings, catalogs, first_C1[:-1], strict=True)
        )
        self.tokenizer_sha256 = tokenizer_sha256
        self.n_shards = int(first_C1[-1])
        self.domains: tuple[str, ...] = tuple(sorted({name for catalog in catalogs for name in catalog.domains}))
        if len(self.domains) > MAX_DOMAINS:
            raise ValueError(f"the samples name {len(self.domains)} domains; at most {MAX_DOMAINS} can be told apart")
        number = {name: i for i, name in enumerate(self.domains)}
        self._domains_of = [np.array([number[name] for name in catalog.domains], np.int16) for catalog in catalogs]
        self._first_C = first_C1[:-1]
        self._lock = threading.Lock()
        self._indexes: OrderedDict[int, ShardIndex] = OrderedDict()

    @classmethod
    def open(cls, settings: Sequence[SourceSettings], tokenizer_sha256: str) -> "Corpus":
        """Opens the catalog of every source. Raises ValueError for what is missing or made with another tokenizer."""
        _check_together(settings)
        return cls(settings, [open_catalog(one.shards, tokenizer_sha256) for one in settings], tokenizer_sha256)

    def source_of(self, shard: int | np.ndarray):
        """Number of the source of a shard, or of each shard of an array."""
        return np.searchsorted(self._first_C, shard, side="right") - 1

    def shard_name(self, shard: int) -> str:
        """Path or URL of a shard."""
        source, local = self._local(shard)
        return source.catalog.shard(local)

    def index(self, shard: int) -> ShardIndex:
        """The index of a shard, opened once while it stays among the latest used."""
        with self._lock:
            if shard in self._indexes:
                self._indexes.move_to_end(shard)
                return self._indexes[shard]
        source, local = self._local(shard)
        index = source.catalog.index(local)
        with self._lock:
            self._indexes[shard] = index
            while len(self._indexes) > CACHED_INDEXES:
                self._indexes.popitem(last=False)
        return index

    def group_domains(self, shard: int) -> np.ndarray:
        """Domain of each group of a shard's index, numbers into `domains`, int16."""
        source, local = self._local(shard)
        first, last = source.catalog.group_start_K1[local : local + 2]
        return self._domains_of[int(self.source_of(shard))][source.catalog.group_domain_X[first:last]]

    def _local(self, shard: int) -> tuple[Source, int]:
        source = self.sources[int(self.source_of(shard))]
        return source, int(shard) - source.first_shard


def _check_together(settings: Sequence[SourceSettings]) -> None:
    names = [one.name for one in settings]
    if not names:
        raise ValueError("data.sources is empty: name at least one source with its shards")
    if len(set(names)) < len(names):
        raise ValueError(f"data.sources names a source twice: {', '.join(names)}")
    without = [one.name for one in settings if one.weight is None]
    if without and len(without) < len(names):
        raise ValueError(
            f"data.sources: {', '.join(without)} has no weight, but others have; give every source a weight or none"
        )
