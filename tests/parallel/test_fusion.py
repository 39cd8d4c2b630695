"""Fused regions are what they stand for: rotation as autograd would do it, RMSNorm as its formula, compiled or not."""

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from tandem.parallel.kernels import compilation, fusion
from tandem.train.models.layers.rotary import axis_angles, rotate_qkv, tables, turn

DTYPES = [torch.float32, torch.bfloat16]


def plain_rotate(x_THK, cos_TK, sin_TK):
    """By autograd, which adds up the two halves of the gradient."""
    x = x_THK.float()
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos_TK[:, None] + turned * sin_TK[:, None]).to(x_THK.dtype)


def plain_rms_norm(x_SD, weight_D, eps):
    x = x_SD.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()).to(x_SD.dtype)


def value_and_gradients(function, *given):
    leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in given]
    value = function(*leaves)
    generator = torch.Generator().manual_seed(1)
    value.backward(torch.randn(value.shape, generator=generator).to(value.dtype))
    return value.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, groups", [(0, 1), (7, 1), (7, 3)])
def test_taking_apart_and_rotating_in_one_pass_to_the_bit(tokens, groups, dtype):
    cos_sin = tables(axis_angles(torch.arange(tokens) * 1000, 16, 100.0))
    mixed_TGXK = torch.randn(tokens, groups, 4, 16, generator=torch.Generator().manual_seed(0)).to(dtype)

    def apart(mixed_TGXK):
        q_THK, (k_TGK, v_TGK) = mixed_TGXK[:, :, :2].flatten(1, 2), mixed_TGXK[:, :, 2:].unbind(2)
        return plain_rotate(q_THK, *cos_sin), plain_rotate(k_TGK, *cos_sin), v_TGK

    both = [
        value_and_gradients(lambda x, f=f: torch.cat(f(x), 1), mixed_TGXK)
        for f in (lambda x: rotate_qkv(x, *cos_sin), apart)
    ]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*both, strict=True))


@pytest.mark.parametrize("mode", ["never", "always"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_its_formula(dtype, mode, configured):
    """fp32: another order of sums; bf16: one rounding of the result, 2^-9, in either order with the weight's."""
    configured(mode)
    generator = torch.Generator().manual_seed(0)
    x_SD, weight_D = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((5, 64), (64,)))
    tolerance = 1e-5 if dtype == torch.float32 else 2**-6
    for mine, theirs in zip(
        *(
            value_and_gradients(lambda x, w, f=f: f(x, w, 1e-6), x_SD, weight_D)
            for f in (fusion.rms_norm, plain_rms_norm)
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_a_region_is_no_border_inside_a_graph():
    """`fullgraph` refuses code with a region that does not trace, and no compiler is called for a toy backend."""
    block = torch.compile(lambda x, c, s: turn(2 * x, c, s).sin(), fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9):
        x_THK = torch.randn(tokens, 2, 8)
        cos_sin = tables(axis_angles(torch.arange(tokens), 8, 100.0))
        assert torch.equal(block(x_THK, *cos_sin), turn(2 * x_THK, *cos_sin).sin())


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU takes a C++ compiler")
def test_one_kernel_of_each_width_serves_all_lengths():
    """A width is never an unknown, as the compiler would make it once it has seen a second."""

    @fusion.fused
    def region(x_TD, p_T1):
        return torch.sigmoid(x_TD) * x_TD * p_T1

    shapes = [(3, 8), (5, 8), (11, 8), (64, 8), (7, 16), (9, 16), (7, 32)]
    inputs = [(torch.randn(shape), torch.randn(shape[0], 1)) for shape in shapes]
    plain = [region(*given) for given in inputs]
    graphs = counters["stats"]["unique_graphs"]
    compilation.configure("always")
    try:
        for given, expected in zip(inputs, plain, strict=True):
            torch.testing.assert_close(region(*given), expected)
    finally:
        compilation.configure("auto")
    assert counters["stats"]["unique_graphs"] == graphs + 3
