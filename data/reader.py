"""From a plan to arrays: reads the bytes of the asked images and rows, and no others.

Images go to the one rank that encodes them, rows to the ranks that need their tokens; both follow from the plan, so no
pixel is read twice and nothing is broadcast. What cannot be read keeps its planned shape (zero patches, untrained
padding) and is reported, so that one damaged sample never stops or desynchronises a run.

Shapes: N patches, I images, R rows, P positions of a row, S samples, T text tokens and V images of one sample.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from data.image import PATCH, PATCH_VALUES, ImageError, decode_image, to_patches
from data.index import ShardIndex, parse_sample
from data.plan import StepPlan
from data.text import ROLES, EncodedSample, SampleError, Tokenizer

MAX_OPEN_SHARDS = 64


@dataclass(frozen=True)
class ImageBatch:
    """Patches of some images of a plan, in the order asked for."""

    patches_N588: np.ndarray  # uint8, block-major
    grid_hw_I2: np.ndarray  # int32
    bytes_read: int
    failures: list[tuple[int, str]]  # (image of the plan, sentence)


@dataclass(frozen=True)
class RowBatch:
    """Tokens of some rows of a plan, in the order asked for."""

    tokens: np.ndarray  # int64 [R, P]; <image> at visual positions, <pad> after the last sample
    labels: np.ndarray  # int64 [R, P]; next token of the same sample, <pad> where there is none
    loss_mask: np.ndarray  # bool [R, P]; the label is trained text
    domain: np.ndarray  # int16 [R, P]; into Stream.domains, -1 on padding
    bytes_read: int
    failures: list[tuple[int, str]]  # (sample of the plan, sentence)


class ShardReader:
    """Reads with os.pread and decodes in `workers` threads. Usable from several threads at once."""

    def __init__(
        self,
        indexes: Sequence[ShardIndex],
        tokenizer: Tokenizer,
        train_roles: Collection[str],
        max_pixels: int,
        workers: int,
    ):
        unknown = set(train_roles) - set(ROLES)
        if unknown or not train_roles:
            raise ValueError(f"data.train_roles is {sorted(train_roles)}; choose some of {', '.join(ROLES)}")
        if workers < 1:
            raise ValueError(f"data.workers is {workers}; it must be at least 1")
        self.indexes = tuple(indexes)
        self.tokenizer = tokenizer
        self.train_roles = frozenset(train_roles)
        self.max_pixels = max_pixels
        self._files = _OpenFiles(MAX_OPEN_SHARDS)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="tandem-read")

    def close(self) -> None:
        self._pool.shutdown()
        self._files.close()

    def read_images(self, plan: StepPlan, image_ids: Sequence[int]) -> ImageBatch:
        """Decode, resize and cut images of the plan, given by their place in its image arrays."""
        image_ids = np.asarray(image_ids, np.int64)
        grid_hw_I2 = plan.grid_hw_I2[image_ids].reshape(-1, 2)
        border_I1 = np.concatenate([[0], np.cumsum(grid_hw_I2.prod(1, dtype=np.int64))])
        patches_N588 = np.zeros((int(border_I1[-1]), PATCH_VALUES), np.uint8)
        shard_I = plan.shard_S[plan.image_sample_I[image_ids]]
        place_I = self._places(shard_I, plan.image_member_I[image_ids], "images", ("offset", "size"))

        def fill(i: int) -> tuple[int, str | None]:
            data, (shard, offset, size), (down, across) = b"", place_I[i], grid_hw_I2[i].tolist()
            try:
                data = self._files.pread(self.indexes[shard].shard, size, offset)
                pixels_HW3 = decode_image(data, self.max_pixels)
                patches_N588[border_I1[i] : border_I1[i + 1]] = to_patches(pixels_HW3, down * PATCH, across * PATCH)
                return len(data), None
            except (ImageError, OSError) as error:
                return len(data), f"image at byte {offset} of {self.indexes[shard].shard}: {error}"

        done = list(self._pool.map(fill, range(len(image_ids))))
        failures = [(int(image_ids[i]), sentence) for i, (_, sentence) in enumerate(done) if sentence]
        return ImageBatch(patches_N588, grid_hw_I2, sum(size for size, _ in done), failures)

    def read_rows(self, plan: StepPlan, rows: Sequence[int]) -> RowBatch:
        """Encode and lay out the text of some rows; visual positions are left to the encoder's output."""
        shape = (len(rows), plan.seq_length)
        pad = self.tokenizer.pad_id
        tokens, labels = np.full(shape, pad, np.int64), np.full(shape, pad, np.int64)
        loss_mask, domain = np.zeros(shape, bool), np.full(shape, -1, np.int16)
        spans = [np.searchsorted(plan.row_S, [row, row + 1]) for row in rows]
        wanted = [(r, sample) for r, (first, last) in enumerate(spans) for sample in range(first, last)]
        samples = np.array([sample for _, sample in wanted], np.int64)
        place_S = self._places(plan.shard_S[samples], plan.index_S[samples], "samples", ("json_offset", "json_size"))

        def encode(i: int) -> tuple[int, EncodedSample | str]:
            return self._encode(plan, int(samples[i]), *place_S[i])

        bytes_read, failures = 0, []
        for (r, sample), (size, encoded) in zip(wanted, self._pool.map(encode, range(len(wanted))), strict=True):
            bytes_read += size
            at = slice(int(plan.start_S[sample]), int(plan.start_S[sample] + plan.length_S[sample]))
            domain[r, at] = plan.domain_S[sample]
            first, last = np.searchsorted(plan.image_sample_I, [sample, sample + 1])
            if isinstance(encoded, str):
                failures.append((sample, encoded))
                for start, count in zip(plan.start_I[first:last], plan.tokens_I[first:last], strict=True):
                    tokens[r, start : start + count] = self.tokenizer.image_id
                continue
            line, trained = _lay_out(encoded, plan.tokens_I[first:last], self.tokenizer.image_id)
            tokens[r, at] = line
            labels[r, at][:-1] = line[1:]
            loss_mask[r, at][:-1] = trained[1:]
        return RowBatch(tokens, labels, loss_mask, domain, bytes_read, failures)

    def _encode(self, plan: StepPlan, sample: int, shard: int, offset: int, size: int):
        """(bytes read, EncodedSample), or a sentence in the place of the latter."""
        name = f"the sample at byte {offset} of {self.indexes[shard].shard}"
        data = b""
        try:
            data = self._files.pread(self.indexes[shard].shard, size, offset)
            first, last = np.searchsorted(plan.image_sample_I, [sample, sample + 1])
            turns = parse_sample(data, name)["turns"]
            encoded = self.tokenizer.encode_sample(turns, self.train_roles, int(last - first), name)
        except SampleError as error:
            return len(data), str(error)
        except OSError as error:
            return len(data), f"{name} cannot be read: {error}"
        start_I = plan.start_S[sample] + encoded.image_at_I + _visual_before(plan.tokens_I[first:last])
        length = len(encoded.tokens_T) + int(plan.tokens_I[first:last].sum())
        if length != plan.length_S[sample] or not np.array_equal(start_I, plan.start_I[first:last]):
            return len(data), f"{name} no longer matches its index: {length} tokens, planned {plan.length_S[sample]}"
        return len(data), encoded

    def _places(self, shard_X: np.ndarray, record_X: np.ndarray, array: str, columns: tuple[str, str]):
        """(shard, byte offset, byte size) of each record, as plain ints."""
        out = np.zeros((len(shard_X), 3), np.int64)
        out[:, 0] = shard_X
        for shard in np.unique(shard_X).tolist():
            here = shard_X == shard
            records = getattr(self.indexes[shard], array)[record_X[here]]
            out[here, 1], out[here, 2] = records[columns[0]], records[columns[1]]
        return out.tolist()


