"""Masked image modelling: the encoder sees a quarter of the patches and predicts a teacher's features of the others.

The loss is 1 - cosine, in fp32, at masked patches alone (Seed1.5-VL report, section 2.1.2).  The report masks patches
"together with their RoPE embeddings" and does not say where outputs at masked places come from; both readings are here:

    drop    the encoder runs on visible patches alone; a light decoder sees its outputs and mask tokens, all with their
            2D positions, and answers at the masked places (MAE, He et al. 2021): three quarters of the trunk is saved
    token   the encoder runs on all places, with one mask token and no rotation at masked ones.  All masked places of an
            image then have the same input, so the same output: it learns what an image holds, and not where

Legend: N patches, V visible, M masked, P values a patch, D width, Q decoder width, C teacher width, I images.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from tandem.data.vision import VisionSpec
from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig, grid_rotary
from tandem.train.models.layers.blocks import Block, kept_for_backward, run_blocks

READINGS = ("drop", "token")


@dataclass
class MimConfig:
    """mask_ratio: share of each image's patches that is masked.  masked: drop or token, see the module.  decoder_*:
    sizes of the decoder, which only `drop` has."""

    mask_ratio: float = 0.75
    masked: str = "drop"
    decoder_width: int = 512
    decoder_depth: int = 4
    decoder_heads: int = 8

    def __post_init__(self):
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"objective.mim.mask_ratio={self.mask_ratio}: must be between 0 and 1")
        if self.masked not in READINGS:
            raise ValueError(f"objective.mim.masked={self.masked}: must be one of {', '.join(READINGS)}")
        for key in ("decoder_width", "decoder_depth", "decoder_heads"):
            if getattr(self, key) < 1:
                raise ValueError(f"objective.mim.{key}={getattr(self, key)}: must be at least 1")
        if self.decoder_width % (4 * self.decoder_heads):
            raise ValueError(
                f"objective.mim.decoder_width={self.decoder_width} over objective.mim.decoder_heads="
                f"{self.decoder_heads}: each head needs a multiple of 4 channels, half for rows and half for columns"
            )


@dataclass(frozen=True)
class MaskedImages:
    """Packed images and which of their patches are masked.

    masked_M, visible_V: places of the patches in the packing, ascending.  visible: segments of the visible patches.
    """

    images: PackedImages
    mask_N: torch.Tensor
    masked_M: torch.Tensor
    visible_V: torch.Tensor
    visible: Segments

    @staticmethod
    def of(images: PackedImages, mask_N: np.ndarray) -> "MaskedImages":
        """mask_N: bool on the host, see `masking.mask_images`; every image keeps a visible patch.  Asks no device."""
        device = images.patches_NP.device
        borders = np.cumsum([0, *images.segments.q_lengths_N[:-1]])
        visible_I = np.add.reduceat(~mask_N, borders, dtype=np.int64)
        assert visible_I.min() > 0, "an image without a visible patch"
        masked_M, visible_V = np.flatnonzero(mask_N), np.flatnonzero(~mask_N)
        return MaskedImages(
            images=images,
            mask_N=host_to_device(mask_N, device),
            masked_M=host_to_device(masked_M, device),
            visible_V=host_to_device(visible_V, device),
            visible=Segments.of(visible_I, device=device),
        )

    @staticmethod
    def blank(vision: VisionSpec, device: torch.device) -> "MaskedImages":
        """One small black image, all but one patch masked: its losses are cut away."""
        images = PackedImages.blank(vision, device)
        return MaskedImages.of(images, np.arange(len(images.patches_NP)) > 0)


class MaskToken(nn.Module):
    """Puts visible rows at their places, and one learned row everywhere else."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, width))

    def forward(self, rows_VD: torch.Tensor, visible_V: torch.Tensor, patches: int) -> torch.Tensor:
        return self.token.to(rows_VD.dtype).expand(patches, -1).index_copy(0, visible_V, rows_VD)


class Decoder(nn.Module):
    """Encoder outputs at visible places to features at masked places, [M, Q]."""

    def __init__(self, encoder: ViTConfig, mim: MimConfig):
        super().__init__()
        self.rope = (mim.decoder_width // mim.decoder_heads, encoder.rope_base)
        self.enter = nn.Linear(encoder.width, mim.decoder_width)
        self.mask = MaskToken(mim.decoder_width)
        sizes = (mim.decoder_width, mim.decoder_heads, encoder.mlp_ratio, encoder.norm_eps)
        self.blocks = nn.ModuleList(Block(*sizes) for _ in range(mim.decoder_depth))
        self.final_norm = nn.LayerNorm(mim.decoder_width, eps=encoder.norm_eps)

    def forward(self, features_VD: torch.Tensor, masked: MaskedImages, recompute: str) -> torch.Tensor:
        positions_N2 = masked.images.positions_N2
        x_NQ = self.mask(self.enter(features_VD), masked.visible_V, len(positions_N2))
        rotary = grid_rotary(positions_N2, *self.rope)
        x_NQ = run_blocks(self.blocks, x_NQ, *rotary, masked.images.segments, recompute)
        return self.final_norm(x_NQ.index_select(0, masked.masked_M))


class MimHead(nn.Module):
    """What masked image modelling adds to the encoder: the mask token, alone or in a decoder, and the way to C."""

    def __init__(self, encoder: ViTConfig, mim: MimConfig, teacher_width: int):
        super().__init__()
        dropped = mim.masked == "drop"
        self.mask = None if dropped else MaskToken(encoder.width)
        self.decoder = Decoder(encoder, mim) if dropped else None
        self.head = nn.Linear(mim.decoder_width if dropped else encoder.width, teacher_width)


class MimTower(nn.Module):
    """`encoder` and `mim`: masked images and the teacher's features to one loss a masked patch."""

    def __init__(self, encoder: ViTConfig, mim: MimConfig, teacher_width: int, recompute: str = "none"):
        super().__init__()
        self.encoder = SeedViT(encoder)
        self.mim = MimHead(encoder, mim, teacher_width)
        self.recompute = kept_for_backward(recompute)

    def forward(self, masked: MaskedImages, target_MC: torch.Tensor) -> tuple[torch.Tensor]:
        """(fp32 [M],): 1 - cosine of prediction and teacher at each masked patch."""
        predicted_MC = self.predict(masked)
        cosine_M = F.cosine_similarity(predicted_MC.float(), target_MC.float(), dim=-1)
        return (1.0 - cosine_M,)

    def predict(self, masked: MaskedImages) -> torch.Tensor:
        """What the student says of the masked patches, [M, C]."""
        images, visible_V = masked.images, masked.visible_V
        x_VD = self.encoder.embed(images.patches_NP.index_select(0, visible_V))
        if self.mim.decoder is not None:
            rotary = self.encoder.rotary(images.positions_N2.index_select(0, visible_V))
            features_VD = self.encoder.trunk(x_VD, *rotary, masked.visible, self.recompute, images.keep_LI)
            return self.mim.head(self.mim.decoder(features_VD, masked, self.recompute))
        assert self.mim.mask is not None, "without a decoder there is a mask token"
        x_ND = self.mim.mask(x_VD, visible_V, len(images.patches_NP))
        rotary = self.encoder.rotary(images.positions_N2 * ~masked.mask_N[:, None])  # angle 0 at masked places
        features_ND = self.encoder.trunk(x_ND, *rotary, images.segments, self.recompute, images.keep_LI)
        return self.mim.head(features_ND.index_select(0, masked.masked_M))
