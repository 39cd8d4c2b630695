"""The omni-modal tower (report, section 2.1.2, stage iii): one ViT for frames and sound, one text encoder for captions.

    frames, audio            encoder, pool    a mean over the frames, an embedding of the audio
    visual, audio caption    text             an embedding of each                               all: sides of the pairs

The framework is MiCo (2406.09412), whose pre-training code is not public. What follows is read from its published
model (one ViT for all sensors, a video as the mean over its frames, heads of each embedding and of fusions, a
matching head) and from the losses of VAST (2305.18500), on which it builds and whose code its repository carries.
Text is what all is held against: a contrast has frames and the visual caption, audio and the audio caption, or the
fusion of both, one linear layer on concatenated embeddings, and a caption of everything; no two sensors are
contrasted with each other. The text encoder, with cross-attention to the unpooled features, also tells whether media
and caption match (weight 0.1; negatives are drawn from the batch by similarity) and writes the caption (weight 1;
causally, 60% of its tokens masked). Every loss is averaged over the pairs; contrasts share one temperature.

Here MiCo's pairs are the default, and others can be set.  Both captions, fused, stand for the caption of everything.  A
pair's contrast is the sigmoid loss of stage ii, the only contrast of this house, with its own temperature and bias.
Matching and writing are done once for the whole tuple: a `TextDecoder` of their own reads visual and audio caption as
one text, looking at all frames and the audio; every token is written; the negative of a sample is the next sample of
the step, so that it does not depend on which rank has which.

Legend: B samples, I images, F frames, N patches, T tokens, D widths, E width of the embeddings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tandem.data.vision import VisionSpec
from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.encoders.decoder import Reading, TextDecoder
from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig, last_of_each
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.attention_pool import AttentionPool
from tandem.train.models.layers.blocks import kept_for_backward
from tandem.train.models.towers.contrastive import Temperature, TextTower, check_temperature, mean_of_images, normalized

MEDIA, CAPTIONS = ("frames", "audio"), ("visual", "sound")
SOURCES = MEDIA + CAPTIONS
MICO_PAIRS = ("frames:visual", "audio:sound", "frames+audio:visual+sound")


@dataclass
class OmniConfig:
    """What is aligned, and what else is learned.

    pairs: "a:b", a side being one of frames, audio, visual (the caption of the frames) and sound (that of the audio),
        or a fusion of them such as frames+audio.  scale_init, bias_init: what the temperature and bias of each begin
        with, logits being scale * cosine + bias.
    matching_weight, caption_weight: of the two other losses, 0 for none.  decoder_*: sizes of what only they need.

    Raises ValueError for values that cannot be.
    """

    pairs: list[str] = field(default_factory=lambda: list(MICO_PAIRS))
    scale_init: float = 10.0
    bias_init: float = -10.0
    matching_weight: float = 0.1
    caption_weight: float = 1.0
    decoder_width: int = 768
    decoder_depth: int = 6
    decoder_heads: int = 12

    def __post_init__(self):
        self.pairs = [":".join("+".join(side) for side in _sides(pair)) for pair in self.pairs]
        _check_pairs(self.pairs)
        for key in ("matching_weight", "caption_weight"):
            if not 0 <= getattr(self, key) < math.inf:
                raise ValueError(f"objective.omni.{key}={getattr(self, key)}: must be 0, for none, or more")
        check_temperature("objective.omni", self.scale_init, self.bias_init)
        for key in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"objective.omni.{key}={getattr(self, key)}: must be at least 1")
        if self.decoder_width % (2 * self.decoder_heads):
            raise ValueError(
                f"objective.omni.decoder_width={self.decoder_width} over objective.omni.decoder_heads="
                f"{self.decoder_heads}: each head needs an even number of channels, rotary positions turn pairs"
            )

    @property
    def sides(self) -> tuple[str, ...]:
        """Every side of the pairs once, in the order in which the tower gives them."""
        return tuple(dict.fromkeys(side for pair in self.pairs for side in pair.split(":")))


def _sides(pair: str) -> list[list[str]]:
    """Both sides of a pair, each its sources in the order of SOURCES."""
    sides = [[source.strip() for source in side.split("+")] for side in pair.split(":")]
    if len(sides) != 2:
        raise ValueError(
            f"objective.omni.pairs: {pair!r} must be two sides with a colon between, such as frames:visual"
        )
    named = [source for side in sides for source in side]
    for source in named:
        if source not in SOURCES:
            raise ValueError(f"objective.omni.pairs: {pair!r} names {source!r}, must be of {', '.join(SOURCES)}")
    if len(named) != len(set(named)):
        raise ValueError(f"objective.omni.pairs: {pair!r} names a source twice, which would match itself")
    return [sorted(side, key=SOURCES.index) for side in sides]


def _check_pairs(pairs: Sequence[str]) -> None:
    unordered = [frozenset(pair.split(":")) for pair in pairs]
    for place, pair in enumerate(pairs):
        if unordered[place] in unordered[:place]:
            raise ValueError(f"objective.omni.pairs: {pair!r} is there twice")
    named = {source for pair in pairs for side in pair.split(":") for source in side.split("+")}
    for sources, untaught in ((MEDIA, "the encoder"), (CAPTIONS, "the text encoder")):
        if named.isdisjoint(sources):
            raise ValueError(f"objective.omni.pairs={list(pairs)}: none has {' or '.join(sources)} to teach {untaught}")


@dataclass(frozen=True)
class OmniChunk:
    """B tuples, with index tensors that are made on the host.

    images: of each sample its frames, then its audio as one more image.  texts: of each sample its visual, then its
    audio caption.  frame_F, audio_B: places among the images; frames_B: how many frames each sample has.
    kind_N, number_N: of each patch, 0 for frames and 1 for audio, and the number of its frame in the video.
    own: both captions of a sample as one text that looks at all its images.  other: the negative, likewise, and
    other_B: fp32, 0 where it says what the sample's own says, else 1.
    """

    images: PackedImages
    texts: PackedTexts
    frame_F: torch.Tensor
    audio_B: torch.Tensor
    frames_B: torch.Tensor
    kind_N: torch.Tensor
    number_N: torch.Tensor
    own: Reading
    other: Reading | None
    other_B: torch.Tensor | None

    @staticmethod
    def of(
        images: PackedImages,
        frames_B: Sequence[int] | np.ndarray,
        captions: Sequence[tuple[np.ndarray, np.ndarray]],
        negatives: Sequence[tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> "OmniChunk":
        """A chunk on the images' device, which is not asked for anything.

        images: see above; frames_B counts the frames of each sample, at least one.  captions: tokens of the visual and
        of the audio caption of each sample.  negatives: those of the sample that follows in the global step (after the
        last one comes the first), wherever it is encoded; needed with a matching loss.  Where they are word for word
        the sample's own they count as no negative.
        """
        device = images.patches_NP.device
        patches_I, frames_B = np.array(images.segments.q_lengths_N), np.asarray(frames_B, np.int64)
        assert len(captions) == len(frames_B) and len(patches_I) == frames_B.sum() + len(frames_B), "not B tuples"
        assert frames_B.min() > 0, "a tuple without a frame"
        audio_B = np.cumsum(frames_B + 1) - 1
        number_I = np.concatenate([np.append(np.arange(frames), 0) for frames in frames_B])
        kind_I = np.zeros_like(patches_I)
        kind_I[audio_B] = 1
        patches_B = np.add.reduceat(patches_I, audio_B - frames_B)
        other_B = None
        if negatives is not None:
            pairs = zip(captions, negatives, strict=True)
            other_B = [any(not np.array_equal(*both) for both in zip(mine, its, strict=True)) for mine, its in pairs]
        texts = [caption for both in captions for caption in both]
        return OmniChunk(
            images=images,
            texts=PackedTexts.of(np.concatenate(texts), np.array([len(text) for text in texts]), device),
            frame_F=host_to_device(np.flatnonzero(kind_I == 0), device),
            audio_B=host_to_device(audio_B, device),
            frames_B=host_to_device(frames_B, device),
            kind_N=host_to_device(np.repeat(kind_I, patches_I), device),
            number_N=host_to_device(np.repeat(number_I, patches_I), device),
            own=_as_one(captions, patches_B, device),
            other=None if negatives is None else _as_one(negatives, patches_B, device),
            other_B=None if negatives is None else host_to_device(np.array(other_B, np.float32), device),
        )

    @staticmethod
    def blank(vision: VisionSpec, device: torch.device) -> "OmniChunk":
        """One tuple of two black images and token 0: its outputs are cut away."""
        image = PackedImages.blank(vision, torch.device("cpu"))
        patches_NP, positions_N2 = (np.tile(x.numpy(), (2, 1)) for x in (image.patches_NP, image.positions_N2))
        captions = [(np.zeros(1, np.int64), np.zeros(1, np.int64))]
        arrangement = Arrangement.of(vision, np.array(2 * [vision.blank_grid]), device)
        lengths_I = 2 * list(image.segments.q_lengths_N)
        images = PackedImages.of(patches_NP, positions_N2, lengths_I, device, arrangement=arrangement)
        return OmniChunk.of(images, [1], captions, captions)


def _as_one(captions, patches_B: np.ndarray, device) -> Reading:
    """Both captions of each sample as one text, with all patches of the sample to look at."""
    joined = [np.concatenate(both) for both in captions]
    texts = PackedTexts.of(np.concatenate(joined), np.array([len(text) for text in joined]), device)
    seen = Segments.of(texts.segments.q_lengths_N, patches_B, device=device)
    return Reading(texts.tokens_T, texts.positions_T, texts.segments, seen)


class Matching(nn.Module):
    """Feature of a whole text, <eos>'s, to the logit that it belongs to what it looked at."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.out = nn.Linear(width, 1)

    def forward(self, last_BD: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(F.gelu(self.up(last_BD), approximate="tanh")))[:, 0].float()


