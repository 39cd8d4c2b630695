"""Packing a block of samples into rows of equal length: best fit, longest first, with one row left open.

The block is the lookahead. Its worst-filled row is not emitted: those samples are carried into the next block, where
they open the first row, so nearly every emitted row is full and no sample waits more than one block once it can be
placed (unless a block is too small to open a second row). A sample is never split, and so is no image.

Shapes: N samples of a block.
"""

from bisect import bisect_left, insort

import numpy as np


def pack_block(length_N: np.ndarray, carried: int, seq_length: int) -> tuple[np.ndarray, int]:
    """Assign samples to rows.

    length_N: tokens of each sample, each at most seq_length; the first `carried` samples come from the last block and
    share row 0. Returns (row_N int64, the row to carry on or -1). Rows 0..row_N.max() are all non-empty.
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
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms.pop(place)
        else:
            room = seq_length << bits | n_rows
            n_rows += 1
        rows.append(room)
        insort(rooms, room - length)
    row_N[fresh] = np.array(rows, np.int64) & ((1 << bits) - 1)
    return row_N, _row_to_carry([(room >> bits, room & ((1 << bits) - 1)) for room in rooms], carried > 0)


def _row_to_carry(rooms: list[tuple[int, int]], first_was_carried: bool) -> int:
    """The row with the most room, -1 if all are full. A row carried before is carried again only where it is alone."""
    for room, row in reversed(rooms):
        if room and not (row == 0 and first_was_carried and len(rooms) > 1):
            return row
    return -1
