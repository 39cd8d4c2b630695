"""Best-fit-decreasing packing of a block of samples into rows of equal length.

The emptiest row, if it has room, is not emitted: its samples are carried over as row 0 of the next block. Unless that
block fits into row 0, the row is emitted with it. So nearly every emitted row is full, and a sample waits for one block
at most. No sample is split, and therefore no image.

Shapes: N samples of a block.
"""

from bisect import bisect_left, insort

import numpy as np


def pack_block(length_N: np.ndarray, carried: int, seq_length: int) -> tuple[np.ndarray, int]:
    """Assign samples to rows.

    length_N: tokens of each sample, each at most seq_length; the first `carried` samples come from the last block and
    share row 0. Returns (row_N int64, the row to carry over or -1). Rows 0..row_N.max() are all non-empty.
    """
    row_N = np.zeros(len(length_N), np.int64)
    if len(length_N) == 0:
        return row_N, -1
    lengths = length_N.tolist()
    bits = len(lengths).bit_length()
    rooms = [seq_length - sum(lengths[:carried]) << bits] if carried else []  # free tokens << bits | row, ascending
    n_rows = len(rooms)
    fresh = (np.argsort(-length_N[carried:], kind="stable") + carried).tolist()
    rows = []
    for length in (length_N[fresh] << bits).tolist():
        index = bisect_left(rooms, length)
        if index < len(rooms):
            room = rooms.pop(index)
        else:
            room = seq_length << bits | n_rows
            n_rows += 1
        rows.append(room)
        insort(rooms, room - length)
    row_N[fresh] = np.array(rows, np.int64) & ((1 << bits) - 1)
    return row_N, _row_to_carry([(room >> bits, room & ((1 << bits) - 1)) for room in rooms], carried > 0)


def _row_to_carry(rooms: list[tuple[int, int]], first_was_carried: bool) -> int:
    """The row with the most room, -1 if all are full. A carried row is carried again only if it is the only row."""
    for room, row in reversed(rooms):
        if room and not (row == 0 and first_was_carried and len(rooms) > 1):
            return row
    return -1
