"""What the members of a shard mean.  `--format pairs` names `data/formats/in_place/pairs.py`, whose `FORMAT` finds the
texts and media of a sample and turns them into a conversation; `auto` takes the format that most samples fit.
"""

from collections.abc import Iterable

from tandem.data.formats.in_place.base import Entry, Format
from tandem.data.registry import Registry
from tandem.data.shards.tars import Member, Sample

__all__ = ["AUTO", "Entry", "Format", "contents", "find_format", "format_of", "formats", "likely_format", "take_texts"]
AUTO = "auto"
TEXTS = ("json", "text", "lines")  # kinds of members


formats = Registry[Format](__name__, __path__, "FORMAT", "format").all


def find_format(name: str) -> Format:
    """The format of this name. Raises ValueError, with the names there are, for any other."""
    if name not in formats():
        raise ValueError(f"there is no format {name!r} of shards; choose {AUTO} or one of {', '.join(formats())}")
    return formats()[name]


def format_of(sample: Sample) -> Format | None:
    """The format that a sample fits, or None. `taken` of its members of texts must be their bytes."""
    return next((each for each in formats().values() if each.fits(sample)), None)


def take_texts(member: Member) -> bytes | None:
    """What a pass over a shard takes of its members for `format_of` and `contents`."""
    return member.read() if member.kind in TEXTS else None


def contents(sample: Sample) -> list[tuple[Entry, dict]]:
    """The samples of one key with their turns, domain and entity, whatever their format. Raises SampleError."""
    if sample.problem is not None:
        raise sample.problem
    format, found = format_of(sample) or find_format("turns"), []
    for entry in format.entries(sample):
        data, plain = (entry.text.data, entry.text.plain) if entry.text else (b"", False)
        kinds = [medium.kind for medium in entry.media]
        found.append((entry, format.content(data, plain, kinds, None, entry.name)))
    return found


def likely_format(samples: Iterable[Sample]) -> Format | None:
    """The format that most of these samples fit; None where they fit none."""
    fitting = [each.name for sample in samples if (each := format_of(sample)) is not None]
    return find_format(max(sorted(set(fitting)), key=fitting.count)) if fitting else None
