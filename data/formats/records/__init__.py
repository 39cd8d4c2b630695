"""What a record of a JSON file, a table or a folder means.  `--format llava` names `data/formats/records/llava.py`,
whose `FORMAT` turns a record into a conversation with its media; `auto` takes the format that most records fit.
"""

from collections.abc import Iterable

from tandem.data.formats.records.base import Conversation, Medium, RecordFormat
from tandem.data.registry import Registry

__all__ = ["Conversation", "Medium", "RecordFormat", "find_format", "format_of", "formats", "likely_format"]


formats = Registry[RecordFormat](__name__, __path__, "FORMAT", "--format").all


def find_format(name: str) -> RecordFormat:
    """The format of this name or alias. Raises ValueError, with the names there are, for any other."""
    for each in formats().values():
        if name in (each.name, *each.aliases):
            return each
    raise ValueError(f"--format is {name!r}; choose auto or one of {', '.join(formats())}")


def format_of(record: object) -> RecordFormat | None:
    """The format that a record fits, or None."""
    return next((each for each in formats().values() if isinstance(record, dict) and each.fits(record)), None)


def likely_format(records: Iterable[object]) -> RecordFormat | None:
    """The format that most of these records fit; None where they fit none."""
    fitting = [each.name for record in records if (each := format_of(record)) is not None]
    return find_format(max(sorted(set(fitting)), key=fitting.count)) if fitting else None
