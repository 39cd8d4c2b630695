"""Toy tuples of frames, sound and two captions, and their loss by the formulas of tests/reference, in fp64."""

from dataclasses import dataclass

import numpy as np
import torch

from tandem.train.models.encoders.text_encoder import TextConfig
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers.omni import OmniChunk, OmniConfig, OmniTower
from tests.reference import vision
from tests.train.toys import packed, random_images

ENCODER = ViTConfig(width=16, depth=2, heads=2, mlp_ratio=2.0, rope_base=100.0)
TEXT = TextConfig(width=12, depth=1, heads=2, vocab_size=23, max_tokens=16, mlp_ratio=2.0, rope_base=50.0)
WIDTH = 10
SIZES = {"decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2, "scale_init": 5.0, "bias_init": -2.0}


@dataclass(frozen=True)
class Tuple:
    """A sample: patches and grids of its frames and, last, of its audio; tokens of the visual and the audio caption."""

    grids: list[list[int]]
    images: list[np.ndarray]
    captions: tuple[np.ndarray, np.ndarray]


def toy_tuples(count: int) -> list[Tuple]:
    """Of 1, 2 or 3 frames and captions of different lengths; the last two say the same words."""
    random = np.random.default_rng(0)
    made = []
    for place in range(count):
        grids = [[[2, 2], [4, 2], [2, 4]][(place + frame) % 3] for frame in range(1 + place % 3)] + [
            [4, 2 + place % 2 * 2]
        ]
        captions = tuple(random.integers(1, TEXT.vocab_size, length) for length in (2 + place % 4, 4 - place % 3))
        made.append(Tuple(grids, random_images(grids, seed=place), captions))
    return [*made[:-1], Tuple(made[-1].grids, made[-1].images, made[-2].captions)]


def toy_tower(config: OmniConfig, recompute: str = "none") -> OmniTower:
    """Initialised; norms and biases are moved from ones and zeros, so that each is seen to be in its place."""
    tower = OmniTower(ENCODER, TEXT, config, width=WIDTH, recompute=recompute)
    initialize(tower, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.dim() == 1 or name == "pool.query":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tower


def toy_chunk(tuples: list[Tuple], places: list[int]) -> OmniChunk:
    """The samples at `places`, in that order, of a global step that is `tuples`."""
    mine = [tuples[place] for place in places]
    return OmniChunk.of(
        packed(
            [image for sample in mine for image in sample.images], [grid for sample in mine for grid in sample.grids]
        ),
        [len(sample.images) - 1 for sample in mine],
        [sample.captions for sample in mine],
        [tuples[(place + 1) % len(tuples)].captions for place in places],
    )


def tokens_of(tuples: list[Tuple]) -> int:
    return sum(len(text) for sample in tuples for text in sample.captions)


# ---- the reference -------------------------------------------------------------------------------------------------
class Reference:
    """weights: the tower's, by name, fp64 leaves."""

    def __init__(self, tower: OmniTower, config: OmniConfig):
        self.weights = {name: p.detach().double().requires_grad_() for name, p in tower.named_parameters()}
        self._settings = {"model": {"encoder": vars(ENCODER), "text": vars(TEXT)}, "objective": {"omni": vars(config)}}

    def terms(self, tuples: list[Tuple]) -> dict[str, torch.Tensor]:
        """Each term over the whole batch, before its weight."""
        return vision.omni_terms(self.weights, batch_of(tuples), self._settings, step=0)

    def loss(self, terms: dict[str, torch.Tensor]) -> torch.Tensor:
        factors = vision.weights_of_terms("vit_omni", self._settings)
        return sum(factors[name] * term for name, term in terms.items())


def batch_of(tuples: list[Tuple]) -> dict:
    """A whole step as the reference takes it."""
    images_S = [len(sample.images) for sample in tuples]
    return {
        "patches_NP": torch.from_numpy(np.concatenate([image for sample in tuples for image in sample.images])),
        "grid_I2": torch.tensor([grid for sample in tuples for grid in sample.grids]),
        "sample_I": torch.repeat_interleave(torch.tensor(images_S)),
        "audio_I": torch.tensor([image == images - 1 for images in images_S for image in range(images)]),
        "captions": [[caption.tolist() for caption in sample.captions] for sample in tuples],
    }
