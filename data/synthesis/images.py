"""Tasks of still images and of text alone: read, count, ground, multi, caption, text."""

import io

import numpy as np
from PIL import Image

from tandem.data.synthesis.maker import Maker, Sample, dialogue

TRAIN_REGION = 0.7  # of a photograph's width, from the left; the rest is held out
WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
WORDS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"]
ORDINALS = ("first", "second", "third", "fourth")


class ImageTasks(Maker):
    """Each task makes one sample."""

    def encode(self, pixels: np.ndarray) -> tuple[str, bytes]:
        """(member extension, bytes): a PNG or a JPEG."""
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        file = io.BytesIO()
        if self.rng.random() < 0.5:
            image.save(file, "PNG", compress_level=1)
            return "png", file.getvalue()
        image.save(file, "JPEG", quality=self.between(80, 95))
        return "jpg", file.getvalue()

    def sample(self, question: str, answer: str, images=(), scans=(), entity: str | None = None) -> Sample:
        return Sample(dialogue(question, answer), [self.encode(pixels) for pixels in images], scans, entity)

    def digits_in_a_row(self, count: int, scans: list[int] | None = None) -> tuple[np.ndarray, list[int]]:
        """(pixels, scans): `count` digits beside each other, sizes and margins varied; random scans if not given."""
        tall = self.between(28, min(70, 168 // count))
        wide = max(14, int(tall * self.rng.uniform(0.65, 0.95)))
        height, gap = tall + self.between(0, 14), self.between(0, 4)
        pixels, ink = self.canvas(height, count * wide + (count - 1) * gap + self.between(4, 16))
        scans = self.rng.choice(self.scans, count).tolist() if scans is None else scans
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

    def read(self) -> Sample:
        pixels, scans = self.digits_in_a_row(self.between(1, 3))
        question = self.choice(("What number is written?", "Read the number.", "Which number do you see?"))
        return self.sample("<image>" + question, self.number(scans), [pixels], scans)

    def count(self) -> Sample:
        scans = self.rng.choice(self.scans, self.between(1, 5)).tolist()
        pixels, _ = self.digits_apart(scans)
        question = self.choice(("How many digits?", "Count the digits.", "How many digits are in the image?"))
        return self.sample("<image>" + question, str(len(scans)), [pixels], scans)

    def ground(self) -> Sample:
        scans = self.distinct_digits(self.between(2, 4))
        pixels, boxes = self.digits_apart(scans)
        (x, y, width, height), digit = boxes[0], self.sources.labels[scans[0]]
        scale_x, scale_y = 999 / pixels.shape[1], 999 / pixels.shape[0]
        corners = (x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y)
        answer = "<bbox>" + " ".join(str(round(corner)) for corner in corners) + "</bbox>"
        return self.sample(f"<image>Where is the {digit}?", answer, [pixels], scans)

    def multi(self) -> Sample:
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
            return self.sample(
                marks + "What is the sum of the digits?", str(self.sources.labels[scans].sum()), images, scans
            )
        asked = self.between(0, len(scans) - 1)
        question = f"Which image shows a {self.sources.labels[scans[asked]]}?"
        return self.sample(marks + question, f"The {ORDINALS[asked]}.", images, scans)

    def crop_of_photograph(self) -> tuple[np.ndarray, str]:
        """(pixels of any region of this split's part of a photograph, its subject)."""
        subject = self.choice(list(self.sources.photographs))
        photograph = self.sources.photographs[subject]
        border = int(TRAIN_REGION * photograph.shape[1])
        region = photograph[:, border:] if self.heldout else photograph[:, :border]
        height = self.between(min(48, region.shape[0]), min(224, region.shape[0]))
        width = self.between(min(48, region.shape[1]), min(224, region.shape[1]))
        y, x = self.between(0, region.shape[0] - height), self.between(0, region.shape[1] - width)
        return region[y : y + height, x : x + width], subject

    def caption(self) -> Sample:
        crop, subject = self.crop_of_photograph()
        answer = f"A {describe(crop)} photograph of {subject}."
        question = self.choice(("Describe the image.", "What is shown?", "Write a caption."))
        return self.sample("<image>" + question, answer, [crop], entity=subject)

    def text(self) -> Sample:
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
        return self.sample(question, answer)


def describe(crop: np.ndarray) -> str:
    """Light, colour and shape of a crop in words, read off its pixels."""
    mean = crop.reshape(-1, 3).mean(0)
    light = "dark" if mean.mean() < 85 else "bright" if mean.mean() > 170 else "medium"
    spread = mean.max() - mean.min()
    tone = "grey" if spread < 18 else ("reddish", "greenish", "bluish")[int(mean.argmax())]
    ratio = crop.shape[1] / crop.shape[0]
    shape = "wide" if ratio > 1.25 else "tall" if ratio < 0.8 else "square"
    return f"{light}, {tone}, {shape}"
