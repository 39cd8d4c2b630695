"""Activations of a hidden layer, with the linear layer before them.

    gelu_tanh    GELU by its tanh formula (1606.08415)       gelu    GELU by the error function
    quick_gelu   h sigmoid(1.702 h), CLIP's                  swiglu  silu(gate) * up, the layer's rows being gate | up

Legend: N tokens, D width, F hidden width, X rows of the layer: 2 F for swiglu, else F.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from tandem.parallel.kernels.fusion import in_buckets, product_of

ACTIVATIONS = ("gelu_tanh", "gelu", "quick_gelu", "swiglu")
GELU_1 = (8 / math.pi) ** 0.5  # GELU(h) = h sigmoid(GELU_1 h + GELU_3 h^3)
GELU_3 = 0.044715 * GELU_1
QUICK = 1.702


class ActivatedLinear(nn.Linear):
    """A linear layer and its activation, [N, D] to [N, F]."""

    def __init__(self, width: int, hidden: int, activation: str, bias: bool = True):
        super().__init__(width, hidden * (2 if activation == "swiglu" else 1), bias=bias)
        self.activation = activation

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        product_NX, bias_X = product_of(self, x_ND)
        if bias_X is None:
            return _activated(product_NX, self.activation)
        return _activated_sum(product_NX, bias_X, self.activation)


def _activated(h_NX, activation: str):
    if activation == "gelu_tanh":
        return F.gelu(h_NX, approximate="tanh")
    if activation == "gelu":
        return F.gelu(h_NX)
    if activation == "quick_gelu":
        return F.silu(QUICK * h_NX) / QUICK  # keeps one tensor for the backward, where h * sigmoid would keep two
    gate_NF, up_NF = h_NX.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def _activated_sum(product_NX, bias_X, activation: str):
    """Of product + bias, for compiled code.  (1 + tanh(z / 2)) / 2 is sigmoid(z), whose exponential a GPU has in
    hardware: with the tanh of its library this pass would take longer than memory needs."""
    wide = torch.promote_types(product_NX.dtype, torch.float32)
    product = in_buckets(product_NX).to(wide)
    h = product + bias_X.to(wide).expand(len(product), 1, -1)  # autograd sums each bucket, then the buckets
    tanh = activation == "gelu_tanh"
    out = h * torch.sigmoid(h * (GELU_1 + GELU_3 * h * h)) if tanh else _activated(h, activation)
    return out.to(product_NX.dtype).flatten(0, 1)
