"""A 64-bit perceptual hash of an image, and the search for the nearest earlier one.

Hash: grey, 32 x 32, discrete cosine transform; bit = whether one of the 8 x 8 lowest frequencies (the mean's row and
column left out) lies above their median. Integer arithmetic throughout: one image has one hash on every machine.

Two images are near if their hashes differ in at most k bits and their aspect ratios by at most a tenth: the hash itself
does not see how far the image was squeezed.

Search: cut 64 bits into four bands. Two hashes at most k bits apart have a band in which they are at most k // 4 bits
apart, so looking up every band value within k // 4 bits finds all of them: exact, and far fewer than all comparisons
(multi-index hashing, Norouzi, Punjani and Fleet 2012, arXiv:1307.2982).
"""

from array import array
from itertools import combinations

import numpy as np
from PIL import Image

SIDE, FREQUENCIES = 32, 8
BANDS, BAND_BITS = 4, 16
ASPECT_SLACK = 1.1
MAX_DISTANCE = 15  # beyond it unrelated images meet, and a search looks up thousands of band values

_COSINES = np.outer(np.arange(1, FREQUENCIES + 1), 2 * np.arange(SIDE) + 1) * np.pi / (2 * SIDE)
_COSINES = np.round(np.cos(_COSINES) * (1 << 12)).astype(np.int64)
_BAND = (1 << BAND_BITS) - 1


def perceptual_hash(pixels_HW3: np.ndarray) -> int:
    """64-bit hash of RGB pixels uint8 [H, W, 3]; close images differ in few bits."""
    grey = Image.fromarray(pixels_HW3).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    waves = (_COSINES @ np.asarray(grey, np.int64) @ _COSINES.T).ravel()
    middle = np.sort(waves)[waves.size // 2]
    return int.from_bytes(np.packbits(waves >= middle).tobytes(), "big")


class NearestEarlier:
    """Images by number, in the order in which they were added; `distance` is at most MAX_DISTANCE."""

    def __init__(self, distance: int):
        self.distance = distance
        self._aspects = array("d")
        # band value -> (hashes, their numbers)
        self._bands: list[dict[int, tuple[array[int], array[int]]]] = [{} for _ in range(BANDS)]
        self._flips = [
            sum(1 << bit for bit in bits)
            for wrong in range(distance // BANDS + 1)
            for bits in combinations(range(BAND_BITS), wrong)
        ]

    def add(self, code: int, aspect: float) -> None:
        """An image of this hash and this width over height."""
        for band, value in zip(self._bands, _split(code), strict=True):
            hashes, numbers = band.setdefault(value, (array("Q"), array("I")))
            hashes.append(code)
            numbers.append(len(self._aspects))
        self._aspects.append(aspect)

    def find(self, code: int, aspect: float) -> int | None:
        """The smallest number of an image near this one, or None."""
        near = set()
        for band, value in zip(self._bands, _split(code), strict=True):
            found = [band[value ^ flip] for flip in self._flips if value ^ flip in band]
            hashes_C = np.frombuffer(b"".join(hashes for hashes, _ in found), np.uint64)
            close_C = _bit_count(hashes_C ^ np.uint64(code)) <= self.distance
            if close_C.any():
                near.update(np.frombuffer(b"".join(numbers for _, numbers in found), np.uintc)[close_C].tolist())
        return min((number for number in near if self._alike(number, aspect)), default=None)

    def _alike(self, number: int, aspect: float) -> bool:
        other = self._aspects[number]
        return max(other, aspect) <= ASPECT_SLACK * min(other, aspect)


def _split(code: int) -> list[int]:
    return [code >> shift & _BAND for shift in range(0, BANDS * BAND_BITS, BAND_BITS)]


def _bit_count(values_C: np.ndarray) -> np.ndarray:
    """Bits set in each uint64: sums of neighbouring 1, 2 and 4 bits, then of bytes by a multiplication."""
    pairs, nibbles, octets, ones = (np.uint64(0x0101010101010101 * byte) for byte in (0x55, 0x33, 0x0F, 0x01))
    values_C = values_C - (values_C >> np.uint64(1) & pairs)
    values_C = (values_C & nibbles) + (values_C >> np.uint64(2) & nibbles)
    return ((values_C + (values_C >> np.uint64(4)) & octets) * ones) >> np.uint64(56)
