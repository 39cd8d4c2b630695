"""SigLIP over the whole global batch, however it is spread over ranks (Zhai et al. 2023, arXiv 2303.15343, section 3).

    loss = 1/N  sum over images i and texts j of  softplus(-+ (scale * x_i . y_j + bias)),   - where i = j, + elsewhere

Texts go round the ring of ranks in pieces, their gradients one rank behind them.  A tile of logits (some images by one
piece) is computed where image and text meet, gives its part of the loss and, the loss being a scalar, of all gradients
at once, and is dropped: none is kept for the backward and none is computed twice.  The backward only scales what the
forward found, and talks to nobody.

Extra memory, in elements, whatever the number of ranks: 4*B*D at most while gradients are handed over, before that
2*B*D for both gradients, up to 6*P*D for pieces under way, 2*P*P for a tile.

Legend: B pairs of this rank, D width, P texts of a piece and images of a tile, N pairs of all ranks.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from tandem.parallel.comm.ring import Passage, Ring

TILE = 256  # 256 x 256 logits stay in a core's cache


def siglip_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    *,
    counts: Sequence[int],
    group: dist.ProcessGroup | None,
    tile: int = TILE,
) -> torch.Tensor:
    """This rank's share of the loss, (); the sum over ranks is the loss, and gradients are those of that sum.

    image_BD, text_BD: embeddings of this rank's pairs, row i of one with row i of the other; B may be 0.
    scale, bias: tensors of one element, the same on every rank; each rank's gradient is of its own images' logits.
    counts: B of every rank of the group.  group: None where there is one rank.  All ranks call, and either all want
    gradients or none does.  Logits and sums are fp32, fp64 for fp64 embeddings; bf16 texts travel as bf16.

    Raises ValueError where embeddings, counts and group do not fit.
    """
    ring = Ring(group)
    if image_BD.shape != text_BD.shape:
        raise ValueError(f"{tuple(image_BD.shape)} image against {tuple(text_BD.shape)} text embeddings: need pairs")
    if len(counts) != ring.size or counts[ring.origin(0)] != len(image_BD):
        raise ValueError(f"{len(image_BD)} pairs here, but counts of the {ring.size} ranks are {list(counts)}")
    inputs = (image_BD, text_BD, scale, bias)
    gradients = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _SigLIP.apply(*inputs, tuple(counts), ring, tile, gradients)


class _SigLIP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image_BD, text_BD, scale, bias, counts, ring, tile, gradients):
        exact = torch.promote_types(image_BD.dtype, torch.float32)
        tiles = _Tiles(image_BD.to(exact), scale.to(exact), bias.to(exact), tile, gradients)
        grad_text_BD = _meet_all_texts(tiles, text_BD.contiguous(), counts, ring)
        pairs = max(sum(counts), 1)
        if grad_text_BD is not None:
            slope = tiles.scale / pairs
            grad_scale = torch.einsum("bd,bd->b", tiles.grad_image_BD, tiles.image_BD).double().sum() / pairs
            ctx.save_for_backward(
                tiles.grad_image_BD.mul_(slope).to(image_BD.dtype),
                grad_text_BD.mul_(slope).to(text_BD.dtype),
                grad_scale.to(scale.dtype).view_as(scale),
                (tiles.grad_bias / pairs).to(bias.dtype).view_as(bias),
            )
        return (tiles.loss / pairs).to(exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients = [part * grad for part in ctx.saved_tensors]
        return *gradients, None, None, None, None


def _meet_all_texts(tiles: "_Tiles", text_BD: torch.Tensor, counts: Sequence[int], ring: Ring) -> torch.Tensor | None:
    """Takes every piece of text round the ring; returns the gradient that came home, over scale, [B, D]."""
    grad_BD = tiles.image_BD.new_empty(text_BD.shape) if tiles.gradients else None
    longest, behind, home = max(counts), None, 0
    for start in range(0, longest, tiles.size):
        held_PD = _padded(text_BD[start : start + tiles.size], min(tiles.size, longest - start))
        for passes in range(ring.size):
            ahead = ring.pass_on(held_PD) if passes + 1 < ring.size else None
            texts = min(max(counts[ring.origin(passes)] - start, 0), len(held_PD))
            grad_PD = tiles.meet(held_PD, texts, matches=start if passes == 0 else None)
            if grad_PD is not None and grad_BD is not None:
                if behind is not None and passes == 0:
                    _bring_home(behind, grad_BD, home)
                elif behind is not None:
                    grad_PD += behind.wait()
                behind = ring.pass_on(grad_PD)
            if ahead is not None:
                held_PD = ahead.wait()
        home = start
    if behind is not None and grad_BD is not None:
        _bring_home(behind, grad_BD, home)
    return grad_BD


def _padded(piece_PD: torch.Tensor, rows: int) -> torch.Tensor:
    """The same with zero rows below, to `rows`: on a ring all ranks pass the same shapes."""
    if len(piece_PD) == rows:
        return piece_PD
    return torch.cat([piece_PD, piece_PD.new_zeros(rows - len(piece_PD), piece_PD.shape[1])])


def _bring_home(passage: Passage, grad_BD: torch.Tensor, start: int) -> None:
    """Puts a gradient that has been everywhere into its rows; what was padded is left over."""
    rest_PD = grad_BD[start:]
    came_PD = passage.wait()
    rest_PD[: len(came_PD)] = came_PD[: len(rest_PD)]


class _Tiles:
    """This rank's images, and the sums over all texts that they have met: loss and gradients, not yet divided by N."""

    def __init__(self, image_BD, scale, bias, size, gradients):
        self.image_BD, self.scale, self.bias, self.size, self.gradients = image_BD, scale, bias, size, gradients
        self.loss = image_BD.new_zeros((), dtype=torch.float64)
        if gradients:
            self.grad_bias = torch.zeros_like(self.loss)
            self.grad_image_BD = torch.zeros_like(image_BD)  # over scale, so that <it, image> is the gradient of scale

    def meet(self, text_PD: torch.Tensor, texts: int, matches: int | None) -> torch.Tensor | None:
        """Adds the logits of the first `texts` rows against all images; returns the gradient over scale, [P, D].

        matches: the image that belongs to the first text, a multiple of the tile's size; None: none belongs.
        """
        grad_PD = text_PD.new_zeros(text_PD.shape, dtype=self.image_BD.dtype) if self.gradients else None
        text_TD = text_PD[:texts].to(self.image_BD.dtype)
        for first in range(0, len(self.image_BD) if texts else 0, self.size):
            image_RD = self.image_BD[first : first + self.size]
            signed_RT = (image_RD @ text_TD.T).mul_(self.scale).add_(self.bias)
            if first == matches:
                signed_RT.diagonal().neg_()
            self.loss += F.softplus(signed_RT, threshold=50).sum()  # past torch's 20 the curve is no line yet in fp64
            if grad_PD is not None:
                slope_RT = signed_RT.sigmoid_()
                if first == matches:
                    slope_RT.diagonal().neg_()
                self.grad_bias += slope_RT.sum()
                self.grad_image_BD[first : first + self.size].addmm_(slope_RT, text_TD)
                grad_PD[:texts].addmm_(slope_RT.T, image_RD)
        return grad_PD
