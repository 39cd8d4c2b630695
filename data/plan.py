"""The plan of one step: plain arrays that say which samples and images it holds and where each goes in its rows.

    row 0:  | sample 0: text  [SOI] visual visual [EOI] text | sample 1: text | padding |

Every rank computes the same plan; the exchange of embeddings, the attention borders and the reads all follow from it.

Shapes: S samples of the step, I images of the step, P positions of a row.
"""

import hashlib
import json
from dataclasses import dataclass, fields

import numpy as np


@dataclass(frozen=True)
class StepPlan:
    """What one step reads and where it goes. Samples and images are sorted by (row, start); rows count from 0."""

    step: int
    seq_length: int
    shard_S: np.ndarray  # int32, number of the shard in the stream's list
    index_S: np.ndarray  # int32, sample in the shard's index
    row_S: np.ndarray  # int32
    start_S: np.ndarray  # int32, first token's position in the row
    length_S: np.ndarray  # int32, tokens, visual ones included
    domain_S: np.ndarray  # int16, into Stream.domains
    image_sample_I: np.ndarray  # int32, into S
    image_member_I: np.ndarray  # int32, image in the shard's index
    grid_hw_I2: np.ndarray  # int32, patches down and across
    tokens_I: np.ndarray  # int32, visual tokens
    row_I: np.ndarray  # int32
    start_I: np.ndarray  # int32, position of the first visual token in the row
    state_after: dict  # what Stream.load_state takes to go on after this step

    def digest(self) -> int:
        """63 bits of everything above: equal on ranks that hold the same plan."""
        digest = hashlib.blake2b(digest_size=8)
        for field in fields(self):
            value = getattr(self, field.name)
            raw = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, sort_keys=True).encode()
            digest.update(f"{field.name}:{len(raw)};".encode() + raw)
        return int.from_bytes(digest.digest(), "little") >> 1


def row_cu_seqlens(plan: StepPlan, row: int) -> np.ndarray:
    """Borders of the row's segments, int32, from 0 to seq_length: its samples, then its padding as one segment."""
    first, last = np.searchsorted(plan.row_S, [row, row + 1])
    ends = plan.start_S[first:last] + plan.length_S[first:last]
    return np.unique(np.concatenate([[0], ends, [plan.seq_length]])).astype(np.int32)


def row_positions(plan: StepPlan, row: int) -> np.ndarray:
    """Position of each token in its own segment, int32 [P]: restarts at every sample and at the padding."""
    cu = row_cu_seqlens(plan, row)
    return np.arange(plan.seq_length, dtype=np.int32) - np.repeat(cu[:-1], np.diff(cu))
