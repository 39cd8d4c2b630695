"""Experts and their dispatch against Megatron-core's own, weight for weight, in value and gradient; no host sync.

Legend: T rows or tokens, E experts, K experts a token, P = T * K, D width, F expert width.
"""

import dataclasses

import pytest
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factories, apply_factory_merges
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection, router_gating_linear
from megatron.core.transformer.spec_utils import build_module

from tandem.parallel.engines.llm_shards import initialize, shards_of
from tandem.parallel.kernels import experts
from tandem.parallel.kernels.dispatch import FromPlaces, Order, ToPlaces, WeightsToPlaces
from tandem.parallel.kernels.experts import Grouped, GroupedExperts, Looped, Padded, moe_spec
from tandem.parallel.kernels.router import RouterLogits, bf16_parts
from tandem.train.models.language import llm_spec
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tests.syncs import ForbidSyncs

E, D, F = 8, 32, 48
TOY = LLMConfig(
    layers=1,
    width=D,
    heads=2,
    kv_heads=2,
    head_width=16,
    vocab_size=64,
    ffn_width=0,
    num_experts=E,
    top_k=2,
    expert_width=F,
    shared_expert_width=0,
    aux_loss=0.0,
    z_loss=0.0,
    rope_base=1e4,
    norm_eps=1e-6,
    init_std=0.02,
)
COUNTS = {
    "about equal": [5, 4, 6, 5, 4, 5, 6, 5],
    "some without rows": [0, 7, 0, 0, 9, 8, 0, 6],
    "all on one": [0, 0, 0, 30, 0, 0, 0, 0],
    "no rows": [0] * E,
}
ARRANGEMENTS = {
    "padded": lambda x, w, counts: Padded(counts, int(counts.max())),
    "looped": lambda x, w, counts: Looped(counts.tolist()),
    "grouped": lambda x, w, counts: Grouped(counts) if len(x) else Looped(counts.tolist()),
}
# Relative to the norm of the reference: sums in other shapes, in fp32 or fp64; one rounding of h and a in bf16.
LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def config_of(layout, dtype=torch.float32, kernels="torch", **sizes):
    llm = dataclasses.replace(TOY, **sizes)
    options = {"recompute": "none", "deterministic": False, "kernels": kernels}
    return llm, transformer_config(llm, layout, dtype=dtype, **options)


def sequential(config):
    local = LocalSpecProvider()
    parts = MLPSubmodules(linear_fc1=local.column_parallel_linear(), linear_fc2=local.row_parallel_linear())
    return SequentialMLP(config.num_moe_experts, config, parts, get_default_pg_collection())


def pair_of(config):
    """(ours, Megatron-core's SequentialMLP) with the same weights."""
    ours = GroupedExperts(config.num_moe_experts, config, get_default_pg_collection())
    theirs = sequential(config)
    with torch.no_grad():
        for name, stacked in ours.named_parameters():
            stacked.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
            for expert, weight in zip(theirs.local_experts, stacked, strict=True):
                getattr(expert, name).weight.copy_(weight)
    return ours, theirs


def rows_of(counts, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = sum(counts)
    x_TD = torch.randn(rows, D, generator=draw).to(dtype).requires_grad_()
    p_T = torch.rand(rows, generator=draw).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    return x_TD, p_T, torch.randn(rows, D, generator=draw).to(dtype)


def run(module, counts, dtype, seed=0):
    """Output and gradients of rows, probabilities, and both weights stacked."""
    x_TD, p_T, gradient_TD = rows_of(counts, dtype, seed)
    module.zero_grad()
    output_TD, bias = module(x_TD, torch.tensor(counts), p_T)
    assert bias is None
    output_TD.backward(gradient_TD)
    if isinstance(module, GroupedExperts):
        weights = [module.linear_fc1.grad, module.linear_fc2.grad]
    else:
        parts = zip(*([*expert.parameters()] for expert in module.local_experts), strict=True)
        weights = [torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in part]) for part in parts]
    return [output_TD.detach(), x_TD.grad, p_T.grad, *weights]


