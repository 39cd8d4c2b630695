"""Which source the next sample comes from: exact shares, any position at once.

Slots are handed out one by one as seats are in a parliament (Webster, also called Sainte-Lague: Balinski and Young,
Fair Representation, 1982): seat k of source s has priority (2k + 1) / d_s, the lowest priority comes first, ties go to
the first source. That sequence needs no memory: how many of the first p slots a source holds follows from p alone, by
rounding p * d_s / W and moving the few slots that rounding gave too many or too few. So after every slot a source is
within 1/2 + S/2 * share of its share, and after W slots exactly on it.

Shapes: S sources, with whole weights d_s in lowest terms and W their sum; N slots of a run.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class Mixture:
    """The endless sequence of sources for these weights, which are taken as written: 0.1 is one tenth."""

    def __init__(self, weights: Sequence[float | int | Fraction]):
        exact = [Fraction(str(weight)) for weight in weights]
        if not exact or min(exact) <= 0:
            raise ValueError(f"a mixture needs weights above 0, got {list(weights)}")
        scale = math.lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        divisor = math.gcd(*whole)
        self.weights = [weight // divisor for weight in whole]
        self.period = sum(self.weights)  # slots after which every share is exact again
        self._common = math.lcm(*self.weights)

    def counts(self, position: int) -> list[int]:
        """Of the first `position` slots, how many each source holds."""
        weights, period = self.weights, self.period
        counts = [-((period - 2 * position * weight) // (2 * period)) for weight in weights]  # priorities below 2p/W
        sources = range(len(weights))
        while (surplus := sum(counts) - position) > 0:
            last = max(sources, key=lambda s: (Fraction(2 * counts[s] - 1, weights[s]), s))
            counts[last] -= 1
        for _ in range(-surplus):
            following = min(sources, key=lambda s: (Fraction(2 * counts[s] + 1, weights[s]), s))
            counts[following] += 1
        return counts

    def block(self, first: int, count: int) -> np.ndarray:
        """Sources of the slots first .. first + count, int64 [N]."""
        before, after = self.counts(first), self.counts(first + count)
        source_N = np.repeat(np.arange(len(before)), np.subtract(after, before))
        priorities: list[int] = []  # times a common multiple of the weights: whole, so that ties are ties
        for weight, begin, end in zip(self.weights, before, after, strict=True):
            unit = self._common // weight
            priorities += range((2 * begin + 1) * unit, (2 * end + 1) * unit, 2 * unit)
        return source_N[sorted(range(count), key=priorities.__getitem__)]
