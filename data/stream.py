"""The stream of training steps, computed from the indexes alone.

    order (seed, epoch, window) -> blocks of samples -> rows of seq_length -> steps of rows_per_step rows

Every rank computes the same steps without talking to the others, whatever the world size, and reads later only what it
uses. The state is the place where the current block begins, the samples carried into it, and how many of its rows are
spent; from a state the continuation is always the same. Epochs repeat for ever, each with its own shuffle.

Shapes: S samples of a step, I images of a step, N samples of a block.
"""

import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from data.image import grid_hw, visual_tokens
from data.index import ShardIndex
from data.order import ROWS, permutation, samples_of_window, shards_of_window, windows_per_epoch
from data.packing import pack_block
from data.plan import StepPlan

TOO_LONG = "samples longer than a row"
IMAGE_TOO_LONG = "rows shorter than one image"


@dataclass(frozen=True)
class StreamConfig:
    """What decides the stream, besides the indexes."""

    seq_length: int
    rows_per_step: int  # the global batch
    seed: int
    min_patches: int  # of one image, 14x14 pixels each
    max_patches: int
    block_samples: int = 1024  # lookahead of the packing
    window_shards: int = 32  # shards shuffled together

    def __post_init__(self):
        keys = {"seq_length": "train.seq_length", "rows_per_step": "train.global_batch_size", "seed": "train.seed"}
        for field in fields(self):
            key, value = keys.get(field.name, f"data.{field.name}"), getattr(self, field.name)
            least = {"seed": 0, "max_patches": 4}.get(field.name, 1)
            if not isinstance(value, int) or not least <= value < 1 << 62:
                raise ValueError(f"{key} is {value!r}; it must be a whole number, at least {least}")
        if self.min_patches > self.max_patches:
            raise ValueError(f"data.min_patches is {self.min_patches}, above data.max_patches, {self.max_patches}")


@dataclass(frozen=True)
class _ShardView:
    """One shard's index at the stream's resolution."""

    length_N: np.ndarray  # tokens, visual ones included
    largest_image_N: np.ndarray  # visual tokens of the sample's largest image, 0 without images
    first_image_N: np.ndarray
    images_N: np.ndarray
    domain_N: np.ndarray  # global ids
    grid_hw_I2: np.ndarray
    image_at_I: np.ndarray


@dataclass(frozen=True)
class _Block:
    """A packed block: samples sorted by emitted row, and the cursor where the next block begins."""

    shard_N: np.ndarray
    index_N: np.ndarray
    row_start_R1: np.ndarray  # borders of the rows in the arrays above
    refused: dict[str, int]
    following: dict