def assert_close(ours, theirs, limit):
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.isfinite().all()
        assert (mine.double() - other.double()).norm() <= limit * other.double().norm()


# ---- experts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize(
    ("arrangement", "dtype"),
    [
        ("padded", torch.float64),
        ("padded", torch.float32),
        ("looped", torch.float64),
        ("looped", torch.float32),
        ("grouped", torch.float32),
    ],
)
def test_experts_are_sequential_mlp(arrangement, dtype, counts, alone, monkeypatch):
    monkeypatch.setattr(experts, "arrange", ARRANGEMENTS[arrangement])
    ours, theirs = pair_of(config_of(alone, dtype)[1])
    assert_close(run(ours, counts, dtype), run(theirs, counts, dtype), LIMITS[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_swiglu_is_swiglu(dtype, configured):
    """To the bit, by a backend that only takes code apart."""
    h_TG, gradient_TF = torch.randn(7, 2 * F).to(dtype), torch.randn(7, F).to(dtype)
    p_T1 = torch.rand(7, 1)
    plain = [experts.swiglu(h_TG, p_T1), *experts.swiglu_backward(h_TG, p_T1, gradient_TF)]
    configured("always")
    compiled = [experts.swiglu(h_TG, p_T1), *experts.swiglu_backward(h_TG, p_T1, gradient_TF)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(compiled, plain, strict=True))


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_experts_in_bf16_are_near_fp32(counts, alone):
    ours, _ = pair_of(config_of(alone, torch.bfloat16)[1])
    exact, _ = pair_of(config_of(alone, torch.float32)[1])
    with torch.no_grad():
        for mine, other in zip(exact.parameters(), ours.parameters(), strict=True):
            mine.copy_(other)
    x_TD, p_T, gradient_TD = rows_of(counts, torch.bfloat16)
    results = []
    for module, dtype in ((ours, torch.bfloat16), (exact, torch.float32)):
        x, p = x_TD.detach().to(dtype).requires_grad_(), p_T.detach().requires_grad_()
        output, _ = module(x, torch.tensor(counts), p)
        output.backward(gradient_TD.to(dtype))
        results.append([output.detach(), x.grad, p.grad, *(weight.grad for weight in module.parameters())])
    assert_close(*results, LIMITS[torch.bfloat16])


def test_rows_choose_their_arrangement(alone):
    weight = torch.zeros(E, 128, 128)

    def chosen(counts):
        return type(experts.arrange(torch.zeros(sum(counts), D), weight, torch.tensor(counts)))

    assert [chosen(counts) for counts in COUNTS.values()] == [Padded, Padded, Looped, Looped]


def test_frozen_experts_pass_gradients_on(alone):
    ours, theirs = pair_of(config_of(alone)[1])
    counts = COUNTS["about equal"]
    whole = run(theirs, counts, torch.float32)
    ours.requires_grad_(False)
    x_TD, p_T, gradient_TD = rows_of(counts, torch.float32)
    ours(x_TD, torch.tensor(counts), p_T)[0].backward(gradient_TD)
    assert_close([x_TD.grad, p_T.grad], whole[1:3], LIMITS[torch.float32])


# ---- dispatch ------------------------------------------------------------------------------------------------------


def routing(tokens, top_k, seed=0):
    draw = torch.Generator().manual_seed(seed)
    scores_TE = torch.rand(tokens, E, generator=draw)
    map_TE = torch.zeros(tokens, E, dtype=torch.bool).scatter(1, scores_TE.topk(top_k).indices, True)
    return map_TE, (scores_TE * map_TE).requires_grad_()


@pytest.mark.parametrize("top_k", [1, 2, 4, E])
def test_permutation_is_megatrons_to_the_bit(top_k):
    """Forward and backward; both add a token's rows in the order of its experts."""
    map_TE, p_TE = routing(40, top_k)
    x_TD = torch.randn(40, D, requires_grad=True)
    order = Order.of(map_TE, top_k)
    rows_PD = ToPlaces.apply(x_TD, order.token_P, order.place_TK)
    weight_P = WeightsToPlaces.apply(p_TE, order)
    back_TD = FromPlaces.apply(rows_PD * weight_P[:, None], order.token_P, order.place_TK)
    theirs_PD, their_weight_P, indices = moe_utils.permute(x_TD, map_TE, probs=p_TE, num_out_tokens=40 * top_k)
    their_back_TD = moe_utils.unpermute(theirs_PD * their_weight_P[:, None], indices, x_TD.shape)
    for mine, other in ((rows_PD, theirs_PD), (weight_P, their_weight_P), (back_TD, their_back_TD)):
        assert torch.equal(mine, other)
    gradient_TD = torch.randn(40, D)
    mine, other = (torch.autograd.grad(out, (x_TD, p_TE), gradient_TD) for out in (back_TD, their_back_TD))
    for one, another in zip(mine, other, strict=True):
        assert torch.equal(one, another)
    assert torch.equal(order.expert_P, order.expert_P.sort().values)
    assert torch.equal(order.token_P[order.place_TK], torch.arange(40)[:, None].expand(40, top_k))


def test_router_logits_are_megatrons_to_the_bit():
    results = []
    for product in (RouterLogits.apply, lambda x, w: router_gating_linear(x, w, None, torch.float32)):
        draw = torch.Generator().manual_seed(0)
        x_TD = torch.randn(40, D, generator=draw).bfloat16().requires_grad_()
        w_ED = torch.randn(E, D, generator=draw).bfloat16().requires_grad_()
        logits_TE = product(x_TD, w_ED)
        logits_TE.backward(torch.randn(40, E, generator=draw))
        results.append((logits_TE, x_TD.grad, w_ED.grad))
    for mine, other in zip(*results, strict=True):
        assert mine.dtype == other.dtype and torch.equal(mine, other)


def test_bf16_parts_are_the_whole():
    x = torch.randn(10_000) * torch.logspace(-8, 8, 10_000)
    assert torch.equal(sum(part.double() for part in bf16_parts(x)).float(), x)


# ---- the whole layer -----------------------------------------------------------------------------------------------


def layer_of(layout, **sizes):
    config = config_of(layout, **sizes)[1]
    layer = build_module(moe_spec(config), config=config)
    layer.set_layer_number(1)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.2, generator=draw)
    return layer


def step(layer, tokens=64):
    draw = torch.Generator().manual_seed(1)
    x_T1D = torch.randn(tokens, 1, D, generator=draw).requires_grad_()
    layer.zero_grad()
    output_T1D, _ = layer(x_T1D)
    output_T1D.backward(torch.randn(tokens, 1, D, generator=draw))
    return [output_T1D.detach(), x_T1D.grad, *(parameter.grad for parameter in layer.parameters())]


def test_no_host_sync(alone, monkeypatch):
    """With the arrangement of a CUDA device, forward and backward, router losses and shared experts included."""
    layer = layer_of(alone, shared_expert_width=16, aux_loss=0.1, z_loss=0.1)
    monkeypatch.setattr(experts, "arrange", ARRANGEMENTS["grouped"])
    monkeypatch.setattr(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", torch.tensor(1.0))
    with ForbidSyncs():
        step(layer)


def test_syncs_are_found(alone, monkeypatch):
    with pytest.raises(AssertionError, match=r"tolist\(\) at .*experts.py"), ForbidSyncs():
        step(layer_of(alone))


def test_repeats_are_equal_to_the_bit(alone):
    layer = layer_of(alone)
    first = step(layer)
    for _ in range(3):
        for one, another in zip(step(layer), first, strict=True):
            assert torch.equal(one, another)


def test_a_model_is_megatrons_weight_for_weight(alone, monkeypatch):
    """Initial weights by global name equal to the bit; outputs and all gradients to rounding."""
    results = []
    for spec in (moe_spec, lambda config: get_moe_module_spec_for_backend(LocalSpecProvider(), config.num_moe_experts)):
        monkeypatch.setattr(llm_spec, "moe_spec", spec)
        llm, config = config_of(alone, layers=2, top_k=4)
        chunk = build_chunk(llm, config, vp_stage=None, first=True, last=True)
        initialize(chunk, 3, llm.init_std, llm.layers)
        layers = chunk.decoder.layers
        x = hidden = torch.randn(64, 1, D, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for layer in layers:
            hidden = hidden + layer.mlp(hidden)[0]
        hidden.backward(torch.randn(64, 1, D, generator=torch.Generator().manual_seed(1)))
        shards = {shard.name: shard for shard in shards_of(chunk)}
        gradients = {}
        for name, shard in shards.items():
            if ".mlp." in name:
                gradient = shard.parameter.grad
                gradients[name] = gradient if shard.entry is None else gradient[shard.entry]
        results.append(({name: shard.local for name, shard in shards.items()}, gradients, hidden.detach(), x.grad))
    ours, theirs = results
    assert ours[0].keys() == theirs[0].keys() and ours[1].keys() == theirs[1].keys()
    assert all(torch.equal(weight, theirs[0][name]) for name, weight in ours[0].items())
    assert f"decoder.layers.1.mlp.experts.local_experts.{E - 1}.linear_fc2.weight" in ours[1]
    assert_close([ours[1][name] for name in theirs[1]], list(theirs[1].values()), 1e-5)
    assert_close(ours[2:], theirs[2:], 1e-6)


class OnePerExpert(torch.nn.Module):
    """Parameters as Transformer Engine's grouped linear layer names them."""

    def __init__(self, weights):
        super().__init__()
        for place, weight in enumerate(weights):
            self.register_parameter(f"weight{place}", torch.nn.Parameter(weight.clone()))


def test_transformer_engines_names_are_the_same_in_the_whole_model(alone):
    llm, config = config_of(alone, layers=2)
    chunk = build_chunk(llm, config, vp_stage=None, first=True, last=True)
    initialize(chunk, 3, llm.init_std, llm.layers)
    ours = {shard.name: shard.local.clone() for shard in shards_of(chunk)}
    for layer in chunk.decoder.layers:
        stacked, layer.mlp.experts = dict(layer.mlp.experts.named_parameters()), torch.nn.Module()
        for name, weight in stacked.items():
            setattr(layer.mlp.experts, name, OnePerExpert(weight.detach()))
    theirs = {shard.name: shard.local for shard in shards_of(chunk)}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())


def test_megatrons_own_checkpoints_hold_the_same_tensors(alone):
    """Keys, places and values of SequentialMLP's sharded state, and back."""
    ours, theirs = pair_of(config_of(alone)[1])
    found = []
    for module in (ours, theirs):
        state = module.sharded_state_dict("mlp.experts.", ((0, 1, 2),))
        apply_factories(state)
        flat, _ = extract_matching_values(
            state, lambda value: isinstance(value, ShardedTensor), return_lists_as_dicts=True
        )
        tensors = list(nested_values(flat))
        found.append({(t.key, t.global_shape, t.global_offset, t.replica_id): t.data for t in tensors})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3 * E
    assert all(torch.equal(tensor, found[1][place]) for place, tensor in found[0].items())
    factories = ours.sharded_state_dict("")
    loaded = {name: [t.data for t in factory.build()] for name, factory in factories.items()}
    merged = apply_factory_merges(loaded, factories)
    assert all(torch.equal(merged[name], weight) for name, weight in ours.named_parameters())
