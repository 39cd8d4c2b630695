"""Learned positions of one square grid of patches, resized to the grid of each image; and a class token.

A table of G x G rows is resized to h x w by one matrix along each axis, [h, G] and [w, G], whose rows are here made for
every patch of a packing from its place alone.  A patch's position is then one row of a product with the table: no loop
over images, no question to the device, and no atomics in the backward.  Resampling is `torch.nn.functional.interpolate`
without align_corners:

    bicubic     four neighbours by Keys' kernel with a = -0.75, borders repeated (CLIP, SigLIP)
    antialias   bilinear; where the grid shrinks the triangle is as wide as the step (SigLIP2)

On the table's own grid both give its rows to the bit.

Legend: N patches, G sides of the table, D width.
"""

import torch
from torch import nn

INTERPOLATIONS = ("bicubic", "antialias")
CUBIC = -0.75


class PositionTable(nn.Module):
    """Positions of patches in images of any grid.  The class token's own, where there is one, is the table's first
    row."""

    def __init__(self, width: int, side: int, interpolation: str, class_token: bool):
        super().__init__()
        self.side, self.along = side, {"bicubic": bicubic, "antialias": antialias}[interpolation]
        self.first = int(class_token)
        self.weight = nn.Parameter(torch.zeros(self.first + side * side, width))

    def forward(self, positions_N2: torch.Tensor, grid_N2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(positions [N, D], the class token's [D] or None).

        positions_N2: row and column of each patch.  grid_N2: patches down and across of its image.
        """
        down_NG, across_NG = (self.along(positions_N2[:, axis], grid_N2[:, axis], self.side) for axis in (0, 1))
        rows_NX = (down_NG[:, :, None] * across_NG[:, None, :]).flatten(1).to(self.weight.dtype)
        return rows_NX @ self.weight[self.first :], self.weight[0] if self.first else None


class ClassToken(nn.Module):
    """A learned row that stands before the patches of every image."""

    def __init__(self, width: int):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(width))

    def forward(self, position_D: torch.Tensor, images: int) -> torch.Tensor:
        """[I, D], its position added."""
        return (self.token + position_D).expand(images, -1)


def bicubic(place_N: torch.Tensor, size_N: torch.Tensor, side: int) -> torch.Tensor:
    """fp32 [N, G]: how much of each row of a table of `side` is in row `place` of one of `size`."""
    center_N = (place_N + 0.5) * side / size_N - 0.5
    columns = torch.arange(-2, side + 2, device=place_N.device)
    weight_NX = _cubic((columns - center_N[:, None]).abs())
    inside_NG = weight_NX[:, 2:-2].clone()
    inside_NG[:, 0] += weight_NX[:, :2].sum(1)
    inside_NG[:, -1] += weight_NX[:, -2:].sum(1)
    return inside_NG


def _cubic(x):
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * CUBIC - 4 * CUBIC
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


def antialias(place_N: torch.Tensor, size_N: torch.Tensor, side: int) -> torch.Tensor:
    """As `bicubic`."""
    step_N = side / size_N
    center_N, reach_N = (place_N + 0.5) * step_N, step_N.clamp(min=1.0)
    columns = torch.arange(side, device=place_N.device) + 0.5
    weight_NG = (1 - (columns - center_N[:, None]).abs() / reach_N[:, None]).clamp(min=0.0)
    return weight_NG / weight_NG.sum(1, keepdim=True)
