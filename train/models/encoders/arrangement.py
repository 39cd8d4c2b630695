"""From patches to the tokens of an encoder that has class tokens, windows or learned positions.

    class tokens   c0 p0 p1 p2 | c1 p3 p4       each image's before its patches
    windows        p0 p1 p4 p5 | p2 p3 ...      window by window, so that a window is a segment; images stay together

All of it is computed on the host, ahead of the step; an encoder without any of these has none.

Legend: N patches of I images, T tokens, W windows.
"""

from dataclasses import dataclass

import numpy as np
import torch

from tandem.data.vision import VisionSpec
from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels.attention import Segments


@dataclass(frozen=True)
class Arrangement:
    """Where patches stand among tokens.

    grid_N2: int32, patches down and across of each patch's image.  token_T: row of each token among class tokens and,
    after them, patches; place_N: token of each patch; both int64, None where tokens are the patches as they come.
    images: segments of tokens.  windows: of tokens too, None without windows.
    """

    grid_N2: torch.Tensor
    token_T: torch.Tensor | None
    place_N: torch.Tensor | None
    images: Segments
    windows: Segments | None

    @staticmethod
    def of(vision: VisionSpec, grid_hw_I2: np.ndarray, device: torch.device) -> "Arrangement | None":
        """Of packed images of these grids; None where the encoder needs none."""
        if not (vision.window or vision.class_tokens or vision.learned):
            return None
        grid_hw_I2 = np.asarray(grid_hw_I2, np.int32).reshape(-1, 2)
        patches_I = grid_hw_I2.prod(1, dtype=np.int64)
        token_T, windows = None, None
        if vision.window:
            token_T, patches_W = vision.windows(grid_hw_I2)
            windows = Segments.of(patches_W, device=device)
        elif vision.class_tokens:
            images, first_I = len(patches_I), np.cumsum(patches_I) - patches_I
            token_T = np.insert(np.arange(images, images + patches_I.sum()), first_I, np.arange(images))
        place_N = None if token_T is None else np.argsort(token_T)[vision.class_tokens * len(patches_I) :]
        return Arrangement(
            grid_N2=host_to_device(np.repeat(grid_hw_I2, patches_I, axis=0), device),
            token_T=None if token_T is None else host_to_device(token_T, device),
            place_N=None if place_N is None else host_to_device(place_N, device),
            images=Segments.of(patches_I + vision.class_tokens, device=device),
            windows=windows,
        )
