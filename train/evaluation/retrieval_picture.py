"""Draws what an encoder finds: images, each beside the captions nearest to it, the right one marked.

Images are shown as the encoder sees them, of a video the middle frame.  They are drawn at random, with a seed, from the
samples whose captions differ, so that the picture holds mistakes as often as the data does.

Legend: N patches, U texts, E embedding width.
"""

import textwrap
from pathlib import Path

import numpy as np
import torch

from tandem.data.reading.labelled import LabelledSample, Patches
from tandem.data.vision import VisionSpec

QUERIES = 12
CAPTIONS = 5
ACROSS = 3  # queries beside each other
LETTERS = 46  # of a caption
CELL, IMAGE, TITLE = (4.9, 1.35), 1.2, 0.35  # inches: a query, its image's width, the line above all


class Gallery:
    """QUERIES of the samples that it is shown, each with another caption, any as likely as any other."""

    def __init__(self, vision: VisionSpec):
        self._vision = vision
        self._rng = np.random.default_rng(0)
        self._captions: set[str] = set()
        self.places: list[int] = []
        self.pixels: list[np.ndarray] = []

    def see(self, place: int, sample: LabelledSample) -> None:
        """Shown sample number `place`, which may take the place of another."""
        caption = sample.captions[0] if sample.captions else None
        if caption is None or caption in self._captions:
            return
        self._captions.add(caption)
        if len(self.places) < QUERIES:
            self.places.append(place)
            self.pixels.append(middle(sample.images, self._vision))
        elif (slot := int(self._rng.integers(len(self._captions)))) < QUERIES:
            self.places[slot], self.pixels[slot] = place, middle(sample.images, self._vision)


def middle(images: Patches, vision: VisionSpec) -> np.ndarray:
    """The image in the middle, uint8 [H, W, 3], put together from its patches."""
    which = len(images.grid_hw_I2) // 2
    first, end = (int(images.grid_hw_I2[:stop].prod(axis=1).sum()) for stop in (which, which + 1))
    return vision.to_pixels(images.patches_NP[first:end], images.grid_hw_I2[which].tolist())


def draw(
    gallery: Gallery,
    right: list[str],
    alike: list[set[str]],
    image_QE: torch.Tensor,
    texts: list[str],
    text_UE: torch.Tensor,
    out: Path,
) -> None:
    """Writes the picture.

    right: the caption of each query; alike: those of samples with its label.  image_QE, text_UE: unit embeddings.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(right) // ACROSS)
    width, height = ACROSS * CELL[0], rows * CELL[1] + TITLE
    figure = pyplot.figure(figsize=(width, height))
    said = "✓ the image's own caption   green: captions of its class   red: of others"
    figure.text(0.1 / width, 1 - 0.1 / height, said, fontsize=9, verticalalignment="top")
    similarity_QU = image_QE @ text_UE.T
    for query, caption in enumerate(right):
        row, column = divmod(query, ACROSS)
        left, bottom = column * CELL[0], height - TITLE - (row + 1) * CELL[1]
        corner = (left + 0.05) / width, (bottom + 0.05) / height
        axis = figure.add_axes((*corner, IMAGE / width, (CELL[1] - 0.1) / height))
        axis.imshow(gallery.pixels[query])
        axis.axis("off")
        nearest = similarity_QU[query].topk(min(CAPTIONS, len(texts)))
        for line, (value, text) in enumerate(zip(nearest.values.tolist(), nearest.indices.tolist(), strict=True)):
            own = texts[text] == caption
            colour = "green" if own or texts[text] in alike[query] else "firebrick"
            y = (bottom + CELL[1] * (1 - (line + 1) / (CAPTIONS + 1))) / height
            shown = textwrap.shorten(texts[text], LETTERS, placeholder=" …")
            for shift, words in ((0.1, "✓" if own else ""), (0.3, f"{value:5.2f}"), (0.7, shown)):
                place = ((left + IMAGE + shift) / width, y)
                figure.text(*place, words, fontsize=8, color=colour, verticalalignment="center", parse_math=False)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
