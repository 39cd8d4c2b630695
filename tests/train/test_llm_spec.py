"""Our layer spec against Megatron-core's plain local one, weight for weight by global names, and the choice of kernels.

The plain model shares nothing with ours but its configuration: torch's RMSNorm, rotary positions and unfused attention
of Megatron-core, SequentialMLP, all logits and vocab_parallel_cross_entropy.  fp32; sums in other orders through four
layers differ by 1e-6 of a gradient's norm, and 1e-5 is allowed.
"""

import dataclasses
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from megatron.core.extensions import transformer_engine as te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from tandem.parallel.comm.context import pack_row
from tandem.parallel.engines import llm_shards
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.parallel.engines.llm_shards import shards_of
from tandem.train.config.checks import check_config
from tandem.train.models.language.llm_spec import build_chunk, choose_kernels, layer_spec, transformer_config
from tests.support import settings
from tests.train.toys import LLM_KINDS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def plain_model(llm):
    """Megatron-core's model with the sizes of a toy one and the weights of its seed."""
    fields = {field.name: getattr(llm.chunk.config, field.name) for field in dataclasses.fields(TransformerConfig)}
    chunk = GPTModel(
        config=TransformerConfig(**fields),
        transformer_layer_spec=get_gpt_layer_local_spec(llm.config.num_experts or None, normalization="RMSNorm"),
        vocab_size=llm.config.vocab_size,
        max_sequence_length=0,
        position_embedding_type="rope",
        rotary_base=llm.config.rope_base,
        share_embeddings_and_output_weights=False,
    )
    chunk.words = llm.config.vocab_size
    llm_shards.initialize(chunk, 0, llm.config.init_std, llm.config.layers)
    return chunk


def gradients(chunk):
    """By global name."""
    return {
        shard.name: shard.parameter.grad if shard.entry is None else shard.parameter.grad[shard.entry]
        for shard in shards_of(chunk)
    }


@pytest.mark.parametrize("kind", LLM_KINDS)
def test_trains_like_megatron_cores_plain_spec(kind, build_llm):
    llm = build_llm(kind)
    plain = plain_model(llm)
    tokens_T = torch.randint(llm.config.vocab_size, (40,), generator=torch.Generator().manual_seed(0))
    labels_T = (7 * tokens_T + 3) % llm.config.vocab_size  # those of ToyLLM
    ours_T = llm.losses(tokens_T, [40])
    plain_T = plain(tokens_T[None], torch.arange(40)[None], None, labels=labels_T[None])[0]
    torch.testing.assert_close(ours_T, plain_T, rtol=1e-5, atol=1e-5)
    ours_T.sum().backward()
    plain_T.sum().backward()
    ours, theirs = gradients(llm.chunk), gradients(plain)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        assert (ours[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_without_labels_there_are_logits(build_llm):
    """The loss is their cross-entropy."""
    llm = build_llm("dense")
    tokens_T, labels_T = torch.arange(12), (7 * torch.arange(12) + 3) % llm.config.vocab_size
    row = pack_row([5, 7], np.r_[:5, :7], llm.layout, 0, CPU)
    logits_TV = llm.chunk(tokens_T[None], None, row, torch.zeros(0, llm.config.width), torch.zeros(0, dtype=int))[0]
    expected_T = torch.nn.functional.cross_entropy(logits_TV, labels_T, reduction="none")
    torch.testing.assert_close(llm.losses(tokens_T, [5, 7]), expected_T)


# ---- parallel.kernels ----------------------------------------------------------------------------------------------


def test_torch_serves_everywhere():
    assert choose_kernels("auto", CPU) == choose_kernels("torch", CPU) == choose_kernels("torch", CUDA) == "torch"


@pytest.mark.parametrize("name", ["te", "cutlass"])
def test_kernels_that_are_not_to_be_had_are_refused_before_anything_is_built(name):
    with pytest.raises(ValueError, match=rf"parallel\.kernels={name}: .*torch"):
        check_config(settings("stage1", f"parallel.kernels={name}"), 1)


@pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is not None, reason="it is installed")
def test_a_missing_transformer_engine_is_named_with_its_install_command():
    with pytest.raises(ValueError, match=r"parallel\.kernels=te: .*pip install 'transformer-engine\[pytorch\]'"):
        choose_kernels("te", CUDA)


def test_transformer_engine_takes_its_places_in_the_spec(build_llm):
    """Norms stay modules of their own: a norm inside a linear layer would have another name."""
    config = dataclasses.replace(build_llm("dense").chunk.config, transformer_impl="transformer_engine")
    parts = layer_spec(config, sparse=False).submodules
    attention, mlp = parts.self_attention.submodules, parts.mlp.submodules
    modules = [parts.input_layernorm, parts.pre_mlp_layernorm, attention.linear_qkv, attention.linear_proj]
    modules += [mlp.linear_fc1, mlp.linear_fc2]
    linear = [te.TEColumnParallelLinear, te.TERowParallelLinear]
    assert all(a is b for a, b in zip(modules, [te.TENorm, te.TENorm, *linear, *linear], strict=True))


def test_a_stored_bias_is_not_rounded(build_llm):
    """bf16 weights, and a router's bias of fp32, in the model, in a checkpoint and out of one."""
    llm = build_llm("experts")
    config = dataclasses.replace(llm.config, router_score="sigmoid", expert_bias=True)
    megatron = transformer_config(config, llm.layout, dtype=torch.bfloat16, recompute="none", deterministic=False)

    def build(vp_stage, first, last):
        return build_chunk(config, megatron, vp_stage=vp_stage, first=first, last=last)

    grid = SimpleNamespace(layout=llm.layout, device=CPU)
    engine = LLMEngine(megatron, grid, build=build, forward=None, loss=None, trainable=False, adam=None)
    engine.load(lambda name, kind, start, size: torch.full(size, 1 / 3), optimizer=False)
    saved = {chunk.name: chunk.tensor_N for chunk in engine.state()}
    biases = [name for name in saved if name.endswith("router.expert_bias")]
    assert len(biases) == config.layers and all((saved[name] == torch.tensor(1 / 3)).all() for name in biases)
    assert (saved["decoder.layers.0.mlp.router.weight"] == torch.tensor(1 / 3).bfloat16().float()).all()
