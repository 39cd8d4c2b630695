"""Curation of a list of shards: examine each (in parallel), decide duplicates (here, in shard order), write each.

Tasks take and return JSON values only, so that any runner can carry them (runners.py). Examining a shard never looks
at another one, so the outcome is the same for any number of workers and for either runner.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from tandem.data.curation.duplicates import DIGEST_BYTES, Duplicates, Fingerprint
from tandem.data.curation.filters import (
    Rules,
    assistant_text,
    check_image,
    check_media,
    check_text,
    check_turns,
    check_url,
)
from tandem.data.curation.report import Report
from tandem.data.curation.similar import perceptual_hash
from tandem.data.formats.in_place import contents, take_texts
from tandem.data.media.image import MAX_PIXELS, ImageError, decode_image
from tandem.data.media.turns import SampleError
from tandem.data.shards.storage import open_range
from tandem.data.shards.tars import Member, Sample, TarSamples

SCORED_TOGETHER = 64  # samples

Runner = Callable[[Callable, Sequence], Iterator]  # (task, items) -> results in the order of the items


class Scorer(Protocol):
    """Similarity of images and text; train/models/pretrained/clip_similarity.py has one."""

    def prepare(self, pixels_HW3: np.ndarray) -> np.ndarray:
        """What the model sees of an image: small, so that a batch of them fits memory."""

    def best_match(self, images: Sequence[Sequence[np.ndarray]], texts: Sequence[str]) -> list[float]:
        """For each sample the cosine of its text and of that of its prepared images (at least one) nearest to it."""


@dataclass
class Candidate:
    """One examined sample. `problem` is why it is dropped, if it is."""

    key: str
    problem: SampleError | None = None
    text: str = ""
    media: list[Fingerprint] = field(default_factory=list)
    images: list[np.ndarray] = field(default_factory=list)  # prepared for the scorer

    def findings(self) -> list:
        """[key, reason or None, sentence, media]"""
        if self.problem is None:
            return [self.key, None, "", self.media]
        return [self.key, self.problem.reason, str(self.problem), []]


@dataclass(frozen=True)
class Examiner:
    """The task of the first pass: path of a shard -> what is in it. `make_scorer` is called once in each worker."""

    rules: Rules
    make_scorer: Callable[[], Scorer] | None = None

    @cached_property
    def _scorer(self) -> Scorer | None:
        return None if self.make_scorer is None else self.make_scorer()

    @cached_property
    def _blocked(self) -> frozenset[str]:
        return frozenset(self.rules.blocked)

    def __call__(self, shard: str) -> dict:
        """{"bytes": of the tar, "broken": sentence or None, "samples": findings in order}. Raises ValueError."""
        findings = []
        with open_range(shard) as file:
            samples = TarSamples(file, take_texts)
            candidates = map(self._examine, samples)
            while batch := list(islice(candidates, SCORED_TOGETHER)):
                self._score(batch)
                findings += [candidate.findings() for candidate in batch]
            return {"bytes": file.size, "broken": samples.broken, "samples": findings}

    def _examine(self, sample: Sample) -> Candidate:
        candidate, name = Candidate(sample.key), sample.name
        try:
            (_, content), *more = contents(sample)
            if more:
                raise SampleError("lines", f"{name} holds {len(more) + 1} samples; curation takes one under a key")
            check_turns(content, name)
            check_media(content, [medium.kind for medium in sample.media], name)
            check_url(content, self._blocked, name)
            candidate.text = assistant_text(content)
            check_text(candidate.text, self.rules, name)
            for medium in sample.media:
                self._look(medium, f"{name}, {medium.rest}", candidate)
        except SampleError as error:
            candidate.problem, candidate.images = error, []
        return candidate

    def _look(self, medium: Member, name: str, candidate: Candidate) -> None:
        """One medium: its size, its fingerprint and what the scorer needs of it. Videos are known by their bytes."""
        data, seen = medium.read(), (None, None)
        if medium.kind == "image":
            check_image(data, self.rules, name)
            try:
                pixels_HW3 = decode_image(data, MAX_PIXELS)
            except ImageError as error:
                raise SampleError("unreadable image", f"{name}: {error}") from error
            seen = (perceptual_hash(pixels_HW3), pixels_HW3.shape[1] / pixels_HW3.shape[0])
            if self._scorer is not None:
                candidate.images.append(self._scorer.prepare(pixels_HW3))
        candidate.media.append((hashlib.blake2b(data, digest_size=DIGEST_BYTES).hexdigest(), *seen))

    def _score(self, batch: list[Candidate]) -> None:
        """Drop the samples whose images all lie too far from their text; those without an image have no similarity."""
        scored = [candidate for candidate in batch if candidate.images]
        if self._scorer is None or not scored:
            return
        scores = self._scorer.best_match([c.images for c in scored], [c.text for c in scored])
        least = self.rules.min_similarity
        for candidate, score in zip(scored, scores, strict=True):
            candidate.images = []
            if not score >= least:
                sentence = f"sample {candidate.key} has a similarity of {score:.4f}; the least is {least:g}"
                candidate.problem = SampleError("image and text differ", sentence)


def write_shard(order: dict) -> int:
    """The task of the second pass: copy the samples order["keys"] of order["shard"] to order["out"]; its bytes.

    The json and all other members are copied as they are. Raises ValueError if the shard changed since it was read.
    """
    from webdataset import TarWriter  # takes seconds to import

    shard, keys = order["shard"], set(order["keys"])
    with open_range(shard) as file, open(order["out"], "wb") as out:
        with TarWriter(out, encoder=False, compress=False, mtime=0) as writer:
            for sample in TarSamples(file):
                if sample.problem is not None or sample.key not in keys:
                    continue
                keys.remove(sample.key)
                kept = {rest: member for rest, member in sample.members.items() if rest and not rest.startswith("_")}
                writer.write({"__key__": sample.key} | {rest: member.read() for rest, member in kept.items()})
        if keys:
            raise ValueError(f"{shard} changed while it was curated: sample {min(keys)} is gone; run it again")
        return out.tell()


def curate(shards: Sequence[str], out: Path, rules: Rules, make_scorer: Callable | None, run: Runner) -> Report:
    """Write the kept samples of each shard into a tar of the same name in `out`, and there dropped.jsonl.

    `out` is an empty folder; a shard of which nothing is kept writes no tar. Raises ValueError.
    """
    report, orders = Report(), []
    duplicates = None if rules.near is None else Duplicates(rules.near)
    paths = [os.path.abspath(shard) for shard in shards]  # workers may have another working directory
    with open(out / "dropped.jsonl", "w") as log:
        for shard, path, found in zip(shards, paths, run(Examiner(rules, make_scorer), paths), strict=True):
            report.open_shard(shard, found["bytes"], found["broken"])
            keys = []
            for key, reason, why in _decided(shard, found["samples"], duplicates):
                report.count(key, reason, why)
                if reason is None:
                    keys.append(key)
                else:
                    log.write(json.dumps({"shard": shard, "key": key, "reason": reason, "why": why}) + "\n")
            if keys:
                orders.append({"shard": path, "out": str(out / os.path.basename(shard)), "keys": keys})
    report.bytes_out = sum(run(write_shard, orders))
    return report


def _decided(shard: str, findings: Iterable[list], duplicates: Duplicates | None) -> Iterator[tuple]:
    """(key, reason or None, sentence) of each sample, in order, duplicates of earlier ones included."""
    for key, reason, why, media in findings:
        if reason is None and duplicates is not None:
            try:
                duplicates.keep(f"sample {key} of {shard}", media)
            except SampleError as error:
                reason, why = error.reason, str(error)
        yield key, reason, why
