"""Divides a batch of a plan into jobs of about equal cost. Takes plans and records, returns jobs; reads no shard.

    images of the plan  --by (shard, medium, time)-->  media, each with its frames  --cut at equal cost-->  jobs
    rows of the plan    ------------------------------------------->  samples      --cut at equal cost-->  jobs

Shapes: M items of a list of jobs (media or samples); I images and frames; R rows; of the plan: S samples.
"""

import itertools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from tandem.data.planning.corpus import Corpus
from tandem.data.planning.plan import AUDIO, StepPlan, images_of, ranges
from tandem.data.reading.jobs import Job
from tandem.data.shards.index import MEDIA, SAMPLE, VIDEO
from tandem.data.shards.storage import shown

JOBS_A_WORKER = 8  # of one batch: enough to even out wrong guesses of cost
LEAST_JOB_US = 2000.0  # jobs are not made smaller than this, since each costs the trainer's threads a moment
FRAMES_DECODED = 30  # for each frame wanted, at most: a guess at half the distance between keyframes


@dataclass
class Work:
    """A job, its guessed cost in microseconds, and for each of its items the shard and the samples of the plan."""

    job: Job
    cost_us: float
    shard_M: np.ndarray
    samples_M: list[np.ndarray]
    future: Future | None = None

    @property
    def name(self) -> str:
        shards = [shown(path) for path in self.job.words["paths"]]
        return f"{len(self.shard_M)} {self.job.words['kind']} of {', '.join(shards[:2])}{' ...' * (len(shards) > 2)}"


@dataclass(frozen=True)
class _Ragged:
    """Several entries for each item: those of item m are first_M1[m] to first_M1[m + 1]."""

    bounds: str  # name of first_M1 in a job
    first_M1: np.ndarray
    arrays: dict[str, np.ndarray]

    def cut(self, first: int, last: int) -> dict[str, np.ndarray]:
        start, end = self.first_M1[first], self.first_M1[last]
        inside = {name: array[start:end] for name, array in self.arrays.items()}
        return inside | {self.bounds: self.first_M1[first : last + 1] - start}


def image_work(
    corpus: Corpus, plan: StepPlan, pixels: StepPlan, image_ids: np.ndarray, words: dict, workers: int
) -> list[Work]:
    """Jobs for images of `pixels` at the places and sizes of `plan`; sound and frames of one video come in one job."""
    shard_I, media_I = pixels.shard_S[pixels.image_sample_I[image_ids]], pixels.image_media_I[image_ids]
    order_I = np.lexsort((pixels.time_I[image_ids], media_I, shard_I))
    shard_I, media_I, ids_I = shard_I[order_I], media_I[order_I], image_ids[order_I]
    first_M = np.flatnonzero(np.append(True, (np.diff(shard_I) != 0) | (np.diff(media_I) != 0))[: len(ids_I)])
    first_M1 = np.append(first_M, len(ids_I))

    patches_I = plan.grid_hw_I2[image_ids].reshape(-1, 2).prod(1, dtype=np.int64)
    frames = {
        "out_I": (np.cumsum(patches_I) - patches_I)[order_I],
        "grid_hw_I2": plan.grid_hw_I2[ids_I].reshape(-1, 2),
        "time_I": pixels.time_I[ids_I],
    }
    shard_M = shard_I[first_M]
    records_M = _records(corpus, "media", shard_M, media_I[first_M])
    items = {"kind_M": records_M["kind"]} | _bytes_of(records_M, "")
    cost_M = _image_cost_us(records_M, np.diff(first_M1))
    samples_M = np.split(plan.image_sample_I[ids_I], first_M1[1:-1])
    ragged = [_Ragged("first_M1", first_M1, frames)]
    return _works(corpus, words | {"kind": "images"}, shard_M, items, ragged, cost_M, samples_M, workers)


