"""Labelled samples and texts through a pre-trained tower, without gradients.

    Labelled  ->  chunks of bounded patches  ->  Embedded: one row per sample, on the CPU

Only the embedding, features, label and captions of a sample are kept.

Legend: B samples, I images, N patches, D encoder width, E embedding width, V samples with audio, U texts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from tandem.data.media.text import Tokenizer
from tandem.data.reading.captions import captions
from tandem.data.reading.labelled import LabelledSample, Patches
from tandem.data.vision import VisionSpec
from tandem.parallel.plan.balance import cut_in_order
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.encoders.text_encoder import PackedTexts
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig


@dataclass
class Embedded:
    """Samples in order; rows are fp32 on the CPU.

    image_BE: unit embeddings.  mean_BD: means of patch features.  audio_VE: unit embeddings of the audio of the samples
    audio_V.  A tensor is None if it was not requested or if no sample has it.
    """

    labels: list[str | None] = field(default_factory=list)
    captions: list[tuple[str | None, ...]] = field(default_factory=list)
    image_BE: torch.Tensor | None = None
    mean_BD: torch.Tensor | None = None
    audio_VE: torch.Tensor | None = None
    audio_V: list[int] = field(default_factory=list)


def load_weights(tower: nn.Module, reader: Reader, kind: str) -> None:
    """Puts the weights ("param") of a checkpoint, or their running mean ("ema"), into a tower of its task.

    Raises ValueError where the checkpoint has none.
    """
    kinds = {name: tensor["kinds"] for name, tensor in reader.tensors.items()}
    if not any(kind in there for there in kinds.values()):
        raise ValueError(
            f"checkpoint {reader.path} has no {kind} of its weights: optim.ema was 0; give --weights param"
        )
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            there = kind if kind in kinds.get(name, ()) else "param"  # of a frozen one the mean is the weight
            parameter.copy_(reader.read(name, there, (0,) * parameter.dim(), tuple(parameter.shape)))


class BareEncoder(nn.Module):
    """The encoder alone, which is all that vit_mim's tower is asked for; named as in every tower."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.encoder = SeedViT(config)


class Embedder:
    """A tower on its device, applied to samples and texts in chunks of at most `chunk` patches or tokens.

    tokenizer, most_tokens: of captions; None and 0 for a tower that reads none.
    """

    def __init__(
        self,
        tower: nn.Module,
        vision: VisionSpec,
        device: torch.device,
        chunk: int,
        tokenizer: Tokenizer | None = None,
        most_tokens: int = 0,
    ):
        self.tower: Any = tower.to(device).eval()  # with as many of its parts as the task has
        self.vision, self.device, self.chunk = vision, device, chunk
        self.tokenizer, self.most_tokens = tokenizer, most_tokens
        self.reads_texts, self.hears = (hasattr(tower, name) for name in ("embed_texts", "embed_audio"))

    @torch.no_grad()
    def embed(
        self,
        samples: Iterable[LabelledSample],
        *,
        embeddings: bool,
        means: bool,
        seen: Callable[[int, LabelledSample], None] | None = None,
    ) -> Embedded:
        """Embeds samples as far as asked; `seen` is told the place and the content of each."""
        out, images, features, sounds = Embedded(), [], [], []
        for chunk in _chunks(((sample, sample.images) for sample in samples), self.chunk):
            first = len(out.labels)
            for place, (sample, _) in enumerate(chunk, start=first):
                out.labels.append(sample.label)
                out.captions.append(sample.captions)
                if seen:
                    seen(place, sample)
            packed, images_B = pack([patches for _, patches in chunk], self.vision, self.device)
            if embeddings:
                images.append(self.tower.embed_images(packed, images_B).float().cpu())
            if means:
                features.append(mean_features(self.tower.encoder(packed), packed, images_B).cpu())
            heard = [(first + place, sample.sound) for place, (sample, _) in enumerate(chunk) if sample.sound]
            for part in _chunks(heard, self.chunk) if embeddings and self.hears else ():
                packed, _ = pack([patches for _, patches in part], self.vision, self.device)
                sounds.append(self.tower.embed_audio(packed).float().cpu())
                out.audio_V += [index for index, _ in part]
        out.image_BE, out.mean_BD, out.audio_VE = (
            torch.cat(rows) if rows else None for rows in (images, features, sounds)
        )
        return out

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit embeddings of one text or more, read as the assistant's in training, fp32 [U, E] on the CPU.

        Raises ValueError for a text without a token, or with a placeholder of an image or a video.
        """
        parts = [self._ids(text) for text in texts]
        lengths_U = np.array([part.size for part in parts])
        chunks = cut_in_order(np.arange(len(parts)), lengths_U, self.chunk)
        packed = (
            PackedTexts.of(np.concatenate([parts[text] for text in chunk]), lengths_U[chunk], self.device)
            for chunk in chunks
        )
        return torch.cat([self.tower.embed_texts(texts).float().cpu() for texts in packed])

    def _ids(self, text: str) -> np.ndarray:
        turns = [{"role": "assistant", "text": text}]
        assert self.tokenizer is not None, "a tower that reads texts has a tokenizer"
        encoded = self.tokenizer.encode_sample(turns, ("assistant",), (), f"the text {text!r}")
        rows = encoded.tokens_T[None], encoded.trained_T[None]
        ids, _ = captions(*rows, 1, self.most_tokens, self.tokenizer.eos_id)
        if not ids.size:
            raise ValueError(f"the text {text!r} has no token")
        return ids


# ---------------------------------------------------------------------------------------------------------------------
# Packing


def pack(parts: Sequence[Patches], vision: VisionSpec, device: torch.device) -> tuple[PackedImages, torch.Tensor]:
    """(the images of samples end to end, how many each sample has, int64 [B] on the device)."""
    grid_hw_I2 = np.concatenate([part.grid_hw_I2 for part in parts])
    patches_NP = np.concatenate([part.patches_NP for part in parts])
    patches_I = grid_hw_I2.prod(axis=1, dtype=np.int64)
    arrangement = Arrangement.of(vision, grid_hw_I2, device)
    images = PackedImages.of(patches_NP, vision.positions(grid_hw_I2), patches_I, device, arrangement=arrangement)
    return images, torch.tensor([len(part.grid_hw_I2) for part in parts], device=device)


def mean_features(features_ND: torch.Tensor, images: PackedImages, images_B: torch.Tensor) -> torch.Tensor:
    """The mean over patches of each image, then over the images of each sample, fp32 [B, D]."""
    image_ID = torch.stack([part.float().mean(0) for part in features_ND.split(list(images.segments.q_lengths_N))])
    return torch.stack([part.mean(0) for part in image_ID.split(images_B.tolist())])


def _chunks(items: Iterable[tuple], most: int) -> Iterator[list[tuple]]:
    """(what, Patches) pairs in order, together while they have at most `most` patches; one pair at least."""
    chunk: list[tuple] = []
    used = 0
    for item in items:
        count = len(item[1].patches_NP)
        if chunk and used + count > most:
            yield chunk
            chunk, used = [], 0
        chunk.append(item)
        used += count
    if chunk:
        yield chunk
