"""Frames, sound and both captions of videos, aligned (the report's vit_omni)."""

import numpy as np
import torch
from torch import nn

from tandem.data.media.audio import sound_grid
from tandem.data.media.text import Tokenizer
from tandem.data.planning.plan import AUDIO
from tandem.parallel.encoder_step import Chunk
from tandem.parallel.layout import Layout
from tandem.train.config.schema import Config
from tandem.train.models.towers.omni import OmniChunk, OmniTower
from tandem.train.objectives.omni import omni_loss
from tandem.train.tasks.encoder_only import EncoderTask, Losses, SampleBatch, Stateless, View, pair_flops, whole_world


class OmniObjective(Stateless):
    """Frames, sound and both captions of videos, aligned."""

    captions = 2

    def __init__(self, config: Config):
        self._config, self._omni = config, config.objective.omni
        self.negatives = self._omni.matching_weight > 0
        self.tower = TASK.tower(config)

    def collate(self, view: View) -> OmniChunk:
        frames_B = np.bincount(view.sample_I[view.time_I != AUDIO], minlength=view.samples.size)
        mine = view.captions.pairs(view.places_B)
        others = view.captions.pairs(view.places_B + view.rows) if self.negatives else None
        if others is not None:  # a successor that could not be read says nothing: the sample's own is no negative
            others = [its if all(map(len, its)) else own for its, own in zip(others, mine, strict=True)]
        return OmniChunk.of(view.images, frames_B, mine, others)

    def chunks(self, batch: SampleBatch, device: torch.device) -> list[Chunk]:
        blank = OmniChunk.blank(self._config.vision, device) if None in batch.collated else None
        return [Chunk((blank if chunk is None else chunk,), chunk is not None) for chunk in batch.collated]

    def loss(self, batch: SampleBatch, *leaves: torch.Tensor) -> Losses:
        counts, tokens = batch.counts_W, batch.trained_tokens
        return omni_loss(leaves, self._omni, counts=counts, tokens=tokens, group=whole_world())

    def flops(self, grid_hw_I2: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        return pair_flops(self._config, grid_hw_I2, tokens_S)


class OmniTask(EncoderTask):
    parts = ("encoder", "pool", "text", "omni")
    hears = True

    def check(self, config: Config, layout: Layout) -> None:
        super().check(config, layout)
        pairs, seconds = config.objective.omni.pairs, config.data.audio_seconds
        if not any("audio" in pair for pair in pairs):
            raise ValueError(
                f"objective.omni.pairs={list(pairs)}: none has audio, for frames alone there is task=contrastive"
            )
        vision = config.vision
        sample = vision.patches_of(config.data.video.budget) + int(sound_grid(1000 * seconds, seconds, vision).prod())
        if sample > config.parallel.encoder.chunk_patches:
            raise ValueError(
                f"parallel.encoder.chunk_patches={config.parallel.encoder.chunk_patches} is smaller than a sample of "
                f"data.video.budget={config.data.video.budget} and data.audio_seconds={seconds} ({sample} patches)"
            )

    def new_tower(self, config: Config) -> nn.Module:
        model, recompute = config.model, config.parallel.encoder.recompute
        objective, width = config.objective.omni, model.embedding
        return OmniTower(model.encoder, model.text, objective, width=width, recompute=recompute)

    def objective(self, config: Config, device: torch.device, tokenizer: Tokenizer) -> OmniObjective:
        return OmniObjective(config)


TASK = OmniTask()
