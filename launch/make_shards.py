"""Make a small multimodal corpus to train and test on, from images that ship inside two packages: the handwritten
digits of scikit-learn (1,797 scans, 8x8) and the photographs of scikit-image. Nothing is downloaded.

    python launch/make_shards.py OUT              about 42,000 samples, under a minute on two cores
    python launch/make_shards.py OUT --samples 60 a tiny set

writes OUT/tokenizer.json and, each with its index, OUT/train/<task>-0000.tar ... and OUT/heldout/<task>-0000.tar.
Tasks: read, count, ground, multi, caption, text. A digit scan is either in train or held out, never both, and so is
each region of a photograph; the text task has few distinct questions, so its held-out share repeats some.
"""

import argparse
import functools
import importlib.util
import io
import json
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.index import build_index
from data.text import Tokenizer, build_byte_tokenizer

TRAIN_SAMPLES = {"read": 30000, "count": 6000, "ground": 1500, "multi": 1500, "caption": 1500, "text": 1500}
HELDOUT_SAMPLES = 400
SHARD_SAMPLES = 1000
HELDOUT_SHARE = 0.2  # of the scans
TRAIN_REGION = 0.7  # of a photograph's width, from the left; the rest is held out
STAMP = "made.json"
WORDS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
]
WORDS += ["seventeen", "eighteen", "nineteen", "twenty"]
ORDINALS = ("first", "second", "third", "fourth")

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
class Shard:
    """One tar to write."""

    split: str
    task: str
    number: int
    first: int
    count: int
    seed: int


