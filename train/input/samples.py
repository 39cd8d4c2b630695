"""How a step of samples is divided for the encoder's own stages: a sample, its images, sound and captions, to one rank.

    cost of a sample = encoder FLOPs of its images + those of its text   -> longest-processing-time over the world
    samples of a rank, in order                                         -> chunks of bounded patches and tokens

Every rank has as many chunks as the one with most, so that all make the same calls.

Legend: S samples and I images of the step, R rows that this rank reads, K captions of a sample.
"""

from dataclasses import dataclass

import numpy as np

from tandem.data.planning.corpus import Corpus
from tandem.data.planning.plan import AUDIO, STILL, StepPlan, images_of, ranges
from tandem.data.reading.captions import captions
from tandem.data.reading.reader import Failure, RowBatch
from tandem.parallel.plan.balance import assign_images, cut_in_order, load_max_over_mean
from tandem.train.config.schema import Config
from tandem.train.cost.flops import text_flops
from tandem.train.input.prefetcher import RankShard


@dataclass(frozen=True, kw_only=True)
class SampleRankShard(RankShard):
    """encoding_rank_S: of every sample.  chunks: samples of this rank, chunk by chunk; all ranks have equally many
    chunks.  Its rows are theirs in that order, and after them, where negatives are wanted, those of each one's
    successor."""

    encoding_rank_S: np.ndarray
    chunks: tuple[np.ndarray, ...]
    load_max_over_mean: float


@dataclass(frozen=True)
class Captions:
    """Captions of rows, end to end: caption k of row r is the next length_RK[r, k] of the tokens, row by row."""

    tokens_T: np.ndarray
    length_RK: np.ndarray

    def of(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(tokens end to end, lengths) of caption k of some rows."""
        first_RK = (np.cumsum(self.length_RK) - self.length_RK.ravel()).reshape(self.length_RK.shape)
        length, first = self.length_RK[rows, k], first_RK[rows, k]
        return self.tokens_T[ranges(first, first + length)], length

    def pairs(self, rows: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens of both captions of some rows."""
        both = [np.split(tokens_T, np.cumsum(length)[:-1]) for tokens_T, length in (self.of(rows, 0), self.of(rows, 1))]
        return list(zip(*both, strict=True))


class Samples:
    """The sharding of samples, as rank `rank` of `world` sees it.

    eos_id: the tokenizer's.  wanted: captions that each sample must have, 0 to 2.  negatives: also read the captions of
    each sample's successor.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        rank: int,
        world: int,
        *,
        eos_id: int,
        wanted: int,
        negatives: bool = False,
    ):
        self._config, self._corpus, self._rank, self._world = config, corpus, rank, world
        self._eos_id, self._wanted, self._negatives = eos_id, wanted, negatives

    def shard(self, plan: StepPlan) -> SampleRankShard:
        config, world = self._config, self._world
        count = plan.length_S.size
        patches_I = plan.patches_I
        sample_I = plan.image_sample_I
        cost_S, size_S = np.zeros(count, np.int64), np.zeros(count, np.int64)
        np.add.at(cost_S, sample_I, config.vision.cost(plan.grid_hw_I2))
        np.add.at(size_S, sample_I, patches_I)
        if self._wanted:
            visual_S = np.bincount(sample_I, plan.tokens_I, count).astype(np.int64)
            text_S = np.minimum(plan.length_S - visual_S, self._wanted * config.model.text.max_tokens)
            cost_S += text_flops(config.model.text, text_S)
            size_S += text_S
        encoding_rank_S = assign_images(cost_S, world) if config.parallel.balance else np.arange(count) % world
        chunks_W = [
            cut_in_order(np.flatnonzero(encoding_rank_S == rank), size_S, config.parallel.encoder.chunk_patches)
            for rank in range(world)
        ]
        most = max(1, *map(len, chunks_W))
        mine = chunks_W[self._rank]
        chunks = (*mine, *[np.empty(0, np.int64)] * (most - len(mine)))
        samples = np.concatenate(chunks)
        rows = samples if self._wanted else samples[:0]
        return SampleRankShard(
            image_ids=images_of(plan, samples)[0],
            rows=np.concatenate([rows, (rows + 1) % count]) if self._negatives else rows,
            digest=int(np.dot(encoding_rank_S + 1, np.arange(1, count + 1)) % (1 << 62)),
            encoding_rank_S=encoding_rank_S,
            chunks=chunks,
            load_max_over_mean=load_max_over_mean(cost_S, encoding_rank_S, world),
        )

    def inspect(self, plan: StepPlan, rank_shard: SampleRankShard, text: RowBatch) -> list[Failure]:
        """Samples without an image, without as many captions as wanted, or of two captions without just one sound."""
        samples = np.concatenate(rank_shard.chunks)
        blind = np.bincount(plan.image_sample_I, minlength=plan.length_S.size)[samples] == 0
        sounds, stills = (
            np.bincount(plan.image_sample_I[plan.time_I == time], minlength=plan.length_S.size)[samples]
            for time in (AUDIO, STILL)
        )
        many = ((sounds != 1) | (stills > 0)) & (self._wanted == 2)
        mute = np.zeros(samples.size, bool)
        if self._wanted:
            mute = (self._captions(text).length_RK[: samples.size] == 0).any(axis=1)
        lacks = f"fewer than {self._wanted} captions with a token that is trained and an <eos>"
        found = [(sample, "no caption", lacks) for sample in samples[mute].tolist()]
        found += [(sample, "not one video", "not just one video with sound") for sample in samples[many].tolist()]
        found += [(sample, "no image", "no image") for sample in samples[blind].tolist()]
        failures = []
        for sample, reason, what in found:
            shard = self._corpus.shard_name(int(plan.shard_S[sample]))
            failures.append(Failure(sample, shard, reason, f"sample {plan.index_S[sample]} of {shard} has {what}"))
        return failures

    def count(self, rank_shard: SampleRankShard, text: RowBatch) -> int:
        return int(self._captions(text).length_RK[: sum(map(len, rank_shard.chunks))].sum())

    def complete(self, plan: StepPlan, rank_shard: SampleRankShard, text: RowBatch) -> Captions:
        return self._captions(text)

    def _captions(self, text: RowBatch) -> Captions:
        most = self._config.model.text.max_tokens
        tokens_T, length_RK = captions(text.tokens, text.trained, self._wanted, most, self._eos_id)
        return Captions(tokens_T, length_RK)