class Reader(nn.Module):
    """The decoder, and what it is for: the matching loss, the caption loss, or both."""

    def __init__(self, encoder: ViTConfig, config: OmniConfig, vocab: int):
        super().__init__()
        width, eps = config.decoder_width, encoder.norm_eps
        writes, matches = config.caption_weight > 0, config.matching_weight > 0
        self.decoder = TextDecoder(
            width,
            config.decoder_depth,
            config.decoder_heads,
            context_width=encoder.width,
            vocab=vocab,
            kinds=len(MEDIA),
            writes=writes,
            eps=eps,
        )
        self.matching = Matching(width, eps) if matches else None
        self.words = nn.Linear(width, vocab, bias=False) if writes else None

    def forward(self, features_ND: torch.Tensor, chunk: OmniChunk, recompute: str) -> list[torch.Tensor]:
        """Losses of each sample, fp32 [B], of those there are: matching, then caption."""
        readings = []
        if self.matching is not None:
            assert chunk.other is not None, "a matching loss needs negatives"
            readings += [chunk.own, chunk.other]
        if self.words is not None:
            readings += [replace(chunk.own, causal=True)]
        read = self.decoder(readings, features_ND, chunk.kind_N, chunk.number_N, recompute)
        losses = []
        if self.matching is not None and chunk.other_B is not None:
            last_BD = [last_of_each(x_TD, reading.own) for x_TD, reading in zip(read[:2], readings[:2], strict=True)]
            own_B, other_B = self.matching(torch.cat(last_BD)).chunk(2)
            losses += [(F.softplus(-own_B) + chunk.other_B * F.softplus(other_B)) / 2]
        if self.words is not None:
            loss_T = self._loss(self.words, read[-1], chunk.own.tokens_T, recompute)
            tokens_B = chunk.own.own.cu_q_N1.diff().long()
            losses += [torch.segment_reduce(loss_T, "sum", lengths=tokens_B, unsafe=True)]  # unsafe: see mean_of_images
        return losses

    def _loss(self, words, x_TD, tokens_T, recompute):
        if recompute != "none" and torch.is_grad_enabled():  # logits are the largest thing a small tower would keep
            return checkpoint(self._cross_entropy, words, x_TD, tokens_T, use_reentrant=False)
        return self._cross_entropy(words, x_TD, tokens_T)

    @staticmethod
    def _cross_entropy(words, x_TD, tokens_T):
        return F.cross_entropy(words(x_TD).float(), tokens_T, reduction="none")