@functools.cache
def load_sources() -> Sources:
    from sklearn.datasets import load_digits

    digits = load_digits()
    folder = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    photographs = {
        subject: np.asarray(Image.open(folder / name).convert("RGB")) for name, subject in PHOTOGRAPHS.items()
    }
    return Sources((digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(int), photographs)


class Maker:
    """Makes the samples of one split; every random choice comes from `rng`."""

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

    # Images

    def canvas(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """(float pixels of lightly tinted and shaded paper, a dark ink)."""
        paper, ink = self.rng.uniform(195, 250, 3), self.rng.uniform(0, 70, 3)
        shade = np.linspace(-1, 1, width) * self.rng.uniform(-12, 12)
        return np.broadcast_to(paper + shade[None, :, None], (height, width, 3)).copy(), ink

    def draw(self, pixels: np.ndarray, ink: np.ndarray, scan: int, box: tuple[int, int, int, int]) -> None:
        """Draw one scan, smoothly enlarged and re-inked, into box = (x, y, width, height).

        For training it is also turned, slanted and roughened a little, as there are few scans; held-out ones stay true.
        """
        x, y, width, height = box
        smooth = Image.Resampling.BICUBIC if self.rng.random() < 0.5 else Image.Resampling.BILINEAR
        pixels_88 = self.sources.scans[scan]
        if not self.heldout:
            pixels_88 = np.clip(pixels_88 + self.rng.normal(0, 14, pixels_88.shape), 0, 255).astype(np.uint8)
        glyph = Image.fromarray(pixels_88).resize((width, height), smooth)
        if not self.heldout:
            glyph = glyph.transform(glyph.size, Image.Transform.AFFINE, self.slant(width, height), smooth)
        stroke = (np.asarray(glyph)[..., None] / 255) ** self.rng.uniform(0.6, 1.5)
        cover = stroke * self.rng.uniform(0.75, 1)
        region = pixels[y : y + height, x : x + width]
        region += cover * (ink - region)

    def slant(self, width: int, height: int) -> tuple[float, ...]:
        """Pillow's affine coefficients of a small turn, slant and stretch about the middle of a glyph."""
        turn, slant, across, down = self.rng.uniform((-0.2, -0.25, 0.9, 0.9), (0.2, 0.25, 1.2, 1.2))
        linear = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        linear = linear @ np.array([[across, slant], [0, down]])
        middle = np.array([width, height]) / 2
        shift = middle - linear @ middle
        return (*linear[0], shift[0], *linear[1], shift[1])

    def encode(self, pixels: np.ndarray) -> tuple[str, bytes]:
        """(member extension, bytes): a PNG or a JPEG."""
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        if self.rng.random() < 0.5:
            image.save(file, "PNG", compress_level=1)
            return "png", file.getvalue()
        image.save(file, "JPEG", quality=self.between(80, 95))
        return "jpg", file.getvalue()

    def digits_in_a_row(self, count: int) -> tuple[np.ndarray, list[int]]:
        """(pixels, scans): `count` digits beside each other, sizes and margins varied."""
        tall = self.between(28, min(70, 168 // count))
        wide = max(14, int(tall * self.rng.uniform(0.65, 0.95)))
        height, gap = tall + self.between(0, 14), self.between(0, 4)
        pixels, ink = self.canvas(height, count * wide + (count - 1) * gap + self.between(4, 16))
        scans = self.rng.choice(self.scans, count).tolist()
        left = (pixels.shape[1] - count * wide - (count - 1) * gap) // 2
        for i, scan in enumerate(scans):
            self.draw(pixels, ink, scan, (left + i * (wide + gap), self.between(0, height - tall), wide, tall))
        return pixels, scans

    def digits_apart(self, scans: list[int]) -> tuple[np.ndarray, list[tuple[int, int, int, int]]]:
        """(pixels, boxes as x, y, width, height): up to six scans in distinct cells of a canvas.

        The canvas does not depend on their number, which could otherwise be told without looking.
        """
        across, down = self.choice(((2, 3), (3, 2)))
        cell_w, cell_h = self.between(38, 60), self.between(38, 60)
        pixels, ink = self.canvas(down * cell_h, across * cell_w)
        boxes = []
        for scan, cell in zip(scans, self.rng.permutation(down * across).tolist(), strict=False):
            height = self.between(28, cell_h)
            width = self.between(20, min(height, cell_w))
            x = cell % across * cell_w + self.between(0, cell_w - width)
            y = cell // across * cell_h + self.between(0, cell_h - height)
            self.draw(pixels, ink, scan, (x, y, width, height))
            boxes.append((x, y, width, height))
        return pixels, boxes

    # Tasks: each returns (question, answer, images, scans used)

    def read(self):
        pixels, scans = self.digits_in_a_row(self.between(1, 3))
        question = self.choice(("What number is written?", "Read the number.", "Which number do you see?"))
        return "<image>" + question, self.number(scans), [pixels], scans

    def count(self):
        scans = self.rng.choice(self.scans, self.between(1, 5)).tolist()
        pixels, _ = self.digits_apart(scans)
        question = self.choice(("How many digits?", "Count the digits.", "How many digits are in the image?"))
        return "<image>" + question, str(len(scans)), [pixels], scans

    def ground(self):
        scans = self.distinct_digits(self.between(2, 4))
        pixels, boxes = self.digits_apart(scans)
        (x, y, width, height), digit = boxes[0], self.sources.labels[scans[0]]
        scale_x, scale_y = 999 / pixels.shape[1], 999 / pixels.shape[0]
        corners = (x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y)
        answer = "<bbox>" + " ".join(str(round(corner)) for corner in corners) + "</bbox>"
        return f"<image>Where is the {digit}?", answer, [pixels], scans

    def multi(self):
        scans = self.distinct_digits(self.between(2, 4))
        images = []
        for scan in scans:
            tall, wide = self.between(28, 56), self.between(24, 44)
            pixels, ink = self.canvas(tall + self.between(0, 28), wide + self.between(4, 32))
            room_y, room_x = pixels.shape[0] - tall, pixels.shape[1] - wide
            self.draw(pixels, ink, scan, (self.between(0, room_x), self.between(0, room_y), wide, tall))
            images.append(pixels)
        marks = "<image>" * len(scans)
        if self.rng.random() < 0.3:
            return marks + "What is the sum of the digits?", str(self.sources.labels[scans].sum()), images, scans
        asked = self.between(0, len(scans) - 1)
        question = f"Which image shows a {self.sources.labels[scans[asked]]}?"
        return marks + question, f"The {ORDINALS[asked]}.", images, scans

    def caption(self):
        subject = self.choice(list(self.sources.photographs))
        photograph = self.sources.photographs[subject]
        border = int(TRAIN_REGION * photograph.shape[1])
        region = photograph[:, border:] if self.heldout else photograph[:, :border]
        height = self.between(min(48, region.shape[0]), min(224, region.shape[0]))
        width = self.between(min(48, region.shape[1]), min(224, region.shape[1]))
        y, x = self.between(0, region.shape[0] - height), self.between(0, region.shape[1] - width)
        crop = region[y : y + height, x : x + width]
        answer = f"A {describe(crop)} photograph of {subject}."
        question = self.choice(("Describe the image.", "What is shown?", "Write a caption."))
        return "<image>" + question, answer, [crop], []

    def text(self):
        a, b, step = self.between(0, 10), self.between(0, 10), self.between(1, 5)
        run = [a + i * step for i in range(4)]
        first, second = self.choice(list(self.sources.photographs)), self.between(2, 9)
        question, answer = self.choice(
            (
                (f"What is {WORDS[a]} plus {WORDS[b]}?", WORDS[a + b]),
                (f"What is {WORDS[max(a, b)]} minus {WORDS[min(a, b)]}?", WORDS[abs(a - b)]),
                (f"{a} + {b} =", str(a + b)),
                (f"{a} x {b} =", str(a * b)),
                (f"Continue: {run[0]}, {run[1]}, {run[2]},", str(run[3])),
                (f"Which is larger, {a} or {b + 11}?", str(b + 11)),
                (f"Write {WORDS[a]} in figures.", str(a)),
                (f"Write {b} in letters.", WORDS[b]),
                (f"Is {a} even or odd?", "odd" if a % 2 else "even"),
                (f"Count from {a} to {a + step}.", " ".join(str(i) for i in range(a, a + step + 1))),
                (f"Count down from {WORDS[step]}.", ", ".join(WORDS[i] for i in range(step, -1, -1))),
                (f"What comes after {WORDS[b]}?", WORDS[b + 1]),
                (f"Say {WORDS[b]} {second} times.", " ".join([WORDS[b]] * second)),
                (f"Reverse the number {100 * second + b}.", str(100 * second + b)[::-1]),
                (f"How many digits has {10**step + a}?", str(len(str(10**step + a)))),
                (f"Repeat: {first}.", f"{first}."),
                (f"How many words are in: {first}?", WORDS[len(first.split())]),
            )
        )
        return question, answer, [], []

    def distinct_digits(self, count: int) -> list[int]:
        """Scans that show `count` different digits."""
        labels = self.sources.labels[self.scans]
        return [int(self.rng.choice(self.scans[labels == d])) for d in self.rng.permutation(10)[:count]]

    def number(self, scans: list[int]) -> str:
        return "".join(str(digit) for digit in self.sources.labels[scans])


def describe(crop: np.ndarray) -> str:
    """Light, colour and shape of a crop in words, read off its pixels."""
    mean = crop.reshape(-1, 3).mean(0)
    light = "dark" if mean.mean() < 85 else "bright" if mean.mean() > 170 else "medium"
    spread = mean.max() - mean.min()
    tone = "grey" if spread < 18 else ("reddish", "greenish", "bluish")[int(mean.argmax())]
    ratio = crop.shape[1] / crop.shape[0]
    shape = "wide" if ratio > 1.25 else "tall" if ratio < 0.8 else "square"
    return f"{light}, {tone}, {shape}"


def write_shard(shard: Shard, folder: str) -> None:
    """Write one tar and its index. What is in it depends on the shard's own seed, not on who writes it."""
    from webdataset import TarWriter

    tasks = list(TRAIN_SAMPLES)
    rng = np.random.default_rng([shard.seed, shard.split == "heldout", tasks.index(shard.task), shard.number])
    maker = Maker(load_sources(), shard.split, rng)
    path = Path(folder) / shard.split / f"{shard.task}-{shard.number:04d}.tar"
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for i in range(shard.first, shard.first + shard.count):
            question, answer, images, scans = getattr(maker, shard.task)()
            key = f"{shard.task}-{i:06d}"
            turns = [{"role": "user", "text": question}, {"role": "assistant", "text": answer}]
            content = {"key": key, "domain": shard.task, "turns": turns, "scans": [int(scan) for scan in scans]}
            sample = {"__key__": key, "json": json.dumps(content).encode()}
            for number, pixels in enumerate(images):
                extension, encoded = maker.encode(pixels)
                sample[f"{number}.{extension}"] = encoded
            writer.write(sample)
    build_index(path, Tokenizer(Path(folder) / "tokenizer.json"))


def plan_shards(samples: int | None, seed: int) -> list[Shard]:
    """The tars to write: default sizes, or `samples` for every task with a quarter of that (at least 16) held out."""
    shards = []
    for task, default in TRAIN_SAMPLES.items():
        count = samples or default
        starts = range(0, count, SHARD_SAMPLES)
        shards += [
            Shard("train", task, number, first, min(SHARD_SAMPLES, count - first), seed)
            for number, first in enumerate(starts)
        ]
        heldout = max(16, samples // 4) if samples else HELDOUT_SAMPLES
        shards.append(Shard("heldout", task, 0, 0, min(heldout, HELDOUT_SAMPLES), seed))
    return shards


def make_shards(out: str | Path, samples: int | None = None, seed: int = 0) -> bool:
    """Make the corpus in `out`; False if it is there already. Raises ValueError if `out` holds anything else."""
    out = Path(out)
    made = {"samples": samples, "seed": seed}
    if samples is not None and samples < 1:
        raise ValueError(f"--samples is {samples}; it must be at least 1")
    if (out / STAMP).is_file():
        found = json.loads((out / STAMP).read_text())
        if found == made:
            return False
        raise ValueError(f"{out} was made with {found}, not {made}; choose another folder or delete it")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty and not a corpus made here; choose another folder")

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split in ("train", "heldout"):
        (partial / split).mkdir(parents=True)
    build_byte_tokenizer(partial / "tokenizer.json")
    shards = plan_shards(samples, seed)
    write = functools.partial(write_shard, folder=str(partial))
    if sum(shard.count for shard in shards) < 2000:
        for shard in shards:
            write(shard)
    else:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(write, shards))
    (partial / STAMP).write_text(json.dumps(made))
    partial.rename(out)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write; must not exist, or be empty, or be made by the same arguments")
    parser.add_argument("--samples", type=int, help="training samples of every task; the default sizes if left out")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another corpus from the same scans")
    arguments = parser.parse_args(argv)
    try:
        made = make_shards(arguments.out, arguments.samples, arguments.seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{arguments.out}: " + ("made" if made else "already made with these arguments; nothing to do"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
