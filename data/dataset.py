"""A run's data once it is open: the steps in order, and their bytes."""

from dataclasses import dataclass

from tandem.data.planning.stream import Stream
from tandem.data.reading.reader import ShardReader


@dataclass(frozen=True)
class Data:
    """The stream of steps and the reader of its bytes."""

    stream: Stream
    reader: ShardReader
