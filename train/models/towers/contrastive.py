"""The tower of contrastive training: images and texts to unit vectors of one space (Seed1.5-VL report, section 2.1.2).

    image   encoder -> attention pool -> mean over the images of a sample -> image_BE
    text    text encoder -> last token -> linear -> text_BE
    SigLIP scores a pair with  scale * <image, text> + bias  (both learned);  SuperClass reads the words of the caption
    off the image embedding before it is normalised

What is normalised, and everything after, is fp32, whatever the weights are.

Legend: N patches of I images of B samples, T tokens of B texts, E embedding width, V words of the vocabulary.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.attention_pool import AttentionPool
from tandem.train.models.layers.blocks import kept_for_backward
from tandem.train.models.pretrained.hf_text import build_text_encoder
from tandem.train.objectives.superclass import KHot, superclass_loss


@dataclass
class ContrastiveConfig:
    """siglip_weight, superclass_weight: of the two losses; without SuperClass there is no classifier.  scale_init,
    bias_init: where the sigmoid loss's learned temperature and bias begin (Zhai et al. 2023: 10 and -10).

    Raises ValueError for values that cannot be.
    """

    siglip_weight: float = 1.0
    superclass_weight: float = 1.0
    scale_init: float = 10.0
    bias_init: float = -10.0

    def __post_init__(self):
        for key in ("siglip_weight", "superclass_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"objective.contrastive.{key}={getattr(self, key)}: must be 0, for none, or more")
        if not self.siglip_weight + self.superclass_weight > 0:
            raise ValueError("objective.contrastive: siglip_weight=0 and superclass_weight=0 leave nothing to learn")
        check_temperature("objective.contrastive", self.scale_init, self.bias_init)


def check_temperature(section: str, scale: float, bias: float) -> None:
    """Raises ValueError for what no temperature and bias can begin with."""
    if not 0 < scale < math.inf:
        raise ValueError(f"{section}.scale_init={scale}: must be above 0 and finite, its logarithm is learned")
    if not math.isfinite(bias):
        raise ValueError(f"{section}.bias_init={bias}: must be a finite number")


class TextTower(nn.Module):
    """Text encoder and projection: packed texts to [B, E], not normalised."""

    def __init__(self, config: TextConfig, width: int):
        super().__init__()
        encoder: Any = build_text_encoder(config)
        self.encoder = encoder
        self.projection = nn.Linear(encoder.width, width)

    def forward(self, texts: PackedTexts, recompute: str = "none") -> torch.Tensor:
        return self.projection(self.encoder.pool(self.encoder(texts, recompute), texts))


class Temperature(nn.Module):
    """SigLIP's learned scale and bias, fp32 scalars.

    What is learned is how far the logarithm of the one and the other have moved: bf16 weights are fine near 0.
    """

    def __init__(self, scale: float, bias: float):
        super().__init__()
        self._log_scale, self._bias = math.log(scale), bias
        self.log_scale_moved = nn.Parameter(torch.zeros(1))
        self.bias_moved = nn.Parameter(torch.zeros(1))

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return (self.log_scale_moved.float() + self._log_scale).exp()[0], self.bias_moved.float()[0] + self._bias


class ContrastiveHead(nn.Module):
    """Temperature, and the classifier over words where SuperClass is on."""

    def __init__(self, config: ContrastiveConfig, width: int, vocab_size: int):
        super().__init__()
        self.temperature = Temperature(config.scale_init, config.bias_init)
        self.classifier = nn.Linear(width, vocab_size) if config.superclass_weight > 0 else None

    def forward(self, embedding_BE: torch.Tensor, khot: KHot | None):
        """(scale, bias, SuperClass loss of each sample, zeros without a classifier)."""
        scale, bias = self.temperature()
        assert (khot is None) == (self.classifier is None), "SuperClass targets exactly where there is a classifier"
        if self.classifier is None or khot is None:
            return scale, bias, embedding_BE.new_zeros(len(embedding_BE))
        logits_BV = self.classifier(embedding_BE.to(self.classifier.bias.dtype))
        return scale, bias, superclass_loss(logits_BV, khot)


class ContrastiveTower(nn.Module):
    """Parts `encoder`, `pool`, `text` and `contrastive`.

    width: of the embeddings.  recompute: as in `VisionTower`, for the text encoder too.
    """

    def __init__(
        self, encoder: ViTConfig, text: TextConfig, config: ContrastiveConfig, *, width: int, recompute: str = "none"
    ):
        super().__init__()
        self.encoder = SeedViT(encoder)
        self.pool = AttentionPool(encoder.width, encoder.heads, width, encoder.norm_eps)
        self.text = TextTower(text, width)
        self.contrastive = ContrastiveHead(config, width, text.vocab_size)
        self.recompute = kept_for_backward(recompute)

    def forward(
        self,
        images: PackedImages,
        texts: PackedTexts,
        khot: KHot | None,
        images_of_sample_B: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(image_BE and text_BE fp32 of unit length, scale (), bias (), SuperClass loss of each sample [B]).

        images_of_sample_B: int64 counts of each sample's successive images, on the device; None for one each.
        """
        embedding_BE = self._embedding(images, images_of_sample_B)
        text_BE = self.embed_texts(texts)
        scale, bias, superclass_B = self.contrastive(embedding_BE, khot)
        return normalized(embedding_BE), text_BE, scale, bias, superclass_B

    def embed_images(self, images: PackedImages, images_of_sample_B: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors [B, E] of samples, see `forward`."""
        return normalized(self._embedding(images, images_of_sample_B))

    def embed_texts(self, texts: PackedTexts) -> torch.Tensor:
        """Unit vectors [B, E] of texts."""
        return normalized(self.text(texts, self.recompute))

    def _embedding(self, images, images_of_sample_B):
        pooled_IE = self.pool(self.encoder(images, self.recompute), images.segments)
        return mean_of_images(pooled_IE.float(), images_of_sample_B)


def mean_of_images(pooled_IE: torch.Tensor, images_of_sample_B: torch.Tensor | None) -> torch.Tensor:
    """Mean over each sample's successive images, [B, E]; every sample has one at least."""
    if images_of_sample_B is None:
        return pooled_IE
    # unsafe: without it the counts are read back from the device to be checked
    return torch.segment_reduce(pooled_IE, "mean", lengths=images_of_sample_B, axis=0, unsafe=True)


def normalized(x_BE: torch.Tensor) -> torch.Tensor:
    """Rows of unit length in fp32."""
    return F.normalize(x_BE.float(), dim=-1)
