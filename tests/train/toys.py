"""Toy models and inputs for the tests of this folder.

Legend: T tokens of one packed row, N samples of it, U visual rows, D LLM width, I images.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch

from tandem.data.vision import VisionSpec
from tandem.parallel.comm.context import pack_row
from tandem.parallel.comm.transfer import to_device
from tandem.parallel.engines import llm_shards
from tandem.parallel.layout import Layout
from tandem.train.models.encoders.arrangement import Arrangement
from tandem.train.models.encoders.vit import PackedImages
from tandem.train.models.language.llm import VisualGPT
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tests.support import settings

CPU = torch.device("cpu")
LLM_KINDS = {
    "dense": dict(num_experts=0, ffn_width=96),
    "experts": dict(shared_expert_width=0),
    "experts and a shared one": dict(),
}
SWITCHED = {  # kinds with what Megatron-core's plain layers do not have
    "dense layers first": dict(ffn_width=48, first_dense_layers=2, shared_expert_gate=True, tied_embeddings=True),
    "every other layer": dict(ffn_width=48, moe_every=2, qkv_bias=True, output_bias=True, qk_norm=True),
    "norms over all heads": dict(num_experts=0, ffn_width=96, qk_norm=True, qk_norm_whole=True, qkv_bias=True),
}


@dataclass(frozen=True)
class ToyLLM:
    """A whole toy LLM, initialised, and how to run one packed row through it."""

    config: LLMConfig
    layout: Layout
    chunk: VisualGPT

    def losses(self, tokens_T: torch.Tensor, lengths_N, visual_UD=None, at_U=None) -> torch.Tensor:
        """Loss of every token, [T]; a token's label depends on that token alone, so that samples share nothing."""
        positions_T = np.concatenate([np.arange(length) for length in lengths_N]).astype(np.int32)
        row = pack_row(lengths_N, positions_T, self.layout, 0, CPU)
        if visual_UD is None:
            visual_UD, at_U = torch.zeros(0, self.config.width), torch.zeros(0, dtype=torch.long)
        labels_T = (7 * tokens_T + 3) % self.config.vocab_size
        return self.chunk(tokens_1S=tokens_T[None], labels_1S=labels_T[None], row=row, visual_UD=visual_UD, at_U=at_U)[
            0
        ]


def toy_llm(kind: str, layout: Layout, recompute: str = "none") -> ToyLLM:
    """A model of LLM_KINDS or SWITCHED in a grid that stands; equal weights whatever `recompute`."""
    return llm_of(dataclasses.replace(settings("stage1").model.llm, **(LLM_KINDS | SWITCHED)[kind]), layout, recompute)


def llm_of(config: LLMConfig, layout: Layout, recompute: str = "none") -> ToyLLM:
    """The whole model of these settings in a grid that stands."""
    megatron = transformer_config(config, layout, dtype=torch.float32, recompute=recompute, deterministic=False)
    chunk = build_chunk(config, megatron, vp_stage=None, first=True, last=True)
    llm_shards.initialize(chunk, 0, config.init_std, config.layers)
    return ToyLLM(config, layout, chunk)


def random_images(grids_I2, seed: int = 0) -> list[np.ndarray]:
    """Noise for images of these patches down and across, uint8 [n, P] each."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(0, 256, (down * across, VisionSpec().patch_values), np.uint8) for down, across in grids_I2
    ]


def packed(images: list[np.ndarray], grids_I2, shift_I2=None) -> PackedImages:
    """The images end to end; shift_I2 moves the position of all patches of an image, (y, x)."""
    patches_I = [len(image) for image in images]
    positions_N2 = VisionSpec().positions(grids_I2)
    if shift_I2 is not None:
        positions_N2 = positions_N2 + np.repeat(np.asarray(shift_I2, np.int32), patches_I, axis=0)
    return PackedImages.of(np.concatenate(images), positions_N2, patches_I, CPU)


def packed_for(vision: VisionSpec, grids_I2, seed: int = 0) -> PackedImages:
    """Noise for an encoder of this geometry."""
    grids_I2, generator = np.asarray(grids_I2), np.random.default_rng(seed)
    patches_I = grids_I2.prod(1)
    patches_NP = generator.integers(0, 256, (patches_I.sum(), vision.patch_values), np.uint8)
    arrangement = Arrangement.of(vision, grids_I2, CPU)
    return PackedImages.of(patches_NP, vision.positions(grids_I2), patches_I, CPU, arrangement=arrangement)


def to_meta(value):
    """The same input without its numbers: a model that runs on it has read nothing back from the device."""
    return to_device(value, torch.device("meta"))


def pictures(sizes_hw, seed=0):
    """Noise of these sizes in pixels, uint8 [H, W, 3] each."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes_hw]


def pack_pictures(pictures_HW3):
    """(packed images, their grids)."""
    grids = np.array([[picture.shape[0] // 14, picture.shape[1] // 14] for picture in pictures_HW3])
    patches_NP = np.concatenate([VisionSpec().cut(picture) for picture in pictures_HW3])
    return PackedImages.of(patches_NP, VisionSpec().positions(grids), grids.prod(1), CPU), grids
