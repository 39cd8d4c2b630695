"""What each of the encoder's own stages learns: a tower, what it is called with, and the loss over the world.

Legend: B samples of a chunk or of this rank, M masked patches, C teacher width, W ranks.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from data.plan import AUDIO
from data.text import Tokenizer
from parallel.encoder_step import Chunk
from train.config import Config
from train.flops import encoder_flops, mim_flops, pool_flops, text_flops
from train.models.masked import MaskedImages
from train.models.masking import mask_images, masked_patches
from train.models.omni import OmniChunk
from train.models.teacher import load_teacher
from train.models.text_encoder import PackedTexts
from train.models.vit import PackedImages
from train.objectives.omni import omni_loss
from train.objectives.siglip import siglip_loss
from train.objectives.superclass import InverseFrequency, TokenSets
from train.towers import build_tower

if TYPE_CHECKING:
    from train.stages.vision import View, VisionBatch

BLANK = TokenSets.of(np.empty(0), np.zeros(1))  # the one sample of a blank chunk
Losses = tuple[torch.Tensor, dict[str, torch.Tensor]]  # this rank's share, and shares of its terms to report


class Learner(Protocol):
    """captions: that every sample must have.  negatives: whether those of its successor are read too."""

    tower: nn.Module
    captions: int
    negatives: bool

    def hold(self, view: "View") -> Any:
        """A chunk as far as it can be made ahead of its step, on the host; its tensors go to the device."""

    def observe(self, batch: "VisionBatch") -> None:
        """Takes a step into what `tensors` remembers, once (may be collective)."""

    def chunks(self, batch: "VisionBatch", device: torch.device) -> list[Chunk]:
        """What the tower is called with."""

    def objective(self, batch: "VisionBatch", *leaves: torch.Tensor) -> Losses:
        """The loss of the tower's outputs (may be collective)."""

    def flops(self, patches_I: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        """Forward FLOPs of a step over the world, the encoder's and all others': from the patches of every image and
        about how many caption tokens each sample has."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """As of `Stage`."""

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """As of `Stage`."""


class _Stateless:
    def observe(self, batch: "VisionBatch") -> None:
        pass

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        pass


class MimLearner(_Stateless):
    """Masked image modelling: a teacher's features at masked patches."""

    captions, negatives = 0, False

    def __init__(self, config: Config, device: torch.device):
        self._config, self._mim = config, config.objective.mim
        self._teacher = load_teacher(config.objective.teacher, device, config.train.dtype)
        self.tower = build_tower(config, self._teacher.width)

    def hold(self, view: "View") -> tuple[MaskedImages, np.ndarray]:
        mask_N = mask_images(view.patches_I, self._mim.mask_ratio, view.keys_I4)
        return MaskedImages.of(view.images, mask_N), view.grid_hw_I2

    def chunks(self, batch: "VisionBatch", device: torch.device) -> list[Chunk]:
        made = []
        for held in batch.held:
            if held is None:
                blank = MaskedImages.blank(device)
                made.append(Chunk((blank, torch.zeros(len(blank.masked_M), self._teacher.width, device=device)), False))
                continue
            masked, grid_hw_I2 = held
            features_NC = self._teacher.features(masked.images, grid_hw_I2)
            target_MC = features_NC.index_select(0, masked.masked_M)  # of all chunks of a step at once: keep it small
            made.append(Chunk((masked, target_MC.to(self._config.train.dtype)), True))
        return made

    def objective(self, batch: "VisionBatch", loss_M: torch.Tensor) -> Losses:
        share = loss_M.sum() / max(int(masked_patches(batch.patches_I, self._mim.mask_ratio).sum()), 1)
        return share, {"cosine": share.detach()}

    def flops(self, patches_I: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        visible_I = patches_I - masked_patches(patches_I, self._mim.mask_ratio)
        return mim_flops(self._config.model.encoder, self._mim, patches_I, visible_I, self._teacher.width)


class ContrastiveLearner:
    """Images against their captions: SigLIP over the world's batch, and SuperClass."""

    captions, negatives = 1, False

    def __init__(self, config: Config, device: torch.device, excluded: tuple[int, ...]):
        self._config, self._weights, self._excluded = config, config.objective.contrastive, excluded
        self.tower = build_tower(config)
        words = config.model.text.vocab_size
        self._frequency = InverseFrequency(words, device) if self._weights.superclass_weight > 0 else None

    def hold(self, view: "View") -> tuple:
        tokens_T, length_B = view.captions.of(view.places_B, 0)
        sets = TokenSets.of(tokens_T, length_B, self._excluded)
        images_B = np.bincount(view.sample_I, minlength=view.samples.size)
        images_B = torch.from_numpy(images_B) if images_B.max() > 1 else None
        return view.images, PackedTexts.of(tokens_T, length_B, torch.device("cpu")), images_B, sets

    def observe(self, batch: "VisionBatch") -> None:
        """Counts the words of all ranks' captions, so that this step's targets know them too (collective)."""
        if self._frequency:
            self._frequency.update([held[3] for held in batch.held if held is not None], _world())

    def chunks(self, batch: "VisionBatch", device: torch.device) -> list[Chunk]:
        made = []
        for held in batch.held:
            khot = self._frequency.k_hot(BLANK if held is None else held[3]) if self._frequency else None
            if held is None:
                made.append(Chunk((PackedImages.blank(device), PackedTexts.blank(device), khot, None), False))
            else:
                images, texts, images_B, _ = held
                made.append(Chunk((images, texts, khot, images_B), True))
        return made

    def objective(self, batch: "VisionBatch", image_BE, text_BE, scale, bias, superclass_B) -> Losses:
        pairs = siglip_loss(image_BE, text_BE, scale, bias, counts=batch.counts_W, group=_world())
        words = superclass_B.sum() / max(sum(batch.counts_W), 1)
        share = self._weights.siglip_weight * pairs + self._weights.superclass_weight * words
        return share, {"siglip": pairs.detach(), "superclass": words.detach()}

    def flops(self, patches_I: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        return pair_flops(self._config, patches_I, tokens_S)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._frequency.state() if self._frequency else {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._frequency:
            self._frequency.load_state(tensors)


class OmniLearner(_Stateless):
    """Frames, sound and both captions of videos, aligned."""

    captions = 2

    def __init__(self, config: Config):
        self._config, self._omni = config, config.objective.omni
        self.negatives = self._omni.matching_weight > 0
        self.tower = build_tower(config)

    def hold(self, view: "View") -> OmniChunk:
        frames_B = np.bincount(view.sample_I[view.time_I != AUDIO], minlength=view.samples.size)
        mine = view.captions.pairs(view.places_B)
        others = view.captions.pairs(view.places_B + view.rows) if self.negatives else None
        if others is not None:  # a successor that could not be read says nothing: the sample's own is no negative
            others = [its if all(map(len, its)) else own for its, own in zip(others, mine, strict=True)]
        return OmniChunk.of(view.images, frames_B, mine, others)

    def chunks(self, batch: "VisionBatch", device: torch.device) -> list[Chunk]:
        return [Chunk((OmniChunk.blank(device) if held is None else held,), held is not None) for held in batch.held]

    def objective(self, batch: "VisionBatch", *leaves: torch.Tensor) -> Losses:
        counts, tokens = batch.counts_W, batch.trained_tokens
        return omni_loss(leaves, self._omni, counts=counts, tokens=tokens, group=_world())

    def flops(self, patches_I: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        return pair_flops(self._config, patches_I, tokens_S)


def pair_flops(config: Config, patches_I: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
    """Forward FLOPs of encoder, and of pool and text encoder; losses and their own modules are not counted."""
    pool = pool_flops(config.model.encoder, patches_I, config.model.embedding)
    return encoder_flops(config.model.encoder, patches_I), pool + text_flops(config.model.text, tokens_S)


def _world() -> dist.ProcessGroup | None:
    """All ranks, None where there is one."""
    return dist.group.WORLD if dist.get_world_size() > 1 else None


def build_learner(config: Config, device: torch.device, tokenizer: Tokenizer) -> Learner:
    """The learner of `config.recipe`, its tower on the CPU."""
    if config.recipe == "vit_mim":
        return MimLearner(config, device)
    if config.recipe == "vit_contrastive":
        return ContrastiveLearner(config, device, (tokenizer.eos_id,))
    return OmniLearner(config)
