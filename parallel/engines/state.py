"""What both engines share: Adam's settings, and the unit in which trained state is saved and loaded.

An optimizer under ZeRO owns a run of a parameter's entries, cut where it suits the bucket.  A checkpoint holds boxes of
global tensors, which any other layout can be cut from.  `StateChunk.boxes` turns one into the other:

    rows of a local part, owned from entry 3 to 13          . . . x x
                                                            x x x x x      a row's end, whole rows, a row's begin
                                                            x x x . .
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import torch

KINDS = ("param", "exp_avg", "exp_avg_sq")
ROUTER_BIAS = re.compile(r".+\.router\.expert_bias(_visual)?")  # names of the tensors of an LLM that no optimizer moves
VOCABULARY = {"embedding.word_embeddings.weight", "output_layer.weight"}  # those with a row for each token
EMA = "ema"  # the average of the weights over the updates, where the encoder's engine keeps one


@dataclass(frozen=True)
class AdamSettings:
    """AdamW, or by its name LAMB; biases and normalisation parameters are exempt from weight decay (report, section 4)
    and from LAMB's trust ratio."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    name: str = "adamw"


@dataclass(frozen=True)
class Piece:
    """`length` entries along `dim`: local ones from `local`, global ones from `start`."""

    dim: int
    local: int
    start: int
    length: int

    def corner(self, dims: int) -> tuple[int, ...]:
        """Global index of the piece's first entry in a tensor of `dims` dimensions."""
        return tuple(self.start if dim == self.dim else 0 for dim in range(dims))

    def of_local(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(self.dim, self.local, self.length)

    def of_global(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class StateChunk:
    """The run of a tensor's entries that this rank saves, and no other rank does.

    kind: one of KINDS, or EMA.  shape: of the whole model's tensor; local_shape: of the part of it that lies here, made
    of `pieces` (none: the whole).  tensor_N: entries begin .. begin + N of that part, in order.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    local_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    begin: int
    tensor_N: torch.Tensor

    def boxes(self) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """(global index of its first entry, values) of every box that the run is made of; values are views."""
        place = 0
        for corner, size in boxes_of_run(self.local_shape, self.begin, self.begin + self.tensor_N.numel()):
            count = math.prod(size)
            values = self.tensor_N[place : place + count].view(size)
            place += count
            for piece in self.pieces:
                low = max(corner[piece.dim], piece.local)
                high = min(corner[piece.dim] + size[piece.dim], piece.local + piece.length)
                if low < high:
                    start = list(corner)
                    start[piece.dim] = piece.start + low - piece.local
                    yield tuple(start), values.narrow(piece.dim, low - corner[piece.dim], high - low)
            if not self.pieces:
                yield corner, values


def boxes_of_run(shape: tuple[int, ...], begin: int, end: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(corner, size) of the fewest boxes that hold entries begin .. end of a row-major tensor, in order."""
    if begin == end:
        return []
    if len(shape) <= 1:
        return [((begin,) * len(shape), (end - begin,) * len(shape))]
    row = math.prod(shape[1:])
    first, last = -(-begin // row), end // row  # whole rows

    def inside(index: int, low: int, high: int):
        return [((index, *corner), (1, *size)) for corner, size in boxes_of_run(shape[1:], low, high)]

    if first > last:
        return inside(last, begin - last * row, end - last * row)
    boxes = inside(first - 1, begin % row, row) if begin % row else []
    if first < last:
        boxes.append(((first, *(0 for _ in shape[1:])), (last - first, *shape[1:])))
    return boxes + (inside(last, 0, end % row) if end % row else [])