class OmniHead(nn.Module):
    """What omni-modal training adds: fusions, temperatures, and the reader where a loss needs it."""

    def __init__(self, encoder: ViTConfig, config: OmniConfig, width: int, vocab: int):
        super().__init__()
        self.sides, self.pairs = config.sides, tuple(config.pairs)
        fused = [side for side in self.sides if "+" in side]
        self.fusions = nn.ModuleDict({_named(side): nn.Linear((side.count("+") + 1) * width, width) for side in fused})
        self.temperatures = nn.ModuleDict(
            {_named(pair): Temperature(config.scale_init, config.bias_init) for pair in self.pairs}
        )
        reads = config.matching_weight > 0 or config.caption_weight > 0
        self.reader = Reader(encoder, config, vocab) if reads else None

    def forward(self, embedded: dict[str, torch.Tensor], features_ND, chunk: OmniChunk, recompute: str):
        sides = [normalized(self._side(side, embedded)) for side in self.sides]
        scales, biases = zip(*(self.temperatures[_named(pair)]() for pair in self.pairs), strict=True)
        losses = [] if self.reader is None else self.reader(features_ND, chunk, recompute)
        return (*sides, *scales, *biases, *losses)

    def _side(self, side, embedded):
        if "+" not in side:
            return embedded[side]
        fusion: Any = self.fusions[_named(side)]
        return fusion(torch.cat([embedded[source] for source in side.split("+")], dim=-1).to(fusion.bias.dtype))


