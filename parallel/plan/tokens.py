"""What each token of a micro-batch is to the routers of the Mixture of Experts: text, visual or padding, and of which
sample.

    kind      text text  visual visual  text | text text | padding
    sample       0    0       0      0     0 |    1    1 |       2

Legend: R tokens of a micro-batch, T those of them that this rank's routers see.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.layout import Coordinates, Layout
from tandem.parallel.plan.routes import local_positions

TEXT, VISUAL, PADDING = range(3)
KINDS = 3


@dataclass(frozen=True)
class RowTokens:
    """Of one micro-batch, the tokens of this rank's slice of the sequence.

    kind_T: uint8.  sample_T: int32 from 0 to `samples`, the last of which is padding.  weight_T: fp32, 1 / (tokens of
    its sample * tokens of the micro-batch), without padding, whose own weight is 0.
    """

    kind_T: torch.Tensor
    sample_T: torch.Tensor
    weight_T: torch.Tensor
    samples: int

    @classmethod
    def of(
        cls, kind_R: np.ndarray, sample_R: np.ndarray, layout: Layout, place: Coordinates, device: torch.device
    ) -> "RowTokens":
        """kind_R: of all tokens; sample_R: numbers that samples are told apart by, anything at padding."""
        filled_R = kind_R != PADDING
        names, number_F = np.unique(sample_R[filled_R], return_inverse=True)
        number_R = np.full(kind_R.size, names.size, np.int32)
        number_R[filled_R] = number_F
        length_N = np.bincount(number_R, minlength=names.size + 1)
        weight_R = filled_R / (np.maximum(length_N, 1)[number_R] * max(np.count_nonzero(filled_R), 1))
        here = local_positions(layout, place.cp, kind_R.size).reshape(layout.tp, -1)[place.tp]
        return cls(
            kind_T=host_to_device(kind_R[here].astype(np.uint8), device),
            sample_T=host_to_device(number_R[here], device),
            weight_T=host_to_device(weight_R[here].astype(np.float32), device),
            samples=names.size,
        )
