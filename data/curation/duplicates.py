"""Which samples repeat images of samples kept before: the first seen wins, so only the order of the shards decides.

A medium is known if a kept sample has it with the same bytes, or, for an image, with a perceptual hash at most `near`
bits away and about the same aspect ratio. A sample is a duplicate if all its media are known: a logo in two documents
drops neither. Samples without media are never duplicates, and media of one sample are not compared with each other.
"""

from collections.abc import Sequence

from tandem.data.curation.similar import NearestEarlier
from tandem.data.media.turns import SampleError

DIGEST_BYTES = 16  # blake2b: among 10^12 media, two different ones meet with a chance below 10^-14

# A medium: digest of its bytes in hex; perceptual hash and width over height of an image, None for a video.
Fingerprint = tuple[str, int | None, float | None]


class Duplicates:
    """Media of the samples kept so far. `near` as in filters.Rules, here never None."""

    def __init__(self, near: int):
        self._exact: dict[bytes, int] = {}  # digest -> owner
        self._nearest = NearestEarlier(near)
        self._hash_owners: list[int] = []  # by number in _nearest
        self._owners: list[str] = []

    def keep(self, name: str, media: Sequence[Fingerprint]) -> None:
        """Remember the media of a sample, or raise SampleError."""
        owners = [self._owner(fingerprint) for fingerprint in media]
        found = [owner for owner in owners if owner is not None]
        if found and len(found) == len(media):
            same = all(exact for _, exact in found)
            of = self._owners[min(owner for owner, _ in found)]
            if same:
                raise SampleError("exact duplicate", f"{name} has the same media as {of}")
            raise SampleError("near duplicate", f"{name} looks like {of}")
        owner = len(self._owners)
        self._owners.append(name)
        for digest, code, aspect in media:
            key = bytes.fromhex(digest)
            if key in self._exact:
                continue
            self._exact[key] = owner
            if code is not None and aspect is not None:
                self._nearest.add(code, aspect)
                self._hash_owners.append(owner)

    def _owner(self, fingerprint: Fingerprint) -> tuple[int, bool] | None:
        """(number of the first kept sample with this medium, whether its bytes are the same), or None."""
        digest, code, aspect = fingerprint
        owner = self._exact.get(bytes.fromhex(digest))
        if owner is not None:
            return owner, True
        number = None if code is None or aspect is None else self._nearest.find(code, aspect)
        return None if number is None else (self._hash_owners[number], False)