def text_work(corpus: Corpus, plan: StepPlan, rows: np.ndarray, words: dict, workers: int) -> list[Work]:
    """Jobs for the text of rows, with the places that the plan has for the samples' images."""
    first_R, end_R = np.searchsorted(plan.row_S, rows), np.searchsorted(plan.row_S, rows + 1)
    sample_M = ranges(first_R, end_R)
    shard_M = plan.shard_S[sample_M]
    records_M = _records(corpus, "samples", shard_M, plan.index_S[sample_M])
    items = {
        "source_M": corpus.source_of(shard_M),
        "out_M": np.repeat(np.arange(len(rows)) * plan.seq_length, end_R - first_R) + plan.start_S[sample_M],
        "length_M": plan.length_S[sample_M],
        "plain_M": records_M["plain"],
    } | _bytes_of(records_M, "text_")

    media_M, count_M = records_M["first_media"].astype(np.int64), records_M["media"].astype(np.int64)
    media = _records(corpus, "media", np.repeat(shard_M, count_M), ranges(media_M, media_M + count_M))
    kinds = _Ragged("first_kind_M1", np.append(0, np.cumsum(count_M)), {"kind": media["kind"]})

    image_I, images_M = images_of(plan, sample_M)
    sound_I = plan.time_I[image_I] == AUDIO  # a sound has no place in the text
    images_M = images_M - np.bincount(np.repeat(np.arange(len(images_M)), images_M)[sound_I], minlength=len(images_M))
    image_I = image_I[~sound_I]
    places = {
        "media_I": plan.image_media_I[image_I] - np.repeat(media_M, images_M),
        "time_I": plan.time_I[image_I],
        "tokens_I": plan.tokens_I[image_I],
        "start_I": plan.start_I[image_I] - np.repeat(plan.start_S[sample_M], images_M),
    }
    ragged = [kinds, _Ragged("first_M1", np.append(0, np.cumsum(images_M)), places)]
    cost_M = 50 + 0.5 * records_M["text_size"]
    return _works(corpus, words | {"kind": "texts"}, shard_M, items, ragged, cost_M, list(sample_M), workers)


def _works(
    corpus: Corpus,
    words: dict,
    shard_M: np.ndarray,
    items: dict[str, np.ndarray],
    ragged: Sequence[_Ragged],
    cost_M: np.ndarray,
    samples_M: list[np.ndarray],
    workers: int,
) -> list[Work]:
    """Neighbouring items together, cut where their cost reaches an equal share of the whole."""
    works, cost_M1 = [], np.append(0, np.cumsum(cost_M))
    share = max(cost_M1[-1] / (JOBS_A_WORKER * max(workers, 1)), LEAST_JOB_US)
    borders = np.searchsorted(cost_M1[:-1], np.arange(1, cost_M1[-1] / share) * share)
    for first, last in _between(np.unique([0, *borders, len(cost_M)])):
        shards, path_M = np.unique(shard_M[first:last], return_inverse=True)
        paths = [corpus.shard_name(shard) for shard in shards.tolist()]
        indexes = [corpus.index(shard) for shard in shards.tolist()]
        said = {"paths": paths, "formats": [(index.format, index.prompt) for index in indexes]}
        arrays = {name: array[first:last] for name, array in items.items()} | {"path_M": path_M}
        for entries in ragged:
            arrays |= entries.cut(first, last)
        cost = float(cost_M1[last] - cost_M1[first])
        works.append(Work(Job(words | said, arrays), cost, shard_M[first:last], samples_M[first:last]))
    return works


def _image_cost_us(records_M: np.ndarray, wanted_M: np.ndarray) -> np.ndarray:
    """Rough microseconds to decode and resize each medium, of which `wanted_M` frames are wanted."""
    whole_M = records_M["duration_ms"] / 1000.0 * np.maximum(records_M["fps"], 1)
    frames_M = np.where(records_M["kind"] == VIDEO, np.clip(whole_M, 1, FRAMES_DECODED * wanted_M), 1)
    pixels_M = records_M["height"].astype(np.float64) * records_M["width"]
    return 100 + 0.01 * frames_M * pixels_M + 0.005 * records_M["size"]


def _records(corpus: Corpus, array: str, shard_X: np.ndarray, at_X: np.ndarray) -> np.ndarray:
    """Records of the shards' `samples` or `media` at these places."""
    out_X = np.empty(len(shard_X), SAMPLE if array == "samples" else MEDIA)
    order_X = np.argsort(shard_X, kind="stable")
    shards, first = np.unique(shard_X[order_X], return_index=True)
    for shard, (start, end) in zip(shards.tolist(), _between([*first, len(order_X)]), strict=True):
        here = order_X[start:end]
        out_X[here] = getattr(corpus.index(shard), array)[at_X[here]]
    return out_X


def _bytes_of(records_M: np.ndarray, prefix: str) -> dict[str, np.ndarray]:
    return {f"{name}_M": records_M[prefix + name] for name in ("offset", "size", "crc")}


def _between(borders: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
    return list(itertools.pairwise(borders))
