"""Initial weights: the deviation of every kind of tensor of the LLM, the encoder and all heads, at sizes and settings
that are not the toy's.

A sample of n normal numbers has a deviation that is off by sigma / sqrt(2 n); five of these are allowed.
"""

import dataclasses

import pytest
import torch
from torch import nn

from tandem.parallel.engines import llm_shards
from tandem.parallel.engines.llm_shards import shards_of
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers.vision_tower import VisionTower
from tests.support import new_tower, settings

PLAIN = (  # parts of the LLM that are drawn with init_std
    "embedding.word_embeddings.weight",
    "self_attention.linear_qkv.weight",
    "mlp.router.weight",
    "local_experts.0.linear_fc1.weight",
    "local_experts.7.linear_fc1.weight",
    "shared_experts.linear_fc1.weight",
    "output_layer.weight",
)
TO_RESIDUAL = (  # and those that write to the residual stream
    "self_attention.linear_proj.weight",
    "local_experts.0.linear_fc2.weight",
    "local_experts.7.linear_fc2.weight",
    "shared_experts.linear_fc2.weight",
)


def assert_drawn(name: str, tensor: torch.Tensor, deviation: float) -> None:
    """Normal numbers of this deviation around 0."""
    values = tensor.detach().double().flatten()
    count = values.numel()
    assert values.std() == pytest.approx(deviation, rel=5 * (2 * count) ** -0.5), name
    assert abs(float(values.mean())) < 5 * deviation / count**0.5, name
    assert abs(float((values.abs() < deviation).double().mean()) - 0.6827) < 5 * 0.466 / count**0.5, f"{name}: normal"


def llm_tensors(build_llm, **sizes) -> dict[str, torch.Tensor]:
    """Every tensor of the whole model, by name."""
    layout = build_llm("experts").layout
    config = dataclasses.replace(settings("stage1").model.llm, **sizes)
    megatron = transformer_config(config, layout, dtype=torch.float32, recompute="none", deterministic=False)
    chunk = build_chunk(config, megatron, vp_stage=None, first=True, last=True)
    llm_shards.initialize(chunk, 0, config.init_std, config.layers)
    return {shard.name: shard.local for shard in shards_of(chunk)}


@pytest.mark.parametrize(("std", "layers"), [(0.02, 3), (0.02, 12), (0.11, 3)])
def test_llm(build_llm, std, layers):
    """init_std, over sqrt(2 * layers) for what writes to the residual stream: two branches a layer; norms are 1."""
    sizes = dict(width=96, expert_width=80, shared_expert_width=80, num_experts=8, vocab_size=512)
    tensors = llm_tensors(build_llm, init_std=std, layers=layers, **sizes)
    seen = set()
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            assert (tensor == 1).all(), name
            continue
        written = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        assert_drawn(name, tensor, std / (2 * layers) ** 0.5 if written else std)
        seen |= {kind for kind in (TO_RESIDUAL if written else PLAIN) if name.endswith(kind)}
    assert seen == {*PLAIN, *TO_RESIDUAL}


def test_dense_llm(build_llm):
    sizes = dict(width=96, ffn_width=160, num_experts=0, layers=5, init_std=0.07)
    tensors = llm_tensors(build_llm, **sizes)
    assert_drawn("fc1", tensors["decoder.layers.4.mlp.linear_fc1.weight"], 0.07)
    assert_drawn("fc2", tensors["decoder.layers.4.mlp.linear_fc2.weight"], 0.07 / 10**0.5)


def test_tensors_of_one_shape_are_drawn_apart(build_llm):
    """Experts, layers, and the same place of another seed."""
    tensors = llm_tensors(build_llm, layers=2)
    alike = [tensor for name, tensor in tensors.items() if name.endswith("linear_fc1.weight")]
    assert len(alike) == 2 * (4 + 1)
    for place, one in enumerate(alike):
        for other in alike[:place]:
            assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.06


# ---- the encoder and what is trained with it -------------------------------------------------------------------------

SIZES = ["model.encoder.width=96", "model.encoder.heads=6", "model.encoder.depth=3", "model.text.width=80"]
SIZES += ["model.embedding=72", "objective.omni.decoder_width=64"]
LEARNED_VECTORS = ("query", "mask.token", "log_scale_moved", "bias_moved")


def towers():
    """(what is built, tower), of every recipe."""
    for recipe in ("vit_mim", "vit_contrastive", "vit_omni"):
        yield recipe, new_tower(settings(recipe, *SIZES), **({"teacher_width": 56} if recipe == "vit_mim" else {}))
    yield "vit_mim, token", new_tower(settings("vit_mim", *SIZES, "objective.mim.masked=token"), teacher_width=56)
    config = settings("stage1", *SIZES, "model.llm.width=88")
    tower = VisionTower(config.model.encoder, config.model.connector, config.model.llm.width)
    initialize(tower, config.train.seed)
    yield "stage1", tower


def test_encoder_and_heads():
    """Matrices fan_in ** -0.5 (tables of words their width's), norms 1, biases and learned vectors 0."""
    kinds = set()
    for recipe, tower in towers():
        norms = {name for name, module in tower.named_modules() if isinstance(module, nn.LayerNorm)}
        for name, parameter in tower.named_parameters():
            place, _, kind = name.rpartition(".")
            if place in norms:
                assert (parameter == (1 if kind == "weight" else 0)).all(), f"{recipe} {name}"
            elif kind == "bias":
                assert (parameter == 0).all(), f"{recipe} {name}"
            elif name.endswith(LEARNED_VECTORS):
                kinds.add(next(vector for vector in LEARNED_VECTORS if name.endswith(vector)))
            else:
                assert kind == "weight" and parameter.dim() == 2
                assert_drawn(f"{recipe} {name}", parameter, parameter.shape[1] ** -0.5)
    assert kinds == set(LEARNED_VECTORS)


def test_learned_vectors():
    """Temperature and bias start where they were set to: what is learned is how far they moved, which is 0."""
    moved = [
        (recipe, name, parameter)
        for recipe, tower in towers()
        for name, parameter in tower.named_parameters()
        if name.endswith("_moved")
    ]
    assert len(moved) == 2 + 2 * 3
    assert all((parameter == 0).all() for _, _, parameter in moved)
