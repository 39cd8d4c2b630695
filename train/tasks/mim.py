"""Masked image modelling: a teacher's features are predicted at masked patches (the report's vit_mim)."""

import numpy as np
import torch
from torch import nn

from tandem.data.media.text import Tokenizer
from tandem.parallel.encoder_step import Chunk
from tandem.parallel.layout import Layout
from tandem.train.config.schema import Config
from tandem.train.cost.flops import mim_flops
from tandem.train.models.layers.masking import mask_images, masked_patches
from tandem.train.models.pretrained.teacher import check_teacher, load_teacher
from tandem.train.models.towers.masked import MaskedImages, MimTower
from tandem.train.tasks.encoder_only import EncoderTask, Losses, SampleBatch, Stateless, View


class MimObjective(Stateless):
    """Masked image modelling: a teacher's features at masked patches."""

    captions, negatives = 0, False

    def __init__(self, config: Config, device: torch.device):
        self._config, self._mim = config, config.objective.mim
        assert config.objective.teacher is not None, "`check` wants one"
        self._teacher = load_teacher(config.objective.teacher, device, config.train.dtype, config.vision)
        self.tower = TASK.tower(config, teacher_width=self._teacher.width)

    def collate(self, view: View) -> tuple[MaskedImages, np.ndarray]:
        mask_N = mask_images(view.patches_I, self._mim.mask_ratio, view.keys_I4)
        return MaskedImages.of(view.images, mask_N), view.grid_hw_I2

    def chunks(self, batch: SampleBatch, device: torch.device) -> list[Chunk]:
        made = []
        for chunk in batch.collated:
            if chunk is None:
                blank = MaskedImages.blank(self._config.vision, device)
                made.append(Chunk((blank, torch.zeros(len(blank.masked_M), self._teacher.width, device=device)), False))
                continue
            masked, grid_hw_I2 = chunk
            features_NC = self._teacher.features(masked.images, grid_hw_I2)
            target_MC = features_NC.index_select(0, masked.masked_M)  # of all chunks of a step at once: keep it small
            made.append(Chunk((masked, target_MC.to(self._config.train.dtype)), True))
        return made

    def loss(self, batch: SampleBatch, loss_M: torch.Tensor) -> Losses:
        share = loss_M.sum() / max(int(masked_patches(batch.patches_I, self._mim.mask_ratio).sum()), 1)
        return share, {"cosine": share.detach()}

    def flops(self, grid_hw_I2: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        patches_I = grid_hw_I2.prod(-1)
        visible_I = patches_I - masked_patches(patches_I, self._mim.mask_ratio)
        return mim_flops(self._config.model.encoder, self._mim, patches_I, visible_I, self._teacher.width)


class MimTask(EncoderTask):
    parts = ("encoder", "mim")
    reads_texts = False

    def check(self, config: Config, layout: Layout) -> None:
        super().check(config, layout)
        if not config.objective.teacher:
            raise ValueError(
                "objective.teacher is missing: name a folder with a Hugging Face vision model, or a run or checkpoint"
            )
        encoder = config.model.encoder
        if not encoder.plain:
            raise ValueError(
                f"model.encoder.positions={encoder.positions}, model.encoder.window={encoder.window}: task=mim takes "
                "patches out of an image, which rotary positions without windows alone allow"
            )
        vision = config.vision
        if vision.merge == 1 and vision.min_patches < 2:
            raise ValueError(
                f"data.min_patches={vision.min_patches}: must be at least 2 in task=mim, one masked, one visible"
            )

    def check_folders(self, config: Config) -> None:
        assert config.objective.teacher is not None, "`check` wants one"
        check_teacher(config.objective.teacher, config.vision)

    def new_tower(self, config: Config, teacher_width: int = 1) -> nn.Module:
        """teacher_width: channels of what is predicted."""
        recompute = config.parallel.encoder.recompute
        return MimTower(config.model.encoder, config.objective.mim, teacher_width, recompute)

    def objective(self, config: Config, device: torch.device, tokenizer: Tokenizer) -> MimObjective:
        return MimObjective(config, device)


TASK = MimTask()