class Stream:
    """Iterator over steps. Raises ValueError at once if no sample of any shard fits a row."""

    def __init__(self, indexes: Sequence[ShardIndex], config: StreamConfig):
        if not indexes:
            raise ValueError("the stream has no shards; set data.shards")
        self.indexes = tuple(indexes)
        self.config = config
        self.domains = tuple(sorted({domain for index in indexes for domain in index.domains}))
        self._views: OrderedDict[int, _ShardView] = OrderedDict()
        self._fingerprint = self._decides_order()
        self._check_something_fits()
        self._state = {
            "step": 0,
            "epoch": 0,
            "window": 0,
            "sample": 0,  # where the current block begins in the window's order
            "carried": [],  # [shard, index] of samples carried into the current block
            "row": 0,  # rows of the current block already spent
            "refused": {},  # in blocks before the current one, by reason
            "fingerprint": self._fingerprint,
        }
        self._block: _Block | None = None
        self._window: tuple[tuple[int, int], np.ndarray, np.ndarray] | None = None

    def state(self) -> dict:
        """Plain ints and lists, fit for JSON."""
        return json.loads(json.dumps(self._state))

    def load_state(self, state: dict) -> None:
        """Continue from state(). Raises ValueError if the shards or the settings that decide the order differ."""
        if set(state) != set(self._state):
            raise ValueError(f"the data state has keys {sorted(state)}; expected {sorted(self._state)}")
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                "the data state belongs to another stream: the shards, train.seed, train.seq_length, data.min_patches, "
                "data.max_patches, data.block_samples or data.window_shards changed since it was saved; "
                "restore them or start the data anew"
            )
        self._state = json.loads(json.dumps(state))
        self._block = None

    @property
    def samples_per_epoch(self) -> int:
        """Samples of all shards that fit a row: what one epoch holds, each once."""
        counts = enumerate(index.n_samples for index in self.indexes)
        return sum(len(self._fitting(np.full(n, shard), np.arange(n))[0]) for shard, n in counts)

    @property
    def refused(self) -> dict[str, int]:
        """Samples passed over so far, by reason, up to the current block."""
        return dict(self._state["refused"])

    def next_step(self) -> StepPlan:
        """The next rows_per_step rows."""
        wanted, parts, row = self.config.rows_per_step, [], 0
        while row < wanted:
            block = self._current_block()
            first, last = self._state["row"], min(len(block.row_start_R1) - 1, self._state["row"] + wanted - row)
            begin, end = block.row_start_R1[first], block.row_start_R1[last]
            sizes = np.diff(block.row_start_R1[first : last + 1])
            row_n = np.repeat(np.arange(row, row + last - first), sizes)
            parts.append((block.shard_N[begin:end], block.index_N[begin:end], row_n))
            row += last - first
            self._state["row"] = last
            if last == len(block.row_start_R1) - 1:
                self._advance(block)
        self._state["step"] += 1
        shard_S, index_S, row_S = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        return self._plan(shard_S, index_S, row_S)

    # -----------------------------------------------------------------------------------------------------------------
    # Blocks

    def _current_block(self) -> _Block:
        if self._block is None:
            self._block = self._make_block()
        return self._block

    def _advance(self, block: _Block) -> None:
        refused = dict(self._state["refused"])
        for reason, count in block.refused.items():
            refused[reason] = refused.get(reason, 0) + count
        self._state = {**self._state, **block.following, "row": 0, "refused": refused}
        self._block = None

    def _make_block(self) -> _Block:
        """The block at the cursor: a run of one window's samples, packed; its rows shuffled."""
        config, epoch, window, begin = self.config, *(self._state[key] for key in ("epoch", "window", "sample"))
        shard_W, index_W = self._window_order(epoch, window)
        end = min(begin + config.block_samples, len(shard_W))
        shard_N, index_N, refused = self._fitting(shard_W[begin:end], index_W[begin:end])
        carried = np.array(self._state["carried"], np.int64).reshape(-1, 2)
        shard_N, index_N = np.concatenate([carried[:, 0], shard_N]), np.concatenate([carried[:, 1], index_N])

        length_N = self._gather(shard_N, index_N, "length_N")
        row_N, open_row = pack_block(length_N, len(carried), config.seq_length)
        open_N = row_N == open_row
        following = {"epoch": epoch, "window": window, "sample": end}
        following["carried"] = np.stack([shard_N, index_N], 1)[open_N].tolist()
        if end == len(shard_W):
            last = window + 1 == windows_per_epoch(len(self.indexes), config.window_shards)
            following |= {"epoch": epoch + last, "window": 0 if last else window + 1, "sample": 0}

        kept_N = np.flatnonzero(~open_N)
        rows = np.unique(row_N[kept_N])
        rank = np.zeros(int(row_N.max(initial=0)) + 1, np.int64)
        rank[rows] = permutation(len(rows), config.seed, epoch, window, begin, ROWS)
        order_N = kept_N[np.argsort(rank[row_N[kept_N]], kind="stable")]
        row_start_R1 = np.concatenate([[0], np.cumsum(np.bincount(rank[row_N[kept_N]], minlength=len(rows)))])
        return _Block(shard_N[order_N], index_N[order_N], row_start_R1, refused, following)

    def _window_order(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
        if self._window is None or self._window[0] != (epoch, window):
            config = self.config
            shards = shards_of_window(len(self.indexes), config.window_shards, config.seed, epoch, window)
            counts = [self.indexes[shard].n_samples for shard in shards]
            self._window = ((epoch, window), *samples_of_window(shards, counts, config.seed, epoch, window))
        return self._window[1:]

    def _fitting(self, shard_N: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
        """The samples that fit a row, and how many do not, by reason."""
        image_fits_N = self._gather(shard_N, index_N, "largest_image_N") <= self.config.seq_length
        fits_N = self._gather(shard_N, index_N, "length_N") <= self.config.seq_length
        counts = {IMAGE_TOO_LONG: int((~image_fits_N).sum()), TOO_LONG: int((image_fits_N & ~fits_N).sum())}
        return shard_N[fits_N], index_N[fits_N], {reason: count for reason, count in counts.items() if count}

    def _check_something_fits(self) -> None:
        smallest, smallest_image = None, None
        for shard, index in enumerate(self.indexes):
            view = self._view(shard)
            if len(view.length_N) == 0:
                continue
            sample = int(view.length_N.argmin())
            if view.length_N[sample] <= self.config.seq_length:
                return
            if smallest is None or view.length_N[sample] < smallest[0]:
                smallest = (int(view.length_N[sample]), sample, index.shard)
                smallest_image = int(view.largest_image_N[sample])
        if smallest is None:
            raise ValueError(f"the {len(self.indexes)} shards hold no usable sample")
        why = f"{IMAGE_TOO_LONG}: " if smallest_image > self.config.seq_length else ""
        raise ValueError(
            f"{why}train.seq_length is {self.config.seq_length}, but the smallest sample (number {smallest[1]} of "
            f"{smallest[2]}) needs {smallest[0]} tokens, {smallest_image} of them for its largest image; "
            "raise train.seq_length or lower data.max_patches"
        )

    # -----------------------------------------------------------------------------------------------------------------
    # Shards at this resolution

    def _view(self, shard: int) -> _ShardView:
        if shard in self._views:
            self._views.move_to_end(shard)
            return self._views[shard]
        index = self.indexes[shard]
        samples, images = np.asarray(index.samples), np.asarray(index.images)
        grid_hw_I2 = grid_hw(images["height"], images["width"], self.config.min_patches, self.config.max_patches)
        tokens_I = visual_tokens(grid_hw_I2)
        owner_I = np.repeat(np.arange(len(samples)), samples["images"])
        visual_N = np.bincount(owner_I, tokens_I, len(samples)).astype(np.int64)
        largest_N = np.zeros(len(samples), np.int64)
        np.maximum.at(largest_N, owner_I, tokens_I)
        names = np.array([self.domains.index(name) for name in index.domains] or [0], np.int16)
        view = _ShardView(
            length_N=samples["text_tokens"] + visual_N,
            largest_image_N=largest_N,
            first_image_N=samples["first_image"].astype(np.int64),
            images_N=samples["images"].astype(np.int64),
            domain_N=names[samples["domain"]],
            grid_hw_I2=grid_hw_I2,
            image_at_I=images["image_at"].astype(np.int64),
        )
        self._views[shard] = view
        while len(self._views) > 2 * self.config.window_shards + 2:
            self._views.popitem(last=False)
        return view

    def _gather(self, shard_N: np.ndarray, index_N: np.ndarray, name: str) -> np.ndarray:
        """One column of the samples' views."""
        out_N = np.zeros(len(shard_N), np.int64)
        for shard in np.unique(shard_N).tolist():
            here_N = shard_N == shard
            out_N[here_N] = getattr(self._view(shard), name)[index_N[here_N]]
        return out_N

    def _decides_order(self) -> int:
        """63 bits of what fixes the order of rows. The batch size is not part: a state counts rows, not steps."""
        settings = {key: value for key, value in asdict(self.config).items() if key != "rows_per_step"}
        shards = [(Path(i.shard).name, i.shard_bytes, i.n_samples, i.n_images) for i in self.indexes]
        raw = json.dumps([settings, shards, self.indexes[0].tokenizer_sha256], sort_keys=True).encode()
        return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little") >> 1

    # -----------------------------------------------------------------------------------------------------------------
    # The plan

    def _plan(self, shard_S: np.ndarray, index_S: np.ndarray, row_S: np.ndarray) -> StepPlan:
        length_S = self._gather(shard_S, index_S, "length_N")
        before_S = np.cumsum(length_S) - length_S
        first_of_row_S = np.searchsorted(row_S, row_S)
        start_S = before_S - before_S[first_of_row_S]

        images_S = self._gather(shard_S, index_S, "images_N")
        sample_I = np.repeat(np.arange(len(shard_S)), images_S)
        within_I = np.arange(len(sample_I)) - np.repeat(np.cumsum(images_S) - images_S, images_S)
        member_I = self._gather(shard_S, index_S, "first_image_N")[sample_I] + within_I
        grid_hw_I2, at_I = np.zeros((len(sample_I), 2), np.int64), np.zeros(len(sample_I), np.int64)
        shard_I = shard_S[sample_I]
        for shard in np.unique(shard_I).tolist():
            here_I, view = shard_I == shard, self._view(shard)
            grid_hw_I2[here_I], at_I[here_I] = view.grid_hw_I2[member_I[here_I]], view.image_at_I[member_I[here_I]]
        tokens_I = visual_tokens(grid_hw_I2)
        visual_before_I = np.cumsum(tokens_I) - tokens_I
        earlier_I = visual_before_I - visual_before_I[np.arange(len(sample_I)) - within_I]

        def narrow(values: np.ndarray) -> np.ndarray:
            return values.astype(np.int32)

        return StepPlan(
            step=self._state["step"] - 1,
            seq_length=self.config.seq_length,
            shard_S=narrow(shard_S),
            index_S=narrow(index_S),
            row_S=narrow(row_S),
            start_S=narrow(start_S),
            length_S=narrow(length_S),
            domain_S=self._gather(shard_S, index_S, "domain_N").astype(np.int16),
            image_sample_I=narrow(sample_I),
            image_member_I=narrow(member_I),
            grid_hw_I2=narrow(grid_hw_I2),
            tokens_I=narrow(tokens_I),
            row_I=narrow(row_S[sample_I]),
            start_I=narrow(start_S[sample_I] + at_I + earlier_I),
            state_after=self.state(),
        )
