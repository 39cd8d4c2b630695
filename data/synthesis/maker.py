"""What toy samples are made of, and how a scan gets onto paper.

The handwritten digits of scikit-learn (1,797 scans, 8x8) and the photographs of scikit-image ship inside the packages.
A digit scan is either in train or held out, never both.
"""

import functools
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

HELDOUT_SHARE = 0.2  # of the scans

PHOTOGRAPHS = {
    "astronaut.png": "an astronaut in an orange suit",
    "brick.png": "a brick wall",
    "camera.png": "a man with a camera on a tripod",
    "cell.png": "a cell under a microscope",
    "chelsea.png": "a tabby cat",
    "coffee.png": "a cup of coffee on a table",
    "coins.png": "old coins",
    "grass.png": "grass",
    "gravel.png": "gravel",
    "hubble_deep_field.jpg": "distant galaxies",
    "ihc.png": "stained tissue",
    "moon.png": "the surface of the moon",
    "motorcycle_left.png": "a motorcycle in a garage",
    "page.png": "a page of print",
    "retina.jpg": "the retina of an eye",
    "rocket.jpg": "a rocket on its launch pad",
    "text.png": "handwriting on paper",
}


@dataclass(frozen=True)
class Sources:
    """What images are made of."""

    scans: np.ndarray  # uint8 [n, 8, 8], 0 to 255
    labels: np.ndarray  # digit of each scan
    photographs: dict[str, np.ndarray]  # subject -> uint8 [H, W, 3]


@dataclass(frozen=True)
class Sample:
    """One sample: its turns, its media as (member extension, bytes), what they were made of, and its class, if any."""

    turns: list[dict]
    media: Sequence[tuple[str, bytes]] = ()
    scans: Sequence[int] = ()
    entity: str | None = None
    label: str | None = None


def dialogue(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]


@functools.cache
def load_sources() -> Sources:
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = Path(str(importlib.resources.files("skimage"))) / "data"
    photographs = {
        subject: np.asarray(Image.open(folder / name).convert("RGB")) for name, subject in PHOTOGRAPHS.items()
    }
    return Sources((digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(int), photographs)


class Maker:
    """Draws for the samples of one split; every random choice comes from `rng`."""

    def __init__(self, sources: Sources, split: str, rng: np.random.Generator):
        self.sources, self.rng, self.heldout = sources, rng, split == "heldout"
        order = np.random.default_rng(1797).permutation(len(sources.labels))
        border = int(HELDOUT_SHARE * len(order))
        self.scans = order[:border] if self.heldout else order[border:]

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return int(self.rng.integers(low, high + 1))

    def choice(self, options):
        return options[self.between(0, len(options) - 1)]

    def distinct_digits(self, count: int) -> list[int]:
        """Scans that show `count` different digits."""
        labels = self.sources.labels[self.scans]
        return [int(self.rng.choice(self.scans[labels == d])) for d in self.rng.permutation(10)[:count]]

    def number(self, scans: list[int]) -> str:
        return "".join(str(digit) for digit in self.sources.labels[scans])

    def canvas(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(float pixels of lightly tinted and shaded paper, a dark ink)."""
        paper, ink = self.rng.uniform(195, 250, 3), self.rng.uniform(0, 70, 3)
        shade = np.linspace(-1, 1, width) * self.rng.uniform(-12, 12)
        return np.broadcast_to(paper + shade[None, :, None], (height, width, 3)).copy(), ink

    def draw(self, pixels: np.ndarray, ink: np.ndarray, scan: int, box: tuple[int, int, int, int]) -> None:
        """Draw one scan into box = (x, y, width, height)."""
        x, y, width, height = box
        blot(pixels, ink, self.stroke(scan, width, height), x, y)

    def stroke(self, scan: int, width: int, height: int) -> np.ndarray:
        """Share of the paper that ink covers, [height, width, 1]: one scan smoothly enlarged and re-inked.

        For training it is also turned, slanted and roughened a little, as there are few scans; held-out ones stay true.
        """
        smooth = Image.Resampling.BICUBIC if self.rng.random() < 0.5 else Image.Resampling.BILINEAR
        pixels_88 = self.sources.scans[scan]
        if not self.heldout:
            pixels_88 = np.clip(pixels_88 + self.rng.normal(0, 14, pixels_88.shape), 0, 255).astype(np.uint8)
        glyph = Image.fromarray(pixels_88).resize((width, height), smooth)
        if not self.heldout:
            glyph = glyph.transform(glyph.size, Image.Transform.AFFINE, self.slant(width, height), smooth)
        stroke = (np.asarray(glyph)[..., None] / 255) ** self.rng.uniform(0.6, 1.5)
        return stroke * self.rng.uniform(0.75, 1)

    def slant(self, width: int, height: int) -> tuple[float, ...]:
        """Pillow's affine coefficients of a small turn, slant and stretch about the middle of a glyph."""
        turn, slant, across, down = self.rng.uniform((-0.2, -0.25, 0.9, 0.9), (0.2, 0.25, 1.2, 1.2))
        linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        linear = linear @ np.array([[across, slant], [0, down]])
        middle = np.array([width, height]) / 2
        shift = middle - linear @ middle
        return (*linear[0], shift[0], *linear[1], shift[1])


def blot(pixels: np.ndarray, ink: np.ndarray, cover: np.ndarray, x: int, y: int) -> None:
    """Ink the float pixels where `cover` says, from (x, y) on."""
    region = pixels[y : y + cover.shape[0], x : x + cover.shape[1]]
    region += cover * (ink - region)
