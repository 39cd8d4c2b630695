"""vit_mim, vit_contrastive and vit_omni: samples through the encoder and a learner's objective, by the encoder step.

    plan --Samples--> this rank's chunks of samples --View--> learner.hold: tensors on the host, ahead of time
                                                    --------> learner.chunks: what the tower is called with
                                                    --------> learner.objective: the loss over the world

A sample that could not be read has no place in a view, so nothing of it reaches a loss; all ranks know which these are.

Legend: S samples of the step, B samples of a chunk, I images, N patches, W ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from data.image import patch_positions
from data.plan import images_of
from parallel.encoder_step import EncoderEngines, encoder_step
from parallel.grid import build_grid
from parallel.hybrid_step import StepOutput
from parallel.layout import Layout
from parallel.phases import PhaseTimer
from train.batch import branch_factors
from train.build import Data, build_encoder_engine, settle_kernels
from train.config import Config
from train.feed import Feed, PreparedStep
from train.models.vit import PackedImages
from train.samples import Captions, Samples, SampleShare
from train.stages import Accept, StepFacts
from train.stages.learners import Learner, build_learner
from train.staging import Staging


@dataclass(frozen=True)
class View:
    """The samples of one chunk that count, on the host but for the images.

    samples: their numbers in the step.  keys_I4: of everything random about an image.  places_B: of the samples among
    the `rows` whose captions this rank has read; the row of a sample's successor, where read, is at place + rows.
    """

    samples: np.ndarray
    images: PackedImages
    sample_I: np.ndarray
    patches_I: np.ndarray
    grid_hw_I2: np.ndarray
    time_I: np.ndarray
    keys_I4: np.ndarray
    captions: Captions
    places_B: np.ndarray
    rows: int


@dataclass
class VisionBatch:
    """One step of this rank: what the learner holds of each chunk (None: blank), and of all ranks the samples that
    count, the patches of every image of these and their trained tokens.  observed: by the learner."""

    held: list[Any]
    counts_W: list[int]
    patches_I: np.ndarray
    trained_tokens: int
    observed: bool = False


class VisionStage:
    """Trains the modules of a learner's tower that `train.trainable` names (collective)."""

    def __init__(self, config: Config, layout: Layout, device: torch.device, data: Data):
        self._config, self._data = config, data
        settle_kernels(config, device)
        grid = build_grid(layout, device, config.train.seed)
        self._learner: Learner = build_learner(config, device, data.reader.tokenizer)
        self.engines = EncoderEngines(grid, build_encoder_engine(config, self._learner.tower, device))

    def steps(self, count: int) -> Staging:
        data, grid, learner = self._data, self.engines.grid, self._learner
        captions = {"wanted": learner.captions, "negatives": learner.negatives}
        captions["eos_id"] = data.reader.tokenizer.eos_id
        division = Samples(self._config, data.stream.corpus, grid.rank, grid.layout.world, **captions)
        feed = Feed(data.stream, data.reader, self._config.data, grid, division, self._compose, steps=count)
        return Staging(feed, grid.device)

    def step(self, batch: VisionBatch, *, timer: PhaseTimer, stop: bool, accept: Accept) -> StepOutput:
        learner, config = self._learner, self._config
        with timer.phase("targets"):
            if not batch.observed:  # a step computed twice counts once
                learner.observe(batch)
            batch.observed = True
            chunks = learner.chunks(batch, self.engines.grid.device)
        learnt = sum(batch.counts_W) > 0
        return encoder_step(
            self.engines,
            chunks,
            lambda *leaves: learner.objective(batch, *leaves),
            clip_norm=config.optim.clip_norm,
            replay=config.parallel.encoder.recompute == "replay",
            stop=stop,
            timer=timer,
            accept=lambda loss, norm: learnt and accept(loss, norm),
        )

    def facts(self, prepared: PreparedStep, output: StepOutput) -> StepFacts:
        plan = prepared.plan
        patches_I = plan.patches_I
        samples = plan.length_S.size - len(prepared.skipped)
        tokens_S = np.full(samples, prepared.trained_tokens / max(samples, 1))
        encoder, others = self._learner.flops(patches_I, tokens_S)
        encoder, others = (3 if "encoder" in self._config.train.trainable else 1) * encoder, 3 * others
        return StepFacts(
            tokens=int(patches_I.sum()),
            flops=encoder + others,
            encoder_flops=encoder,
            load_max_over_mean=prepared.share.load_max_over_mean,
            more={
                "samples": samples,
                "trained_tokens": prepared.trained_tokens,
                "losses": output.report,
            },
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._learner.tensors()

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._learner.load_tensors(tensors)

    def _compose(self, prepared: PreparedStep) -> VisionBatch:
        """On the host, in the feed's thread."""
        plan, share = prepared.plan, prepared.share
        dropped = np.array([failure.sample for failure in prepared.skipped], np.int64)
        counts_S = np.ones(plan.length_S.size, bool)
        counts_S[dropped] = False
        held = []
        for samples in share.chunks:
            view = self._view(prepared, share, samples[counts_S[samples]])
            held.append(self._learner.hold(view) if view else None)
        return VisionBatch(
            held=held,
            counts_W=np.bincount(share.owner_S[counts_S], minlength=self.engines.grid.layout.world).tolist(),
            patches_I=plan.patches_I[counts_S[plan.image_sample_I]],
            trained_tokens=prepared.trained_tokens,
        )

    def _view(self, prepared: PreparedStep, share: SampleShare, samples: np.ndarray) -> View | None:
        """Some of this rank's samples; None for none."""
        if not samples.size:
            return None
        config, plan = self._config, prepared.plan
        image_ids, images_B = images_of(plan, samples)
        sample_I = np.repeat(np.arange(samples.size), images_B)
        within_I = np.arange(image_ids.size) - np.repeat(np.cumsum(images_B) - images_B, images_B)
        keys_I4 = np.stack(np.broadcast_arrays(config.train.seed, plan.step, samples[sample_I], within_I), axis=1)
        grid_hw_I2 = plan.grid_hw_I2[image_ids].reshape(-1, 2)
        patches_I = grid_hw_I2.prod(axis=1, dtype=np.int64)
        images = PackedImages.of(
            _patches_of(prepared, share, image_ids),
            patch_positions(grid_hw_I2),
            patches_I,
            torch.device("cpu"),
            branch_factors(config, keys_I4),
        )
        mine = np.concatenate(share.chunks)  # ascending, as the images are
        return View(
            samples=samples,
            images=images,
            sample_I=sample_I,
            patches_I=patches_I,
            grid_hw_I2=grid_hw_I2,
            time_I=plan.time_I[image_ids],
            keys_I4=keys_I4,
            captions=prepared.text,
            places_B=np.searchsorted(mine, samples),
            rows=mine.size,
        )


def _patches_of(prepared: PreparedStep, share: SampleShare, image_ids: np.ndarray) -> np.ndarray:
    """Patches of some of the images that this rank has read, uint8 [N, P]; a view where they lie together."""
    patches_J = prepared.images.patches_I
    end_J = np.cumsum(patches_J)
    place_I = np.searchsorted(share.image_ids, image_ids)
    patches_NP = prepared.images.patches_N588
    if (np.diff(place_I) == 1).all():
        return patches_NP[end_J[place_I[0]] - patches_J[place_I[0]] : end_J[place_I[-1]]]
    return np.concatenate([patches_NP[end_J[place] - patches_J[place] : end_J[place]] for place in place_I])
