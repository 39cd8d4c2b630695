"""Tasks of the encoder's own stages: images with captions, and videos that say aloud what they show.

    digit   <image>                a photo of the digit three
    photo   <image>                a picture of a tabby cat
    sound   <video>                a three moves to the left     (half stand still: a photo of the digit three)
            What is heard?         a voice says three            (the tone of three, where there is no espeak-ng)

Each has its class as "label". Captions follow templates, of which one is drawn for each sample.
"""

import numpy as np

from tandem.data.synthesis.images import WORDS, ImageTasks, describe
from tandem.data.synthesis.maker import PHOTOGRAPHS, Sample, dialogue
from tandem.data.synthesis.speech import named_aloud, speaks
from tandem.data.synthesis.videos import DIRECTIONS, VideoTasks, encode_clip

DIGITS = (
    "a photo of the digit {0}",
    "the number {0}, handwritten",
    "a handwritten {0}",
    "a scan of the digit {0}",
    "the digit {0} in ink",
    "somebody wrote the number {0}",
    "{0}",
)
PHOTOS = ("a photo of {0}", "a picture of {0}", "a {1} photograph of {0}", "this is {0}", "{0}")
MOVING = ("{1} {0} moves {2}", "the digit {0} moving {2}", "a handwritten {0} goes {2}", "{0}, moving {2}")
PANNING = ("a slow look over {0}", "the camera passes over {0}", "a moving picture of {0}")
SPOKEN = ("a voice says {0}", "somebody says {0}", "{0}, spoken aloud", "a voice saying {0}")
TONES = ("the tone of {0}", "a telephone dials {0}", "keys that stand for {0}")
WAYS = {"right": "to the right", "left": "to the left", "down": "down", "up": "up"}
PICTURES = 0.05  # of the videos: a photograph instead of a digit
STILLS = 0.5  # of the others: a picture that does not move, as in the digit task
PAN_SECONDS, STILL_FPS = 3, 5


class VisionTasks(ImageTasks, VideoTasks):
    """Each task makes one sample. Scans are dealt in rounds, so that each comes equally often."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self._round: list[int] = []

    def next_scan(self) -> tuple[int, str]:
        """(scan, its digit as a word)."""
        if not self._round:
            self._round = self.rng.permutation(self.scans).tolist()
        scan = self._round.pop()
        return scan, WORDS[self.sources.labels[scan]]

    def digit(self) -> Sample:
        scan, word = self.next_scan()
        pixels, scans = self.digits_in_a_row(1, [scan])
        turns = dialogue("<image>", self.choice(DIGITS).format(word))
        return Sample(turns, [self.encode(pixels)], scans, label=word)

    def photo(self) -> Sample:
        crop, subject = self.crop_of_photograph()
        turns = dialogue("<image>", self.choice(PHOTOS).format(subject, describe(crop)))
        return Sample(turns, [self.encode(crop)], entity=subject, label=subject)

    def sound(self) -> Sample:
        if self.rng.random() < PICTURES:
            frames, fps, name = self.panning()
            number, seconds, scans = 10 + list(PHOTOGRAPHS.values()).index(name), PAN_SECONDS, []
            shown = self.choice(PANNING).format(name)
        else:
            (scan, name), seconds, way = self.next_scan(), self.between(1, 3), self.choice(tuple(DIRECTIONS))
            number, scans = WORDS.index(name), [scan]
            if self.rng.random() < STILLS:
                frames, fps = self.standing(scan, seconds), STILL_FPS
                shown = self.choice(DIGITS).format(name)
            else:
                frames, fps = self.moving(scans, [], seconds, way)
                shown = self.choice(MOVING).format(name, "an" if name == "eight" else "a", WAYS[way])
        track_S = named_aloud(name, number, seconds, self.heldout, self.rng)
        heard = self.choice(SPOKEN if speaks() else TONES).format(name)
        turns = dialogue("<video>", shown) + dialogue("What is heard?", heard)
        codecs = self.choice(("libx264", "mpeg4")), self.choice(("aac", "libmp3lame"))
        return Sample(turns, [("mp4", encode_clip(frames, fps, codecs[0], track_S, codecs[1]))], scans, label=name)

    def standing(self, scan: int, seconds: int) -> np.ndarray:
        """Frames of one picture of a scan, with even sides as video wants them."""
        pixels, _ = self.digits_in_a_row(1, [scan])
        height, width = (side // 2 * 2 for side in pixels.shape[:2])
        picture = np.clip(pixels[:height, :width], 0, 255).astype(np.uint8)
        return np.repeat(picture[None], seconds * STILL_FPS, axis=0)

    def panning(self) -> tuple[np.ndarray, int, str]:
        """(frames, frames a second, subject): a window that moves slowly over a region of a photograph."""
        crop, subject = self.crop_of_photograph()
        height, width = (min(side // 3 * 2, 112) for side in crop.shape[:2])
        room, fps = np.subtract(crop.shape[:2], (height, width)), self.between(5, 10)
        start, end = self.rng.uniform(0, room, (2, 2))
        corners = np.rint(np.linspace(start, end, PAN_SECONDS * fps)).astype(int)
        return np.stack([crop[y : y + height, x : x + width] for y, x in corners]), fps, subject
