"""The stream of training steps, computed from the indexes alone.

    slots 0, 1, 2 ...  -> which source (mixture) -> which of its samples (order)
    blocks of slots    -> rows                   -> steps of rows_per_step rows

Every rank computes the same steps without talking to the others, whatever the world size, and reads later only what it
uses. A row is packed with samples up to seq_length, or is one sample and as long as the step's longest. The state is
the slot where the current block begins, the samples carried into it, and how many of its rows are spent; from a state
the continuation is always the same. Every source repeats its epochs for ever, each with its own shuffle.

Shapes: S samples of a step, I images of a step, N samples of a block, R rows of a block.
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from fractions import Fraction
from typing import Any

import numpy as np

from tandem.data.media.audio import sound_grid
from tandem.data.planning.corpus import Corpus, Source
from tandem.data.planning.mixture import Mixture
from tandem.data.planning.order import ROWS, SourceOrder, permutation
from tandem.data.planning.packing import pack_block
from tandem.data.planning.plan import StepPlan
from tandem.data.planning.view import IMAGE_TOO_LONG, NO_SOUND, REASONS, Resolution, Views
from tandem.data.vision import OLDEST, VisionSpec, changed

CHUNK_SLOTS = 8192  # slots looked up together, whole blocks of them
_KEYS = {"seq_length": "train.seq_length", "rows_per_step": "train.global_batch_size", "seed": "train.seed"}


@dataclass(frozen=True)
class StreamConfig:
    """What decides the stream, besides the corpus. Raises ValueError for a value that cannot work."""

    seq_length: int
    rows_per_step: int  # the global batch
    seed: int
    vision: VisionSpec
    video_budget: int  # visual tokens of one video
    video_levels: tuple[int, ...]  # tokens of a frame, falling
    block_samples: int  # lookahead of the packing
    window_shards: int  # shards of a source shuffled together
    too_long: str  # refuse or cut
    audio_seconds: float  # heard of each video, at most; 0: no sound is read
    rows: str = "packed"  # or samples: each a row of its own, at most seq_length long

    def __post_init__(self):
        levels = self.video_levels
        for field in fields(self):
            if field.name in ("vision", "video_levels", "too_long", "rows", "audio_seconds"):
                continue
            key, value = (
                _KEYS.get(field.name, f"data.{field.name}").replace("video_", "video."),
                getattr(self, field.name),
            )
            least = {"seed": 0}.get(field.name, 1)
            if not isinstance(value, int) or not least <= value < 1 << 62:
                raise ValueError(f"{key}={value!r}: must be a whole number, at least {least}")
        if not levels or list(levels) != sorted(set(levels), reverse=True) or levels[-1] < 1:
            raise ValueError(f"data.video.levels={list(levels)}: must be tokens of a frame, falling, at least 1")
        if self.video_budget < levels[-1]:
            raise ValueError(
                f"data.video.budget={self.video_budget}: is below the last of data.video.levels={list(levels)}"
            )
        if self.too_long not in ("refuse", "cut"):
            raise ValueError(f"data.too_long={self.too_long}: must be one of cut, refuse")
        if self.rows not in ("packed", "samples"):
            raise ValueError(f"rows of {self.rows!r}; they must be packed or samples")
        self._check_sound()

    def _check_sound(self) -> None:
        seconds = self.audio_seconds
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise ValueError(f"data.audio_seconds={seconds!r}: must be a number of seconds, 0 for no sound")
        patches = int(sound_grid(seconds * 1000, seconds, self.vision).prod()) if seconds else 0
        if patches > self.vision.max_patches:
            raise ValueError(
                f"data.audio_seconds is {seconds}, which makes pictures of sound of {patches} patches, above "
                f"data.max_patches, {self.vision.max_patches}; lower one or raise the other"
            )

    @property
    def resolution(self) -> Resolution:
        return Resolution(**{field.name: getattr(self, field.name) for field in fields(Resolution)})


@dataclass(frozen=True)
class _Block:
    """A packed block: samples sorted by emitted row, and the cursor where the next block begins."""

    shard_N: np.ndarray
    index_N: np.ndarray
    row_start_R1: np.ndarray  # borders of the rows in the arrays above
    refused: dict[str, int]
    following: dict


class Stream:
    """Iterator over steps. stamp_lengths: tokens of the stamps of times in milliseconds (Tokenizer.stamp_lengths).

    Raises ValueError at once if a source has no sample that fits a row.
    """

    def __init__(self, corpus: Corpus, config: StreamConfig, stamp_lengths: Callable[[np.ndarray], np.ndarray]):
        self.corpus, self.config, self.domains = corpus, config, corpus.domains
        windows = sum(min(config.window_shards, source.catalog.n_shards) for source in corpus.sources)
        # A step can hold the end of one window of every source and the beginning of its next.
        self._views = Views(corpus, config.resolution, stamp_lengths, 2 * windows)
        self._orders = [self._order(number, source) for number, source in enumerate(corpus.sources)]
        self._mixture = Mixture(
            [
                weight_of(source, order.samples_per_epoch)
                for source, order in zip(corpus.sources, self._orders, strict=True)
            ]
        )
        for source in corpus.sources:
            self._check_something_fits(source)
        self._fingerprint = self._decides_order()
        self._state: dict[str, Any] = {
            "step": 0,
            "slot": 0,  # where the current block begins, a multiple of block_samples
            "carried": [],  # [shard, index] of samples carried into the current block
            "row": 0,  # rows of the current block already spent
            "refused": {},  # in blocks before the current one, by reason
            "fingerprint": self._fingerprint,
            "vision": config.vision.identity,
        }
        self._block: _Block | None = None
        self._chunk: tuple[int, tuple[np.ndarray, ...]] | None = None

    def state(self) -> dict:
        """Plain ints and lists, fit for JSON."""
        return json.loads(json.dumps(self._state))

    def load_state(self, state: dict) -> None:
        """Continue from state(). Raises ValueError if the shards or the settings that decide the order differ.

        A state of before there was a `vision` is one of OLDEST.
        """
        state = {"vision": OLDEST} | state
        if set(state) != set(self._state):
            raise ValueError(f"the data state has keys {sorted(state)}; expected {sorted(self._state)}")
        if other := changed(state["vision"], self.config.vision.identity):
            raise ValueError(f"the data state belongs to other patches: {other}; restore them or start the data anew")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the data state belongs to another stream: data.sources (shards, weight, repeat, max_samples, "
                "entity_cap, rare_domain_copies, fps), data.tokenizer, train.seed, train.seq_length, data.min_patches, "
                "data.max_patches, data.video, data.audio_seconds, data.block_samples, data.window_shards, "
                "data.too_long or the kind of rows changed since it was saved; restore them or start the data anew"
            )
        self._state = json.loads(json.dumps(state))
        self._block = None

    @property
    def samples_per_epoch(self) -> int:
        """Distinct samples that can be in a row, of all sources. Looks at every shard."""
        return sum(int((self._views.of(shard).refused_N == 0).sum()) for shard in range(self.corpus.n_shards))

    @property
    def refused(self) -> dict[str, int]:
        """Samples passed over so far, by reason, up to the current block."""
        return dict(self._state["refused"])

    def next_step(self) -> StepPlan:
        """The next rows_per_step rows."""
        wanted, parts, row = self.config.rows_per_step, [], 0
        while row < wanted:
            block = self._current_block()
            first, last = self._state["row"], min(len(block.row_start_R1) - 1, self._state["row"] + wanted - row)
            begin, end = block.row_start_R1[first], block.row_start_R1[last]
            sizes = np.diff(block.row_start_R1[first : last + 1])
            row_n = np.repeat(np.arange(row, row + last - first), sizes)
            parts.append((block.shard_N[begin:end], block.index_N[begin:end], row_n))
            row += last - first
            self._state["row"] = last
            if last == len(block.row_start_R1) - 1:
                self._advance(block)
        self._state["step"] += 1
        shard_S, index_S, row_S = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return self._plan(shard_S, index_S, row_S)

    # -----------------------------------------------------------------------------------------------------------------
    # Blocks

    def _current_block(self) -> _Block:
        if self._block is None:
            self._block = self._make_block()
        return self._block

    def _advance(self, block: _Block) -> None:
        refused = dict(self._state["refused"])
        for reason, count in block.refused.items():
            refused[reason] = refused.get(reason, 0) + count
        self._state = {**self._state, **block.following, "row": 0, "refused": refused}
        self._block = None

    def _make_block(self) -> _Block:
        """The block at the cursor: a run of slots, packed with the carried samples or not; its rows shuffled."""
        config, slot = self.config, self._state["slot"]
        shard_N, index_N, length_N, refused_N = self._slots(slot)
        refused = np.bincount(refused_N, minlength=len(REASONS)).tolist()
        carried = np.array(self._state["carried"], np.int64).reshape(-1, 2)
        fits_N, carried_length = refused_N == 0, self._views.gather(*carried.T, "length_N")[0]
        shard_N = np.concatenate([carried[:, 0], shard_N[fits_N]])
        index_N = np.concatenate([carried[:, 1], index_N[fits_N]])
        length_N = np.concatenate([carried_length, length_N[fits_N]])

        if config.rows == "samples":
            row_N, open_row = np.arange(len(length_N)), -1
        else:
            row_N, open_row = pack_block(length_N, len(carried), config.seq_length)
        open_N = row_N == open_row
        following = {"slot": slot + config.block_samples, "carried": np.stack([shard_N, index_N], 1)[open_N].tolist()}
        kept_N = np.flatnonzero(~open_N)
        rows, row_N = np.unique(row_N[kept_N], return_inverse=True)
        rank_R = permutation(len(rows), config.seed, 0, slot // config.block_samples, 0, ROWS)
        order_N = kept_N[np.argsort(rank_R[row_N], kind="stable")]
        row_start_R1 = np.concatenate([[0], np.cumsum(np.bincount(rank_R[row_N], minlength=len(rows)))])
        counts = {reason: count for reason, count in zip(REASONS[1:], refused[1:], strict=True) if count}
        return _Block(shard_N[order_N], index_N[order_N], row_start_R1, counts, following)

    def _slots(self, slot: int) -> tuple[np.ndarray, ...]:
        """(shard, index, tokens, reason of refusal) of the samples of the block that begins at this slot."""
        block = self.config.block_samples
        blocks = max(CHUNK_SLOTS // block, 1)
        number, within = divmod(slot // block, blocks)
        if self._chunk is None or self._chunk[0] != number:
            shard_N, index_N = self._samples(number * blocks * block, blocks * block)
            self._chunk = (number, (shard_N, index_N, *self._views.gather(shard_N, index_N, "length_N", "refused_N")))
        return tuple(column[within * block : (within + 1) * block] for column in self._chunk[1])

    def _samples(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """(shard, index) of the samples at the slots first .. first + count."""
        source_N = self._mixture.block(first, count)
        shard_N, index_N = np.empty(count, np.int64), np.empty(count, np.int64)
        for number, before in enumerate(self._mixture.counts(first)):
            here_N = np.flatnonzero(source_N == number)
            local_n, index_N[here_N] = self._orders[number].take(before, len(here_N))
            shard_N[here_N] = local_n + self.corpus.sources[number].first_shard
        return shard_N, index_N

    def _order(self, number: int, source: Source) -> SourceOrder:
        return SourceOrder(
            source.catalog,
            source.settings.entity_cap,
            source.settings.rare_domain_copies,
            self.config.seed,
            self.config.window_shards,
            number,
            lambda shard: self.corpus.index(source.first_shard + shard),
        )

    def _check_something_fits(self, source: Source) -> None:
        smallest = None
        for shard in range(source.first_shard, source.first_shard + source.catalog.n_shards):
            view = self._views.of(shard)
            if (view.refused_N == 0).any():
                return
            if len(view.length_N) and (smallest is None or view.length_N.min() < smallest[0]):
                sample = int(view.length_N.argmin())
                smallest = (int(view.length_N[sample]), sample, shard, REASONS[view.refused_N[sample]])
        assert smallest is not None, "a source without samples is refused when its catalog is read"
        length, sample, shard, reason = smallest
        if reason == NO_SOUND:
            raise ValueError(
                f"{reason}: data.audio_seconds is {self.config.audio_seconds}, but the smallest sample of data.sources."
                f"{source.settings.name} (number {sample} of {self.corpus.shard_name(shard)}) has none, nor has any "
                f"other that fits a row; set data.audio_seconds to 0 or give videos with sound"
            )
        raise ValueError(
            f"{reason}: train.seq_length is {self.config.seq_length}, but the smallest sample of data.sources."
            f"{source.settings.name} (number {sample} of {self.corpus.shard_name(shard)}) needs {length} tokens; raise "
            + ("train.seq_length or lower data.max_patches" if reason == IMAGE_TOO_LONG else "train.seq_length")
        )

    def _decides_order(self) -> int:
        """63 bits of what fixes the order of rows. The batch size is not part: a state counts rows, not steps."""
        vision = self.config.vision  # its other values are compared by themselves, to be named
        config = {key: value for key, value in asdict(self.config).items() if key not in ("rows_per_step", "vision")}
        config |= {"min_patches": vision.min_patches, "max_patches": vision.max_patches}
        undecisive = ("name", "shards", "train_roles", "format")  # a catalog's digest has the formats
        sources = [
            (
                {key: value for key, value in asdict(source.settings).items() if key not in undecisive},
                source.catalog.digest,
            )
            for source in self.corpus.sources
        ]
        raw = json.dumps([config, sources, self.corpus.tokenizer_sha256], sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1

    # -----------------------------------------------------------------------------------------------------------------
    # The plan

    def _plan(self, shard_S: np.ndarray, index_S: np.ndarray, row_S: np.ndarray) -> StepPlan:
        length_S, domain_S, cut_S, first_S, images_S = self._views.gather(
            shard_S, index_S, "length_N", "domain_N", "cut_N", "first_image_N", "images_N"
        )
        before_S = np.cumsum(length_S) - length_S
        start_S = before_S - before_S[np.searchsorted(row_S, row_S)]
        sample_I = np.repeat(np.arange(len(shard_S)), images_S)
        within_I = np.arange(len(sample_I)) - np.repeat(np.cumsum(images_S) - images_S, images_S)
        media_I, time_I, grid_hw_I2, tokens_I, offset_I = self._views.gather(
            shard_S[sample_I], first_S[sample_I] + within_I, "media_I", "time_I", "grid_hw_I2", "tokens_I", "offset_I"
        )

        def narrow(values: np.ndarray) -> np.ndarray:
            return values.astype(np.int32)

        return StepPlan(
            step=self._state["step"] - 1,
            seq_length=self.config.seq_length if self.config.rows == "packed" else int(length_S.max()),
            shard_S=narrow(shard_S),
            index_S=narrow(index_S),
            row_S=narrow(row_S),
            start_S=narrow(start_S),
            length_S=narrow(length_S),
            domain_S=domain_S,
            cut_S=cut_S,
            image_sample_I=narrow(sample_I),
            image_media_I=narrow(media_I),
            time_I=narrow(time_I),
            grid_hw_I2=narrow(grid_hw_I2.reshape(-1, 2)),
            tokens_I=narrow(tokens_I),
            row_I=narrow(row_S[sample_I]),
            start_I=narrow(start_S[sample_I] + offset_I),
            state_after=self.state(),
        )


def weight_of(source: Source, samples_per_epoch: int) -> Fraction:
    """Weight of a source in the mixture: as set, or else the samples that it gives while others give an epoch."""
    settings = source.settings
    if settings.weight is not None:
        return Fraction(str(settings.weight))
    most = samples_per_epoch if settings.max_samples is None else min(samples_per_epoch, settings.max_samples)
    return most * Fraction(str(settings.repeat))