def _visual_before(tokens_V: np.ndarray) -> np.ndarray:
    """Visual tokens of the sample before each of its images."""
    return np.cumsum(tokens_V) - tokens_V


def _lay_out(encoded: EncodedSample, tokens_V: np.ndarray, image_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(token ids, is a target) of one sample with its visual tokens in place."""
    text = np.arange(len(encoded.tokens_T))
    shift = np.concatenate([[0], np.cumsum(tokens_V)])
    at = text + shift[np.searchsorted(encoded.image_at_I, text, side="right")]
    line = np.full(len(text) + int(shift[-1]), image_id, np.int64)
    trained = np.zeros(len(line), bool)
    line[at], trained[at] = encoded.tokens_T, encoded.trained_T
    return line, trained


class _OpenFiles:
    """A bounded cache of open shards. A file in use is never closed under its reader."""

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._files: OrderedDict[str, list[int]] = OrderedDict()  # path -> [descriptor, readers]

    def pread(self, path: str, size: int, offset: int) -> bytes:
        """Exactly `size` bytes. Raises OSError where the file ends sooner."""
        with self._use(path) as descriptor:
            parts, wanted = [], size
            while wanted:
                part = os.pread(descriptor, wanted, offset + size - wanted)
                if not part:
                    raise OSError(f"the file ends {wanted} bytes early")
                parts.append(part)
                wanted -= len(part)
        return b"".join(parts)

    @contextmanager
    def _use(self, path: str) -> Iterator[int]:
        with self._lock:
            if path not in self._files:
                self._files[path] = [os.open(path, os.O_RDONLY), 0]
            entry = self._files[path]
            self._files.move_to_end(path)
            entry[1] += 1
        try:
            yield entry[0]
        finally:
            with self._lock:
                entry[1] -= 1
                idle = [p for p, (_, readers) in self._files.items() if readers == 0]
                for old in idle[: max(0, len(self._files) - self._most)]:
                    os.close(self._files.pop(old)[0])

    def close(self) -> None:
        with self._lock:
            for descriptor, _ in self._files.values():
                os.close(descriptor)
            self._files.clear()
