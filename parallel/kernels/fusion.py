"""Pointwise regions in one kernel, and norms that have one.

`fused` compiles a function of elementwise operations and sums (`torch.compile`, once a process, at its first call)
wherever `parallel.kernels.compilation` says so, and otherwise calls it as it stands.  Inside code that is being
compiled already it is that function too, so a region never breaks the graph around it.

`product_of`, `in_buckets` and `sum_of_buckets` are for code inside `parallel.kernels.compilation.by_rows`: biases and
their gradients in passes over memory that are made anyway.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from tandem.parallel.kernels import compilation

try:  # NVIDIA's Apex; the package of that name on PyPI is another one, without these
    import fused_layer_norm_cuda  # noqa: F401
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine
except ImportError:
    fused_rms_norm_affine = None


def fused(function: Callable) -> Callable:
    """`function` in one kernel on a device that compiles.

    It takes tensors, the first of them on the device that decides; the first dimension of each (tokens) may have any
    length without a compilation of its own.
    """

    @functools.wraps(function)
    def call(*tensors):
        if torch.compiler.is_compiling() or not compilation.enabled(tensors[0].device):
            return function(*tensors)
        for tensor in tensors:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compilation.compiled(function)(*tensors)

    return call


def product_of(linear: nn.Linear, x_ND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x times the layer's weights, and the bias that is still to be added: None where it has been.

    Where code is compiled the pass over memory that comes next adds it, and that of the backward sums its gradient;
    rows then are whole buckets (`in_buckets`).
    """
    if torch.compiler.is_compiling():
        return F.linear(x_ND, linear.weight), linear.bias
    return F.linear(x_ND, linear.weight, linear.bias), None


def in_buckets(x: torch.Tensor) -> torch.Tensor:
    """Rows [N, ...] as [M, N / M, ...], whole buckets of `parallel.kernels.compilation.by_rows`.

    What compiled code computes on buckets `sum_of_buckets` adds up in the same kernel; a sum over all rows would read
    again what has been written.
    """
    return x.unflatten(0, (-1, compilation.BUCKET))


def sum_of_buckets(x: torch.Tensor) -> torch.Tensor:
    """Over all rows, in fp32 (fp64 for fp64)."""
    return x.sum(1, dtype=torch.promote_types(x.dtype, torch.float32)).sum(0)


def as_dtype(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x` in this dtype.  For the last line of an autograd function's forward that is compiled: there a conversion that
    changes nothing makes torch 2.11 lose the gradient."""
    return x if x.dtype == dtype else x.to(dtype)


def rms_norm(x_SD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, fp32 inside: one kernel each way on CUDA.

    torch's own backward is two kernels there, the second of which reads everything again for the weights' gradient.
    """
    if torch.compiler.is_compiling():
        return F.rms_norm(x_SD, weight_D.shape, weight_D, eps)
    if fused_rms_norm_affine is not None and x_SD.is_cuda:
        return fused_rms_norm_affine(x_SD, weight_D, weight_D.shape, eps)
    if compilation.enabled(x_SD.device):
        return _RMSNorm.apply(x_SD, weight_D, eps)
    return F.rms_norm(x_SD, weight_D.shape, weight_D, eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_SD, weight_D, eps):
        normed_SD, scale_S1 = torch.ops.aten._fused_rms_norm(x_SD, weight_D.shape, weight_D, eps)
        ctx.save_for_backward(x_SD, scale_S1, weight_D)
        return normed_SD

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_SD):
        x_SD, scale_S1, weight_D = ctx.saved_tensors
        rows = (x.flatten(0, -2) for x in (x_SD, scale_S1, grad_SD))
        x_gradient_SD, weight_gradient_D = _rms_norm_backward(*rows, weight_D[None])
        return x_gradient_SD.view(x_SD.shape), weight_gradient_D, None


@fused
def _rms_norm_backward(x_SD, scale_S1, grad_SD, weight_1D):
    normed_SD, grad = x_SD * scale_S1, grad_SD * weight_1D.to(scale_S1.dtype)
    along_S1 = (grad * normed_SD).mean(-1, keepdim=True)
    x_gradient_SD = (grad - normed_SD * along_S1) * scale_S1
    return x_gradient_SD.to(x_SD.dtype), (grad_SD * normed_SD).sum(0).to(weight_1D.dtype)
