"""The plan of one step: plain arrays that say which samples and images it holds and where each goes in its rows.

    row 0:  | sample 0: text  [SOI] visual visual [EOI] text | sample 1: text | padding |

Every rank computes the same plan; the exchange of embeddings, the attention borders and the reads all follow from it.
A frame of a video is an image with a time, and where sound is read, a video's sound is an image without tokens: its
spectrogram (data/media/audio.py), behind the frames.

Shapes: S samples of the step, I images of the step, P positions of a row, R rows asked for.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from tandem.data.vision import VisionSpec

STILL, AUDIO = -1, -2  # what time_I holds for a still image and for the sound of a video


@dataclass(frozen=True)
class StepPlan:
    """What one step reads and where it goes. Samples and images are sorted by (row, start); rows count from 0."""

    step: int
    seq_length: int  # positions of each row; where samples are rows, tokens of the longest in this step
    shard_S: np.ndarray  # int32, number of the shard in the corpus
    index_S: np.ndarray  # int32, sample in the shard's index
    row_S: np.ndarray  # int32
    start_S: np.ndarray  # int32, first token's position in the row
    length_S: np.ndarray  # int32, tokens, visual ones included
    domain_S: np.ndarray  # int16, into Stream.domains
    cut_S: np.ndarray  # bool, the sample is longer and its end is left out
    image_sample_I: np.ndarray  # int32, into S
    image_media_I: np.ndarray  # int32, medium in the shard's index
    time_I: np.ndarray  # int32, milliseconds into the video, or STILL or AUDIO
    grid_hw_I2: np.ndarray  # int32, patches down and across
    tokens_I: np.ndarray  # int32, visual tokens; 0 of a sound
    row_I: np.ndarray  # int32
    start_I: np.ndarray  # int32, position of the first visual token in the row; of a sound, the place behind its video
    state_after: dict  # what Stream.load_state takes to go on after this step

    @property
    def patches_I(self) -> np.ndarray:
        """Patches of each image, int64."""
        return self.grid_hw_I2.prod(axis=1, dtype=np.int64)

    def digest(self) -> int:
        """63 bits of everything above: equal on ranks that hold the same plan."""
        digest = hashlib.blake2b(digest_size=8)
        for field in fields(self):
            value = getattr(self, field.name)
            raw = value.tobytes() if isinstance(value, np.ndarray) else json.dumps(value, sort_keys=True).encode()
            digest.update(f"{field.name}:{len(raw)};".encode() + raw)
        return int.from_bytes(digest.digest(), "little") >> 1


def ranges(first_X: np.ndarray, end_X: np.ndarray) -> np.ndarray:
    """All numbers from first to end of each pair, end to end."""
    count_X = end_X - first_X
    within = np.arange(count_X.sum()) - np.repeat(np.cumsum(count_X) - count_X, count_X)
    return np.repeat(first_X, count_X) + within


def images_of(plan: StepPlan, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers in the plan of the images of some samples, in the samples' order, int64; how many each sample has)."""
    first_M, end_M = (np.searchsorted(plan.image_sample_I, samples + shift) for shift in (0, 1))
    return ranges(first_M, end_M), end_M - first_M


def row_cu_seqlens(plan: StepPlan, row: int) -> np.ndarray:
    """Borders of the row's segments, int32, from 0 to seq_length: its samples, then its padding as one segment."""
    first, last = np.searchsorted(plan.row_S, [row, row + 1])
    ends = plan.start_S[first:last] + plan.length_S[first:last]
    return np.unique(np.concatenate([[0], ends, [plan.seq_length]])).astype(np.int32)


def row_positions(plan: StepPlan, row: int) -> np.ndarray:
    """Position of each token in its own segment, int32 [P]: restarts at every sample and at the padding."""
    cu = row_cu_seqlens(plan, row)
    return np.arange(plan.seq_length, dtype=np.int32) - np.repeat(cu[:-1], np.diff(cu))


def row_positions_thw(plan: StepPlan, row: int, vision: VisionSpec) -> np.ndarray:
    """(t, y, x) of each token in its own segment, int32 [P, 3]: M-RoPE (Qwen2-VL, arXiv:2409.12191, section 2.1).

    Text counts on all three axes at once.  The tokens of an image, and of each frame of a video, share one t; y and x
    count its rows and columns from there.  The text behind it goes on one after the largest of the three.

        <a> <b> [ 2 x 3 image ] <c>       t 0 1 2 2 2 2 2 2 5
                                          y 0 1 2 2 2 3 3 3 5
                                          x 0 1 2 3 4 2 3 4 5
    """
    first, last = np.searchsorted(plan.row_I, [row, row + 1])
    images = np.arange(first, last)[plan.tokens_I[first:last] > 0]  # sounds have no tokens
    start_I, tokens_I = plan.start_I[images], plan.tokens_I[images].astype(np.int64)
    grid_I2 = vision.token_grids(plan.grid_hw_I2[images])
    place_V = ranges(start_I, start_I + tokens_I)
    advance_P = np.ones(plan.seq_length, np.int64)
    advance_P[place_V] = 0
    advance_P[start_I + tokens_I - 1] = grid_I2.max(1, initial=0)
    before_P = np.cumsum(advance_P) - advance_P
    cu = row_cu_seqlens(plan, row)
    out_P3 = np.repeat((before_P - np.repeat(before_P[cu[:-1]], np.diff(cu)))[:, None], 3, 1)
    within_V = place_V - np.repeat(start_I, tokens_I)
    out_P3[place_V, 1:] += np.stack(np.divmod(within_V, np.repeat(grid_I2[:, 1], tokens_I)), 1)
    return out_P3.astype(np.int32)


def row_samples(plan: StepPlan, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """Sample of the plan at every position of these rows, int32 [R, P]; -1 on padding."""
    sample_RP = np.full((len(rows), plan.seq_length), -1, np.int32)
    for place, row in enumerate(rows):
        first, last = np.searchsorted(plan.row_S, [row, row + 1])
        filled = np.repeat(np.arange(first, last, dtype=np.int32), plan.length_S[first:last])
        sample_RP[place, : len(filled)] = filled
    return sample_RP


def row_labels(
    sample_RP: np.ndarray, tokens_RP: np.ndarray, trained_RP: np.ndarray, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """(labels int64, loss_mask bool), both [R, P]: the next token of the same sample, pad_id where there is none, and
    whether that token is trained. sample_RP: of `row_samples`."""
    followed_RP = (sample_RP[:, :-1] == sample_RP[:, 1:]) & (sample_RP[:, :-1] >= 0)
    labels_RP = np.full(sample_RP.shape, pad_id, np.int64)
    labels_RP[:, :-1] = np.where(followed_RP, tokens_RP[:, 1:], pad_id)
    loss_mask_RP = np.zeros(sample_RP.shape, bool)
    loss_mask_RP[:, :-1] = followed_RP & trained_RP[:, 1:]
    return labels_RP, loss_mask_RP


def row_domains(plan: StepPlan, sample_RP: np.ndarray) -> np.ndarray:
    """Domain at every position, int16 [R, P]; -1 on padding. sample_RP: of `row_samples`."""
    return np.where(sample_RP < 0, np.int16(-1), plan.domain_S[sample_RP])
