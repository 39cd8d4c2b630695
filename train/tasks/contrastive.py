"""Images against their captions: SigLIP over the world's batch, and SuperClass (the report's vit_contrastive)."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from tandem.data.media.text import Tokenizer
from tandem.parallel.encoder_step import Chunk
from tandem.train.config.schema import Config
from tandem.train.models.encoders.text_encoder import PackedTexts
from tandem.train.models.encoders.vit import PackedImages
from tandem.train.models.towers.contrastive import ContrastiveTower
from tandem.train.objectives.siglip import siglip_loss
from tandem.train.objectives.superclass import InverseFrequency, TokenSets
from tandem.train.tasks.encoder_only import EncoderTask, Losses, SampleBatch, View, pair_flops, whole_world

BLANK = TokenSets.of(np.empty(0), np.zeros(1))  # the one sample of a blank chunk


class ContrastiveObjective:
    """Images against their captions: SigLIP over the world's batch, and SuperClass."""

    captions, negatives = 1, False

    def __init__(self, config: Config, device: torch.device, excluded: tuple[int, ...]):
        self._config, self._weights, self._excluded = config, config.objective.contrastive, excluded
        self.tower = TASK.tower(config)
        words = config.model.text.vocab_size
        self._frequency = InverseFrequency(words, device) if self._weights.superclass_weight > 0 else None

    def collate(self, view: View) -> tuple:
        tokens_T, length_B = view.captions.of(view.places_B, 0)
        sets = TokenSets.of(tokens_T, length_B, self._excluded)
        images_B = np.bincount(view.sample_I, minlength=view.samples.size)
        images_B = torch.from_numpy(images_B) if images_B.max() > 1 else None
        return view.images, PackedTexts.of(tokens_T, length_B, torch.device("cpu")), images_B, sets

    def update_stats(self, batch: SampleBatch) -> None:
        """Counts the words of all ranks' captions, so that this step's targets know them too (collective)."""
        if self._frequency:
            self._frequency.update([chunk[3] for chunk in batch.collated if chunk is not None], whole_world())

    def chunks(self, batch: SampleBatch, device: torch.device) -> list[Chunk]:
        made = []
        for chunk in batch.collated:
            khot = self._frequency.k_hot(BLANK if chunk is None else chunk[3]) if self._frequency else None
            if chunk is None:
                image = PackedImages.blank(self._config.vision, device)
                made.append(Chunk((image, PackedTexts.blank(device), khot, None), False))
            else:
                images, texts, images_B, _ = chunk
                made.append(Chunk((images, texts, khot, images_B), True))
        return made

    def loss(self, batch: SampleBatch, image_BE, text_BE, scale, bias, superclass_B) -> Losses:
        pairs = siglip_loss(image_BE, text_BE, scale, bias, counts=batch.counts_W, group=whole_world())
        words = superclass_B.sum() / max(sum(batch.counts_W), 1)
        share = self._weights.siglip_weight * pairs + self._weights.superclass_weight * words
        return share, {"siglip": pairs.detach(), "superclass": words.detach()}

    def flops(self, grid_hw_I2: np.ndarray, tokens_S: np.ndarray) -> tuple[int, int]:
        return pair_flops(self._config, grid_hw_I2, tokens_S)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._frequency.state() if self._frequency else {}

    def load_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        if self._frequency:
            self._frequency.load_state(tensors)


class ContrastiveTask(EncoderTask):
    parts = ("encoder", "pool", "text", "contrastive")

    def new_tower(self, config: Config) -> nn.Module:
        model, recompute = config.model, config.parallel.encoder.recompute
        objective, width = config.objective.contrastive, model.embedding
        return ContrastiveTower(model.encoder, model.text, objective, width=width, recompute=recompute)

    def objective(self, config: Config, device: torch.device, tokenizer: Tokenizer) -> ContrastiveObjective:
        return ContrastiveObjective(config, device, (tokenizer.eos_id,))


TASK = ContrastiveTask()