def _named(side_or_pair: str) -> str:
    """As part of a parameter's name."""
    return side_or_pair.replace("+", "_").replace(":", "_with_")


class OmniTower(nn.Module):
    """Parts `encoder`, `pool`, `text`, named as in `ContrastiveTower`, and `omni`.

    width: of the embeddings.  recompute: as there, for the decoder too.
    """

    def __init__(
        self,
        encoder: ViTConfig,
        text: TextConfig,
        config: OmniConfig,
        *,
        width: int,
        recompute: str = "none",
    ):
        super().__init__()
        self.encoder = SeedViT(encoder)
        self.pool = AttentionPool(encoder.width, encoder.heads, width, encoder.norm_eps)
        self.text = TextTower(text, width)
        self.omni = OmniHead(encoder, config, width, text.vocab_size)
        self.recompute = kept_for_backward(recompute)

    def forward(self, chunk: OmniChunk) -> tuple[torch.Tensor, ...]:
        """What `omni_loss` takes, all fp32.

        Of each of `config.sides` unit vectors [B, E]; of each of `config.pairs` its scale (); of each its bias (); and,
        where their weights are above 0, the matching loss of each sample [B], the mean of its own caption's and of the
        negative's (of a zero where that is none), and the caption loss of each sample [B], a sum over its tokens.
        """
        features_ND = self.encoder(chunk.images, self.recompute)
        pooled_IE = self.pool(features_ND, chunk.images.segments).float()
        visual_BE, sound_BE = self.text(chunk.texts, self.recompute).float().unflatten(0, (-1, 2)).unbind(1)
        embedded = {
            "frames": mean_of_images(pooled_IE.index_select(0, chunk.frame_F), chunk.frames_B),
            "audio": pooled_IE.index_select(0, chunk.audio_B),
            "visual": visual_BE,
            "sound": sound_BE,
        }
        return self.omni(embedded, features_ND, chunk, self.recompute)

    def embed_images(self, images: PackedImages, images_of_sample_B: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors [B, E] of frames: the mean over each sample's successive images, None for one each."""
        pooled_IE = self.pool(self.encoder(images, self.recompute), images.segments)
        return normalized(mean_of_images(pooled_IE.float(), images_of_sample_B))

    def embed_audio(self, images: PackedImages) -> torch.Tensor:
        """Unit vectors [B, E] of audio, an image each."""
        return self.embed_images(images)

    def embed_texts(self, texts: PackedTexts) -> torch.Tensor:
        """Unit vectors [B, E] of texts."""
        return normalized(self.text(texts, self.recompute))
