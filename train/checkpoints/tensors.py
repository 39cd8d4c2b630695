"""Safetensors files, written front to back with one tensor in memory, and summed on the way."""

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

BLOCK = 1 << 22  # bytes; what was summed is still in the cache when it is written
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64", torch.uint8: "U8"}

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtype and shape of each tensor, in order


def write_file(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> dict:
    """Writes CPU tensors as a safetensors file, flushed to disk; returns its {"bytes", "crc32"}."""
    shapes = {key: (tensor.dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    return write_stream(path, shapes, tensors.values(), metadata)


def write_stream(
    path: Path, shapes: Shapes, tensors: Iterable[torch.Tensor], metadata: dict[str, str] | None = None
) -> dict:
    """The same for tensors that are made one by one, in the order of `shapes`."""
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    place = 0
    for key, (dtype, shape) in shapes.items():
        end = place + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crc = 0
    with path.open("wb") as file:
        crc = _write(file, len(text).to_bytes(8, "little") + text, crc)
        for (dtype, shape), tensor in zip(shapes.values(), tensors, strict=True):
            assert tensor.dtype is dtype and tuple(tensor.shape) == shape
            crc = _write(file, tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": 8 + len(text) + place, "crc32": f"{crc:08x}"}


def _write(file, part: bytes | memoryview, crc: int) -> int:
    for begin in range(0, len(part), BLOCK):
        block = part[begin : begin + BLOCK]
        crc = zlib.crc32(block, crc)
        file.write(block)
    return crc


def crc32_of(path: Path) -> str:
    """Checksum of a file, by blocks."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(BLOCK))
        while count := file.readinto(block):
            crc = zlib.crc32(block[:count], crc)
    return f"{crc:08x}"
