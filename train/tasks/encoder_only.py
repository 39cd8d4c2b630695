"""What the tasks of the encoder alone share: samples through a tower and an objective, by the encoder step.

    plan --Samples--> this rank's chunks of samples --View--> objective.collate: tensors on the host, ahead of time
                                                    --------> objective.chunks:  what the tower is called with
                                                    --------> objective.loss:    the loss over the world

A sample that could not be read has no place in a view, so nothing of it reaches a loss; all ranks know which these are.

Legend: S samples of the step, B samples of a chunk, I images, N patches, W ranks.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from tandem.data.dataset import Data
from tandem.data.media.text import Tokenizer
from tandem.data.planning.plan import images_of
from tandem.parallel.encoder_step import Chunk, EncoderEngines, encoder_step
from tandem.parallel.grid import build_grid
from tandem.parallel.hybrid_step import StepOutput
from tandem.parallel.layout import Layout
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.build import build_encoder_engine, settle_kernels
from tandem.train.config.schema import Config
from tandem.train.cost.flops import encoder_flops, pool_flops, text_flops
from tandem.train.input.batch import branch_factors
from tandem.train.input.device_prefetcher import DevicePrefetcher
from tandem.train.input.prefetcher import Prefetcher, PreparedStep
from tandem.train.input.samples import Captions, SampleRankShard, Samples
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.encoders.vit import PackedImages
from tandem.train.models.layers.initial import initialize
from tandem.train.models.pretrained.hf_text import text_folder
from tandem.train.tasks.base import Accept, StepFacts, Task

Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]  # this rank's share, and shares of its terms to report


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
class SampleBatch:
    """One step of this rank: each chunk as the objective collated it (None: blank), and of all ranks the samples that
    count, the patches of every image of these and their trained tokens.  counted: in the objective's statistics."""

    collated: list[Any]
    counts_W: list[int]
    patches_I: np.ndarray
    trained_tokens: int
    counted: bool = False


