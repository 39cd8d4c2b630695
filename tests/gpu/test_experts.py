"""Experts and dispatch on a CUDA device in bf16: against fp64, against Transformer Engine, and without a wait.

python -m pytest tests/gpu/test_experts.py

Legend: T rows, E experts, D width, F expert width.
"""

import pytest
import torch

import tandem.parallel  # noqa: F401  (before megatron, which it prepares for machines without CUDA)

# isort: split
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module

from benchmarks.workloads.language import World
from tandem.parallel.engines.llm_shards import shards_of
from tandem.parallel.kernels.experts import Grouped, GroupedExperts, Looped, arrange, moe_spec
from tandem.parallel.kernels.router import RouterLogits
from tandem.train.models.language.llm_spec import build_chunk
from tests.parallel.test_experts import config_of

CUDA = torch.device("cuda", 0)
E, D, F = 16, 256, 192
SIZES = {"num_experts": E, "width": D, "expert_width": F, "heads": 4, "kv_heads": 2, "head_width": 64}
COUNTS = {
    "odd": [3, 17, 1, 130, 64, 5, 9, 77, 2, 31, 12, 8, 40, 29, 55, 6],
    "some without rows": [0, 100, 0, 0, 33, 7, 0, 0, 90, 1, 0, 0, 60, 0, 0, 0],
    "all on one": [0] * 7 + [300] + [0] * 8,
    "no rows": [0] * E,
}
CLOSE = 1e-2  # relative to the norm: h, a and their gradients are rounded to bf16 once


@pytest.fixture(scope="module")
def world():
    with World(CUDA) as world:
        yield world