class Objective(Protocol):
    """captions: that every sample must have.  negatives: whether those of its successor are read too."""

    tower: nn.Module
    captions: int
    negatives: bool

    def collate(self, view: View) -> Any:
        """A chunk as far as it can be made ahead of its step, on the host; its tensors go to the device."""

    def update_stats(self, batch: SampleBatch) -> None:
        """Takes a step into what `tensors` remembers, once (may be collective)."""

    def chunks(self, batch: SampleBatch, device: torch.device) -> list[Chunk]:
        """What the tower is called with."""

    def loss(self, batch: SampleBatch, *leaves: Any, **_: Any) -> Losses:
        """The loss of the tower's outputs, one tensor each (may be collective)."""

    def flops(self, grid_hw_I2: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        """Forward FLOPs of a step over the world, the encoder's and all others': from the patches of every image, down
        and across, and about how many caption tokens each sample has."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """As of `Trainer`."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As of `Trainer`."""


class Stateless:
    """What an objective that remembers nothing has in common."""

    def update_stats(self, batch: SampleBatch) -> None:
        pass

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class EncoderTrainer:
    """Trains the modules of the task's tower that `train.trainable` names (collective)."""

    def __init__(self, task: "EncoderTask", config: Config, layout: Layout, device: torch.device, data: Data):
        self._config, self._data = config, data
        settle_kernels(config, device)
        grid = build_grid(layout, device, config.train.seed)
        self._objective = task.objective(config, device, data.reader.tokenizer)
        self.engines = EncoderEngines(grid, build_encoder_engine(config, self._objective.tower, device))

    def steps(self, count: int) -> DevicePrefetcher:
        data, grid, objective = self._data, self.engines.grid, self._objective
        sharding = Samples(
            self._config,
            data.stream.corpus,
            grid.rank,
            grid.layout.world,
            eos_id=data.reader.tokenizer.eos_id,
            wanted=objective.captions,
            negatives=objective.negatives,
        )
        prefetcher = Prefetcher(data.stream, data.reader, self._config.data, grid, sharding, self._compose, steps=count)
        return DevicePrefetcher(prefetcher, grid.device)

    def step(self, batch: SampleBatch, *, timer: PhaseTimer, stop: bool, accept: Accept) -> StepOutput:
        objective, config = self._objective, self._config
        with timer.phase("targets"):
            if not batch.counted:  # a step computed twice counts once
                objective.update_stats(batch)
            batch.counted = True
            chunks = objective.chunks(batch, self.engines.grid.device)
        learnt = sum(batch.counts_W) > 0
        return encoder_step(
            self.engines,
            chunks,
            lambda *leaves: objective.loss(batch, *leaves),
            clip_norm=config.optim.clip_norm,
            replay=config.parallel.encoder.recompute == "replay",
            stop=stop,
            timer=timer,
            accept=lambda loss, norm: learnt and accept(loss, norm),
        )

    def facts(self, prepared: PreparedStep, output: StepOutput) -> StepFacts:
        plan = prepared.plan
        samples = plan.length_S.size - len(prepared.skipped)
        tokens_S = np.full(samples, prepared.trained_tokens / max(samples, 1))
        encoder, others = self._objective.flops(plan.grid_hw_I2, tokens_S)
        encoder, others = (3 if "encoder" in self._config.train.trainable else 1) * encoder, 3 * others
        return StepFacts(
            tokens=int(plan.patches_I.sum()),
            flops=encoder + others,
            encoder_flops=encoder,
            load_max_over_mean=prepared.rank_shard.load_max_over_mean,
            more={
                "samples": samples,
                "trained_tokens": prepared.trained_tokens,
                "losses": output.report,
            },
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._objective.tensors()

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._objective.load_tensors(tensors)

    def _compose(self, prepared: PreparedStep) -> SampleBatch:
        """On the host, in the prefetcher's thread."""
        plan, rank_shard = prepared.plan, prepared.rank_shard
        dropped = np.array([failure.sample for failure in prepared.skipped], np.int64)
        counts_S = np.ones(plan.length_S.size, bool)
        counts_S[dropped] = False
        collated = []
        for samples in rank_shard.chunks:
            view = self._view(prepared, rank_shard, samples[counts_S[samples]])
            collated.append(self._objective.collate(view) if view else None)
        return SampleBatch(
            collated=collated,
            counts_W=np.bincount(
                rank_shard.encoding_rank_S[counts_S], minlength=self.engines.grid.layout.world
            ).tolist(),
            patches_I=plan.patches_I[counts_S[plan.image_sample_I]],
            trained_tokens=prepared.trained_tokens,
        )

    def _view(self, prepared: PreparedStep, rank_shard: SampleRankShard, samples: np.ndarray) -> View | None:
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
        vision, host = config.vision, torch.device("cpu")
        images = PackedImages.of(
            _patches_of(prepared, rank_shard, image_ids),
            vision.positions(grid_hw_I2),
            patches_I,
            host,
            branch_factors(config, keys_I4),
            Arrangement.of(vision, grid_hw_I2, host),
        )
        mine = np.concatenate(rank_shard.chunks)  # ascending, as the images are
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


def _patches_of(prepared: PreparedStep, rank_shard: SampleRankShard, image_ids: np.ndarray) -> np.ndarray:
    """Patches of some of the images that this rank has read, uint8 [N, P]; a view where they lie together."""
    patches_J = prepared.images.patches_I
    end_J = np.cumsum(patches_J)
    place_I = np.searchsorted(rank_shard.image_ids, image_ids)
    patches_NP = prepared.images.patches_NP
    if (np.diff(place_I) == 1).all():
        return patches_NP[end_J[place_I[0]] - patches_J[place_I[0]] : end_J[place_I[-1]]]
    return np.concatenate([patches_NP[end_J[place] - patches_J[place] : end_J[place]] for place in place_I])


class EncoderTask(Task):
    """A task of the encoder alone.  hears: whether samples have sound."""

    has_llm = False
    vocabulary = "text"
    hears = False

    def check(self, config: Config, layout: Layout) -> None:
        for key in ("tp", "pp", "vpp", "ep", "cp"):
            if getattr(layout, key) > 1:
                raise ValueError(
                    f"parallel.{key}={getattr(layout, key)}: task={config.task} has no LLM to split, set it to 1"
                )
        for key, value in (
            ("parallel.balance_group_size", config.parallel.balance_group_size),
            ("train.micro_batch_size", config.train.micro_batch_size),
        ):
            if value not in (None, 1):
                raise ValueError(f"{key}={value}: has no meaning in task={config.task}, leave it out")
        seconds = config.data.audio_seconds
        if self.hears != (seconds > 0):
            wanted = "above 0" if self.hears else "0"
            raise ValueError(f"data.audio_seconds={seconds}: must be {wanted} in task={config.task}")

    def check_folders(self, config: Config) -> None:
        if config.model.text.folder:
            text_folder(config.model.text)

    @abstractmethod
    def new_tower(self, config: Config) -> nn.Module:
        """The encoder and all that is trained with it, as children named like `parts`, on the CPU."""

    def tower(self, config: Config, **sizes: Any) -> nn.Module:
        """The tower with its initial weights; sizes: what `new_tower` of this task takes besides."""
        tower = self.new_tower(config, **sizes)
        initialize(tower, config.train.seed)
        return tower

    @abstractmethod
    def objective(self, config: Config, device: torch.device, tokenizer: Tokenizer) -> Objective:
        """The tower at work on this rank, and its loss."""

    def trainer(self, config: Config, layout: Layout, device: torch.device, data: Data) -> EncoderTrainer:
        return EncoderTrainer(self, config, layout, device, data)


def pair_flops(config: Config, grid_hw_I2: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
    """Forward FLOPs of encoder, and of pool and text encoder; losses and their own modules are not counted."""
    pool = pool_flops(config.model.encoder, grid_hw_I2.prod(-1), config.model.embedding)
    return encoder_flops(config.model.encoder, grid_hw_I2), pool + int(text_flops(config.model.text, tokens_S).sum())


def whole_world() -> dist.ProcessGroup | None:
    """All ranks, None where there is one."""
    return dist.group.WORLD if dist.get_world_size() > 1 else None