def experts_of(world, dtype, **sizes):
    config = config_of(world.layout, dtype, **{**SIZES, **sizes})[1]
    experts = GroupedExperts(config.num_moe_experts, config, get_default_pg_collection()).to(CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    with torch.no_grad():
        for weight in experts.parameters():
            drawn = torch.randn(weight.shape, generator=generator, device=CUDA)
            weight.copy_((drawn / weight.shape[2] ** 0.5).bfloat16())
    return experts


def step(experts, counts, dtype, width=D):
    """Output and gradients of rows, probabilities and both weights, of numbers that bf16 holds."""
    generator = torch.Generator(CUDA).manual_seed(1)
    x_TD, gradient_TD = (
        torch.randn(sum(counts), width, generator=generator, device=CUDA).bfloat16().to(dtype) for _ in range(2)
    )
    p_T = torch.rand(sum(counts), generator=generator, device=CUDA).to(torch.promote_types(dtype, torch.float32))
    x_TD.requires_grad_(), p_T.requires_grad_()
    experts.zero_grad()
    output_TD, _ = experts(x_TD, torch.tensor(counts, device=CUDA), p_T)
    output_TD.backward(gradient_TD)
    return [output_TD.detach(), x_TD.grad, p_T.grad, *(weight.grad.clone() for weight in experts.parameters())]


def assert_close(ours, exact, limit=CLOSE):
    for mine, other in zip(ours, exact, strict=True):
        assert mine.shape == other.shape and mine.isfinite().all()
        assert (mine.double() - other.double()).norm() <= limit * other.double().norm()


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_bf16_is_near_fp64(counts, world):
    ours = step(experts_of(world, torch.bfloat16), counts, torch.bfloat16)
    assert_close(ours, step(experts_of(world, torch.float64), counts, torch.float64))
    for place, count in enumerate(counts):
        if count == 0:
            assert not ours[3][place].any() and not ours[4][place].any()


def test_repeats_are_equal_to_the_bit(world):
    experts = experts_of(world, torch.bfloat16)
    first = step(experts, COUNTS["odd"], torch.bfloat16)
    for _ in range(3):
        for one, another in zip(step(experts, COUNTS["odd"], torch.bfloat16), first, strict=True):
            assert torch.equal(one, another)


def test_widths_that_grouped_products_cannot_take_fall_back(world, caplog):
    experts = experts_of(world, torch.bfloat16, expert_width=F + 4)
    assert "one product an expert" in caplog.text
    ours = step(experts, COUNTS["odd"], torch.bfloat16)
    assert_close(ours, step(experts_of(world, torch.float64, expert_width=F + 4), COUNTS["odd"], torch.float64))
    counts_E = torch.tensor(COUNTS["odd"], device=CUDA)
    x_TD = torch.zeros(sum(COUNTS["odd"]), D, device=CUDA, dtype=torch.bfloat16)
    assert isinstance(arrange(x_TD, experts.linear_fc2, counts_E), Looped)
    assert isinstance(arrange(x_TD, experts_of(world, torch.bfloat16).linear_fc2, counts_E), Grouped)


def test_layer_does_not_wait(world):
    """Router with its losses, dispatch, experts and a shared expert, forward and backward."""
    sizes = {**SIZES, "shared_expert_width": 64, "aux_loss": 0.1, "z_loss": 0.1, "top_k": 4}
    config = config_of(world.layout, torch.bfloat16, **sizes)[1]
    layer = build_module(moe_spec(config), config=config).to(CUDA, torch.bfloat16)
    layer.set_layer_number(1)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=CUDA))
    x_T1D = torch.randn(512, 1, D, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    gradient_T1D = torch.randn_like(x_T1D)
    layer(x_T1D)[0].backward(gradient_T1D)  # compiles, and allocates what later steps reuse
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output_T1D, _ = layer(x_T1D)
        output_T1D.backward(gradient_T1D)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output_T1D.isfinite().all() and x_T1D.grad.isfinite().all()


def test_router_logits_are_those_of_fp32_factors():
    """Exact products of bf16 factors, fp32 sums: 2,048 roundings of 2^-24 at random."""
    draw = torch.Generator(CUDA).manual_seed(0)
    x_TD = torch.randn(4096, 2048, generator=draw, device=CUDA).bfloat16().requires_grad_()
    w_ED = (torch.randn(128, 2048, generator=draw, device=CUDA) / 45).bfloat16().requires_grad_()
    gradient_TE = torch.randn(4096, 128, generator=draw, device=CUDA)
    logits_TE = RouterLogits.apply(x_TD, w_ED)
    logits_TE.backward(gradient_TE)
    assert logits_TE.dtype == torch.float32
    assert_close([logits_TE], [x_TD.double() @ w_ED.double().t()], 2048**0.5 * 2**-24)
    exact = gradient_TE.double() @ w_ED.double(), gradient_TE.double().t() @ x_TD.double()
    rounded = [gradient.bfloat16() for gradient in exact]
    assert_close([x_TD.grad, w_ED.grad], rounded, 3e-4)  # one entry in a thousand is on the other side of a tie


def test_experts_agree_with_transformer_engine(world):
    """The same weights through global names, and one load of rows through both grouped products."""
    pytest.importorskip("transformer_engine")
    results = []
    for kernels in ("torch", "te"):
        llm, config = config_of(world.layout, torch.bfloat16, kernels=kernels, **SIZES)
        chunk = build_chunk(llm, config, vp_stage=None, first=False, last=False).to(CUDA, torch.bfloat16)
        shards = [shard for shard in shards_of(chunk) if ".experts." in shard.name]
        for place, shard in enumerate(sorted(shards, key=lambda shard: shard.name)):
            shard.local.normal_(0, 0.06, generator=torch.Generator(CUDA).manual_seed(place))
        generator = torch.Generator(CUDA).manual_seed(1)
        rows = sum(COUNTS["odd"])
        x_TD = torch.randn(rows, D, generator=generator, device=CUDA).bfloat16().requires_grad_()
        p_T = torch.rand(rows, generator=generator, device=CUDA).requires_grad_()
        device = CUDA if kernels == "torch" else "cpu"  # Transformer Engine's wants its counts on the host
        output_TD, _ = chunk.decoder.layers[0].mlp.experts(x_TD, torch.tensor(COUNTS["odd"], device=device), p_T)
        output_TD.backward(torch.randn(rows, D, generator=generator, device=CUDA).bfloat16())
        gradients = {
            shard.name: shard.parameter.grad if shard.entry is None else shard.parameter.grad[shard.entry]
            for shard in shards
        }
        results.append([output_TD, x_TD.grad, p_T.grad, *(gradients[name] for name in sorted(gradients))])
    assert_close(*results, 2 * CLOSE)
