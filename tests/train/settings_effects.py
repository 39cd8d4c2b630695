"""What each setting of model, objective, train and parallel does, seen where it lands, in a world of one.

Each effect builds what a run would build with a value that no recipe has, and asserts what that does: outputs against
the formulas of `tests/reference`, shapes of all weights, or the batch that a stage's prefetcher hands out.
"""

import json
import math
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tandem.data.vision import VisionSpec
from tandem.parallel.comm.context import pack_row
from tandem.parallel.engines.llm_engine import Leaf
from tandem.parallel.engines.llm_shards import shards_of
from tandem.parallel.grid import build_grid, destroy_grid
from tandem.parallel.kernels import attention, compilation
from tandem.parallel.layout import Layout
from tandem.parallel.plan.tokens import PADDING, TEXT, RowTokens
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.build import build_engines
from tandem.train.config.checks import check_config
from tandem.train.cost.flops import llm_parameters
from tandem.train.input.batch import MicroBatch
from tandem.train.models.encoders.text_encoder import PackedTexts
from tandem.train.models.encoders.vit import PackedImages
from tandem.train.models.towers.masked import MaskedImages
from tandem.train.objectives.language import train_forward, train_loss
from tandem.train.tasks import find
from tests.distributed.runs import whole_state
from tests.reference import encoder as plain
from tests.reference import language as plain_llm
from tests.reference.vision import text_embedding
from tests.support import new_tower, settings
from tests.train.followed import CPU, open_stage
from tests.train.toys import ToyLLM, llm_of, packed, random_images
from tests.train.vision_models import images as noise
from tests.train.vision_models import saved

GRID, TOKENS = [4, 6], 24  # of the image and of the text that go through the models
EFFECTS: dict[str, Callable[["Lab"], None]] = {}


@dataclass(frozen=True)
class Lab:
    """corpus: a toy corpus.  teacher: a run whose encoder is 32 wide."""

    corpus: str
    teacher: str

    def first(self, recipe: str, *overrides: str):
        """(stage, the first prepared step, its batch)."""
        teacher = [f"objective.teacher={self.teacher}"] if recipe == "vit_mim" else []
        _, stage, _ = open_stage(recipe, self.corpus, *teacher, *overrides)
        prepared, batch = next(stage.steps(1))
        return stage, prepared, batch


def outcomes(corpus: str, teacher: str) -> dict[str, str]:
    """Of every effect nothing, or the traceback of what did not hold.

    In a world of one every group is the world: a hundred grids of their own would take a hundred times their threads.
    """
    lab, found = Lab(corpus, teacher), {}
    with mock.patch.object(dist, "new_group", lambda *_, **__: dist.group.WORLD):
        for key, effect in EFFECTS.items():
            try:
                effect(lab)
                found[key] = ""
            except Exception:
                found[key] = traceback.format_exc()
    return found


def effect(*keys: str):
    """Registers a function as the effect of these settings."""

    def register(function):
        EFFECTS.update(dict.fromkeys(keys, function))
        return function

    return register


def close(found, wanted, tolerance=1e-4):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def differs(found, wanted):
    """By more than arithmetic."""
    assert (found - wanted).abs().max() > 1e-2, "the setting has no effect"


# ---- encoder, adapter and LLM ----------------------------------------------------------------------------------------


def language(*overrides: str):
    """(config, engines) of stage1 in this world."""
    config = settings("stage1", *overrides)
    layout = check_config(config, 1)
    destroy_grid()
    return config, build_engines(config, layout, CPU, forward=train_forward, loss=partial(train_loss, domains=1))


def weights_of(engine) -> dict[str, torch.Tensor]:
    return {name: tensor for (name, kind), tensor in whole_state(engine).items() if kind == "param"}


def image() -> tuple[torch.Tensor, torch.Tensor]:
    """(patches, positions) of one image of noise."""
    return torch.from_numpy(random_images([GRID])[0]), torch.from_numpy(VisionSpec().positions([GRID]))


def block_shapes(name: str, width: int, ratio: float) -> dict[str, tuple]:
    hidden = int(width * ratio)
    shapes = {f"{name}.{norm}.{kind}": (width,) for norm in ("attention_norm", "mlp_norm") for kind in KINDS}
    for layer, out, into in (
        ("qkv", 3 * width, width),
        ("projection", width, width),
        ("mlp_up", hidden, width),
        ("mlp_down", width, hidden),
    ):
        shapes |= {f"{name}.{layer}.weight": (out, into), f"{name}.{layer}.bias": (out,)}
    return shapes


KINDS = ("weight", "bias")


def transformer_shapes(name: str, sizes) -> dict[str, tuple]:
    shapes = {f"{name}.final_norm.{kind}": (sizes.width,) for kind in KINDS}
    for layer in range(sizes.depth):
        shapes |= block_shapes(f"{name}.blocks.{layer}", sizes.width, sizes.mlp_ratio)
    return shapes


def encoder_effect(key: str, value, usual=None):
    """usual: the toy's value, where weights have the same shapes with it: its outputs must be others."""

    def run(lab):
        config, engines = language(f"model.encoder.{key}={value}")
        sizes, weights = config.model.encoder, weights_of(engines.encoder)
        assert getattr(sizes, key) == value
        mine = {name: tuple(tensor.shape) for name, tensor in weights.items() if name.startswith("encoder.")}
        first = {"encoder.patch_embedding.weight": (sizes.width, 588), "encoder.patch_embedding.bias": (sizes.width,)}
        assert mine == first | transformer_shapes("encoder", sizes)
        patches_NP, positions_N2 = image()
        with torch.no_grad():
            found = engines.encoder.encode(packed([patches_NP.numpy()], [GRID]))

        def rows(**changed):
            plainly = vars(sizes) | changed
            features_ND = plain.vit(weights, "encoder.", patches_NP, positions_N2, [len(patches_NP)], plainly)
            return plain.adapter(weights, "adapter.", plain.pool(features_ND, 2), plainly["norm_eps"])

        close(found, rows())
        if usual is not None:
            differs(found, rows(**{key: usual}))

    EFFECTS[f"model.encoder.{key}"] = run


for key, value, usual in (
    ("width", 32, None),
    ("depth", 3, None),
    ("heads", 2, 4),
    ("mlp_ratio", 3.0, None),
    ("rope_base", 3.0, 100.0),
    ("norm_eps", 0.4, 1e-6),
):
    encoder_effect(key, value, usual)


def switch_effect(key: str, value: str, *base: str):
    """Against the same encoder without this key: other weights, or other features from those of the same names.  What
    a switch computes is held to transformers' classes (tests/train/test_encoder_families.py)."""

    def run(lab):
        found = []
        for overrides in ([*base, f"model.encoder.{key}={value}"], list(base)):
            config, engines = language("model.connector.merge=1", *overrides)
            shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(engines.encoder).items()}
            _, images = noise(config, [(3, 5), (4, 6)])
            with torch.no_grad():
                found.append((shapes, engines.encoder.encode(images)))
        (shapes, rows), (usual_shapes, usual_rows) = found
        assert rows.shape == usual_rows.shape and rows.isfinite().all()
        if shapes == usual_shapes:
            differs(rows, usual_rows)

    EFFECTS[f"model.encoder.{key}"] = run


LEARNED = ("model.encoder.positions=learned", "model.encoder.position_grid=3")
for key, value, *base in (
    ("positions", "learned"),
    ("position_grid", "4", *LEARNED),
    ("interpolation", "antialias", *LEARNED),
    ("class_token", "true", *LEARNED),
    ("pre_norm", "true"),
    ("final_norm", "false"),
    ("norm", "rmsnorm"),
    ("activation", "quick_gelu"),
    ("bias", "false"),
    ("patch_bias", "false"),
    ("frames", "2"),
    ("window", "2"),
    ("whole_layers", "[1]", "model.encoder.window=2"),
):
    switch_effect(key, value, *base)


@effect("model.encoder.folder", "model.encoder.feature_layer")
def encoder_of_a_folder(lab):
    """Its sizes, without the last layer; its weights are those of `tests/distributed/test_encoder_families.py`."""
    with tempfile.TemporaryDirectory() as root:
        folder = saved("clip", Path(root))
        overrides = [f"model.encoder.folder={folder}", "model.encoder.feature_layer=-2"]
        config, engines = language(*overrides)
    shapes = {name: tuple(tensor.shape) for name, tensor in weights_of(engines.encoder).items()}
    assert config.model.encoder.depth == 2 and shapes["encoder.blocks.1.qkv.weight"] == (144, 48)
    assert not any(name.startswith("encoder.blocks.2.") for name in shapes)


@effect("model.encoder.patch_size", "model.connector.merge", "model.encoder.image_mean", "model.encoder.image_std")
def geometry(lab):
    """Other patches, blocks and normalisation than the toy's, against the formulas, and in the plan."""
    overrides = ["model.encoder.patch_size=16", "model.connector.merge=3"]
    overrides += ["model.encoder.image_mean=[0.1,0.4,0.6]", "model.encoder.image_std=[0.2,0.3,0.7]"]
    config, engines = language(*overrides)
    vision, weights = config.vision, weights_of(engines.encoder)
    assert weights["encoder.patch_embedding.weight"].shape == (64, 16 * 16 * 3)
    patches_NP = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (54, 768), np.uint8))
    positions_N2 = torch.from_numpy(vision.positions([[6, 9]]))
    with torch.no_grad():
        found = engines.encoder.encode(PackedImages.of(patches_NP.numpy(), positions_N2.numpy(), [54], CPU))
    features_ND = plain.vit(weights, "encoder.", patches_NP, positions_N2, [54], vars(config.model.encoder))
    close(found, plain.adapter(weights, "adapter.", plain.pool(features_ND, 3), config.model.encoder.norm_eps))
    _, prepared, _ = lab.first("stage1", *overrides)
    assert (prepared.plan.grid_hw_I2 % 3 == 0).all()
    assert (prepared.plan.tokens_I == prepared.plan.grid_hw_I2.prod(1) // 9).all()
    assert prepared.images.patches_NP.shape == (prepared.plan.patches_I.sum(), 768)


@effect("model.connector.kind")
def connector(lab):
    """Another name, and an option that the kind lacks, are refused."""
    refused("model.connector.kind", "mlq", lambda: check_config(settings("stage1", "model.connector.kind=mlq"), 1))
    with pytest.raises(ValueError, match="model.connector.options.wide: there is no such option"):
        check_config(settings("stage1", "+model.connector.options.wide=3"), 1)


@effect("model.connector.folder")
def connector_folder(lab):
    """Its config.json decides; `tests/distributed/test_whole_family.py` has its weights."""
    with tempfile.TemporaryDirectory() as place:
        said = {"model_type": "qwen2_5_vl", "vision_config": {"spatial_merge_size": 3}}
        (Path(place) / "config.json").write_text(json.dumps(said))
        found = settings("stage1", f"model.connector.folder={place}").model.connector
        assert (found.kind, found.merge, found.options) == ("merger", 3, {"norm": "rms"})


@effect("model.encoder.drop_path")
def drop_path(lab):
    """Off by default; else the last block's two branches are left out, or weighed by 1 / (1 - 0.6)."""
    assert lab.first("stage1")[2].chunks[0].keep_LI is None
    keep_LI = lab.first("stage1", "model.encoder.drop_path=0.6")[2].chunks[0].keep_LI
    assert set(keep_LI[2:].flatten().tolist()) == {0.0, 2.5}
    assert set(keep_LI[:2].flatten().tolist()) == {0.0, float(np.float32(1 / 0.7))}


def llm_shapes(llm) -> dict[str, tuple]:
    """Of every tensor of the whole model."""
    queries, keys = llm.heads * llm.head_width, llm.kv_heads * llm.head_width
    shapes = {"embedding.word_embeddings.weight": (llm.vocab_size, llm.width)}
    shapes |= {"decoder.final_layernorm.weight": (llm.width,), "output_layer.weight": (llm.vocab_size, llm.width)}
    for layer in range(llm.layers):
        name = f"decoder.layers.{layer}"
        shapes |= {f"{name}.{norm}_layernorm.weight": (llm.width,) for norm in ("input", "pre_mlp")}
        shapes[f"{name}.self_attention.linear_qkv.weight"] = (queries + 2 * keys, llm.width)
        shapes[f"{name}.self_attention.linear_proj.weight"] = (llm.width, queries)
        mlps = {"mlp.shared_experts": llm.shared_expert_width} if llm.shared_expert_width else {}
        mlps |= {f"mlp.experts.local_experts.{expert}": llm.expert_width for expert in range(llm.num_experts)}
        if llm.num_experts:
            shapes[f"{name}.mlp.router.weight"] = (llm.num_experts, llm.width)
        else:
            mlps = {"mlp": llm.ffn_width}
        for mlp, hidden in mlps.items():
            shapes[f"{name}.{mlp}.linear_fc1.weight"] = (2 * hidden, llm.width)
            shapes[f"{name}.{mlp}.linear_fc2.weight"] = (llm.width, hidden)
    return shapes


def plain_hidden(weights, tokens_T, llm):
    """(hidden states, router losses) of one text."""
    row = {"tokens": tokens_T, "positions": torch.arange(len(tokens_T)), "lengths": [len(tokens_T)]}
    return plain_llm.hidden_states({f"llm.{name}": weight for name, weight in weights.items()}, row, None, llm)


def llm_effect(key: str, value, usual, *more: str):
    """Weights large enough that attention and routing are far from even."""

    def run(lab):
        config, engines = language("model.llm.init_std=0.3", f"model.llm.{key}={value}", *more)
        llm, weights = config.model.llm, weights_of(engines.llm)
        assert getattr(llm, key) == value
        assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == llm_shapes(llm)
        tokens_T = torch.randint(llm.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found_T = ToyLLM(llm, engines.grid.layout, engines.llm.chunks[0]).losses(tokens_T, [TOKENS])

        def losses(**changed):
            hidden_TD, _ = plain_hidden(weights, tokens_T, SimpleNamespace(**vars(llm) | changed))
            logits_TV = hidden_TD @ weights["output_layer.weight"].T
            return F.cross_entropy(logits_TV, (7 * tokens_T + 3) % llm.vocab_size, reduction="none")

        close(found_T, losses(), 1e-3)
        if usual is not None:
            differs(found_T, losses(**{key: usual}))

    EFFECTS[f"model.llm.{key}"] = run


for case in (
    ("layers", 2, None),
    ("width", 32, None),
    ("heads", 8, None),
    ("kv_heads", 1, None),
    ("head_width", 24, None),
    ("vocab_size", 400, None),
    ("ffn_width", 80, None, "model.llm.num_experts=0"),
    ("num_experts", 6, None),
    ("top_k", 3, 2),
    ("expert_width", 40, None),
    ("shared_expert_width", 24, None),
    ("rope_base", 3.0, 10000.0),
    ("norm_eps", 0.5, 1e-6),
):
    llm_effect(*case)


@effect("model.llm.aux_loss", "model.llm.z_loss")
def router_losses(lab):
    """With a loss of 0 the router's gradient is that of its own two losses, a mean over micro-batches."""
    for aux, z in ((0.03, 0.0), (0.0, 0.002), (0.0, 0.0)):
        coefficients = (f"model.llm.aux_loss={aux}", f"model.llm.z_loss={z}")
        config, engines = language("model.llm.init_std=0.3", *coefficients)
        llm, weights, vocab = config.model.llm, weights_of(engines.llm), config.model.llm.vocab_size
        rows = torch.randint(vocab, (2, TOKENS), generator=torch.Generator().manual_seed(0))
        leaves = [Leaf(torch.zeros(0, llm.width), torch.zeros(0, dtype=torch.long)) for _ in rows]
        engines.llm.forward_backward([micro_batch(row, engines) for row in rows], leaves, scale=0.0)
        last = engines.llm.chunks[0].decoder.layers[-1].mlp.router.weight
        router_ED = weights[f"decoder.layers.{llm.layers - 1}.mlp.router.weight"].requires_grad_()
        for row in rows:
            (plain_hidden(weights, row, llm)[1] / len(rows)).backward()
        error = (last.main_grad - router_ED.grad).norm()
        assert error <= 1e-3 * router_ED.grad.norm(), f"aux_loss={aux} z_loss={z}"
        assert (router_ED.grad.norm() > 1e-4) == (aux + z > 0)


@effect("model.llm.balance.aux_loss_type")
def sequence_loss(lab):
    """With a loss of 0 the router's gradient is that of the balance within each of two samples, padding left out."""
    setting = "model.llm.balance.aux_loss_type=seq_aux_loss"
    config, engines = language("model.llm.init_std=0.3", "model.llm.aux_loss=0.1", "model.llm.z_loss=0", setting)
    llm, lengths, domains = config.model.llm, [9, 11, 4], [0] * 20 + [-1] * 4
    tokens_T = torch.randint(llm.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    samples_T = np.repeat(np.arange(3), lengths)
    kinds_T = np.where(np.array(domains) < 0, PADDING, TEXT)
    batch = micro_batch(tokens_T, engines, lengths)
    tokens = RowTokens.of(kinds_T, samples_T, engines.grid.layout, engines.grid.place, CPU)
    batch = replace(batch, row=replace(batch.row, tokens=tokens))
    leaf = Leaf(torch.zeros(0, llm.width), torch.zeros(0, dtype=torch.long))
    engines.llm.forward_backward([batch], [leaf], scale=0.0)
    positions = torch.cat([torch.arange(length) for length in lengths])
    row = {"tokens": tokens_T, "positions": positions, "lengths": lengths, "domain": torch.tensor(domains)}
    weights = weights_of(engines.llm)
    router_ED = weights[f"decoder.layers.{llm.layers - 1}.mlp.router.weight"].requires_grad_()
    plain_llm.hidden_states({f"llm.{name}": w for name, w in weights.items()}, row, None, llm)[1].backward()
    last = engines.llm.chunks[0].decoder.layers[-1].mlp.router.weight
    assert (last.main_grad - router_ED.grad).norm() <= 1e-3 * router_ED.grad.norm() > 1e-6


@effect("model.llm.balance.bias_update", "model.llm.balance.by_modality")
def bias_update(lab):
    """Every bias is a step of the rate above or below zero after a step that is applied, and zero after another."""
    assert not any("expert_bias" in name for name in weights_of(language()[1].llm))
    for by_modality in (False, True):
        own = f"model.llm.balance.by_modality={str(by_modality).lower()}"
        stage, _, batch = lab.first("stage1", "model.llm.balance.bias_update=0.25", own)
        for applied in (False, True):
            stage.step(batch, timer=PhaseTimer(CPU), stop=False, accept=lambda *_, applied=applied: applied)
            biases = {name: w for name, w in weights_of(stage.engines.llm).items() if "expert_bias" in name}
            assert set(torch.cat(list(biases.values())).tolist()) == ({-0.25, 0.25} if applied else {0.0})
        visual = {name for name in biases if name.endswith("_visual")}
        assert len(biases) == (2 if by_modality else 1) * stage.engines.llm.config.num_layers
        assert not visual or any((biases[name] != biases[name.removesuffix("_visual")]).any() for name in visual)


def micro_batch(tokens_T, engines, lengths=(TOKENS,)) -> MicroBatch:
    places_T = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
    row = pack_row(lengths, places_T, engines.grid.layout, 0, CPU)
    zeros_1T = torch.zeros(1, len(tokens_T), dtype=torch.long)
    return MicroBatch(tokens_T[None], zeros_1T, zeros_1T + 1, zeros_1T, row, len(tokens_T))


@effect("model.llm.qk_norm")
def qk_norm(lab):
    """A norm of the heads' width for queries and one for keys; `tests/distributed/test_families.py` has the values."""
    for on in (True, False):
        config, engines = language(f"model.llm.qk_norm={str(on).lower()}")
        llm, weights = config.model.llm, weights_of(engines.llm)
        norms = {f"decoder.layers.{i}.self_attention.{x}_layernorm.weight" for i in range(llm.layers) for x in "qk"}
        assert set(weights) == set(llm_shapes(llm)) | (norms if on else set())
        assert all(weights[name].shape == (llm.head_width,) for name in norms & set(weights))
        assert sum(tensor.numel() for tensor in weights.values()) == llm_parameters(llm)[0]


def llm_switch(key: str, value: str, *more: str):
    """Another loss than without it, from the same weights; the weights that the formula counts.

    `tests/distributed/test_families.py` holds the values to those of transformers.
    """

    def run(lab):
        losses = {}
        for name, overrides in (("off", more), ("on", (*more, f"model.llm.{key}={value}"))):
            config = settings("stage1", "model.llm.init_std=0.3", *overrides)
            layout = check_config(config, 1)
            destroy_grid()
            build_grid(layout, CPU, seed=0)
            llm = llm_of(config.model.llm, layout)
            shards = list(shards_of(llm.chunk))
            for shard in shards:
                if shard.name.endswith("bias"):  # which are zero in the beginning
                    generator = torch.Generator().manual_seed(len(shard.name))
                    shard.local.copy_(torch.randn(shard.local.shape, generator=generator))
            weights = {shard.name: shard.shape for shard in shards if shard.trained}
            assert sum(map(math.prod, weights.values())) == llm_parameters(config.model.llm)[0]
            tokens_T = torch.randint(384, (TOKENS,), generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                losses[name] = llm.losses(tokens_T, [TOKENS])
        differs(losses["on"], losses["off"])

    EFFECTS[f"model.llm.{key}"] = run


EXPERTS = ("model.llm.num_experts=8", "model.llm.top_k=4")
DENSE = "model.llm.ffn_width=48"
for case in (
    ("tied_embeddings", "true"),
    ("rope_scaling", "{rope_type:linear,factor:8.0}"),
    ("rotary_fraction", "0.5"),
    ("qkv_bias", "true"),
    ("output_bias", "true", "model.llm.qkv_bias=true"),
    ("qk_norm_whole", "true", "model.llm.qk_norm=true"),
    ("window", "3"),
    ("window_from", "3", "model.llm.window=3"),
    ("norm_topk_prob", "false"),
    ("router_score", "sigmoid"),
    ("expert_bias", "true", "model.llm.router_score=sigmoid"),
    ("routed_scaling", "2.5"),
    ("router_groups", "2", *EXPERTS),
    ("router_top_groups", "2", *EXPERTS, "model.llm.router_groups=2"),
    ("shared_expert_gate", "true"),
    ("first_dense_layers", "1", DENSE),
    ("moe_every", "2", DENSE),
):
    llm_switch(*case)


@effect("model.llm.mrope_sections", "model.llm.mrope_interleaved")
def mrope(lab):
    """In the model, and in the positions of the rows that it gets."""
    switches = ("model.llm.mrope_sections=[3,3,2]", "model.llm.mrope_interleaved=true")
    stage, prepared, batch = lab.first("stage1", *switches)
    rope = stage.engines.llm.chunks[0].rope
    assert (rope.sections, rope.interleaved) == ((3, 3, 2), True)
    positions_S3 = batch.micro_batches[0].row.positions_S
    prepared.release()
    assert positions_S3.shape[1:] == (3,) and (positions_S3[:, 1] != positions_S3[:, 2]).any()


@effect("model.llm.folder")
def folder(lab):
    """Sizes are those of the folder's config.json; `tests/distributed/test_families.py` has its weights."""
    with tempfile.TemporaryDirectory() as place:
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2}
        said = {"model_type": "llama", "vocab_size": 500, "intermediate_size": 80, "rope_theta": 7.0, **sizes}
        (Path(place) / "config.json").write_text(json.dumps(said))
        llm = language(f"model.llm.folder={place}")[0].model.llm
    assert (llm.width, llm.layers, llm.heads, llm.kv_heads, llm.head_width) == (48, 3, 6, 2, 8)
    assert (llm.vocab_size, llm.num_experts, llm.ffn_width, llm.rope_base) == (500, 0, 80, 7.0)


@effect("model.llm.init_std")
def init_std(lab):
    for std in (0.11, 0.03):
        weights = weights_of(language(f"model.llm.init_std={std}")[1].llm)
        assert abs(weights["embedding.word_embeddings.weight"].std() / std - 1) < 0.03


# ---- text encoder and objectives -------------------------------------------------------------------------------------


def text_effect(key: str, value, usual=None):
    def run(lab):
        config = settings("vit_contrastive", f"model.text.{key}={value}")
        sizes, tower = config.model.text, new_tower(config)
        assert getattr(sizes, key) == value
        weights = {name: tensor.detach() for name, tensor in tower.named_parameters() if name.startswith("text.")}
        wanted = {"encoder.embedding.weight": (sizes.vocab_size, sizes.width)}
        wanted |= {"projection.weight": (64, sizes.width), "projection.bias": (64,)}
        wanted |= transformer_shapes("encoder", sizes)
        assert {name.removeprefix("text."): tuple(tensor.shape) for name, tensor in weights.items()} == wanted
        assert tower.contrastive.classifier.weight.shape == (sizes.vocab_size, 64)
        tokens_T = torch.randint(sizes.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found_BE = tower.embed_texts(PackedTexts.of(tokens_T.numpy(), [TOKENS], CPU))

        def embedding(**changed):
            return F.normalize(text_embedding(weights, tokens_T, vars(sizes) | changed)[None])

        close(found_BE, embedding())
        if usual is not None:
            differs(found_BE, embedding(**{key: usual}))

    EFFECTS[f"model.text.{key}"] = run


for key, value, usual in (
    ("width", 32, None),
    ("depth", 3, None),
    ("heads", 2, 4),
    ("vocab_size", 400, None),
    ("mlp_ratio", 3.0, None),
    ("rope_base", 3.0, 10000.0),
    ("norm_eps", 0.4, 1e-6),
):
    text_effect(key, value, usual)


@effect("model.text.max_tokens")
def max_tokens(lab):
    """Longer captions are cut."""
    chunks = lab.first("vit_contrastive", "model.text.max_tokens=3")[2].collated
    assert {length for chunk in chunks for length in chunk[1].segments.q_lengths_N} == {3}


@effect("model.text.folder")
def text_folder(lab):
    """A folder that is none is refused before anything is built."""
    try:
        find("contrastive").check_folders(settings("vit_contrastive", f"model.text.folder={lab.corpus}"))
    except ValueError as error:
        assert "model.text.folder" in str(error), error
    else:
        raise AssertionError("a folder without a model is taken")


@effect("model.embedding")
def embedding(lab):
    for recipe in ("vit_contrastive", "vit_omni"):
        tower = new_tower(settings(recipe, "model.embedding=40"))
        assert tower.pool.out.weight.shape == (40, 64) and tower.text.projection.weight.shape == (40, 64)


def mim(*overrides: str):
    config = settings("vit_mim", "model.encoder.rope_base=3.0", "model.encoder.norm_eps=0.2", *overrides)
    tower = new_tower(config, teacher_width=10)
    patches_NP, positions_N2 = image()
    mask_N = np.random.default_rng(0).random(len(patches_NP)) < 0.6
    with torch.no_grad():
        for module in tower.modules():
            if isinstance(module, nn.Module) and hasattr(module, "token"):
                module.token.normal_(generator=torch.Generator().manual_seed(1))
        found_MC = tower.predict(MaskedImages.of(packed([patches_NP.numpy()], [GRID]), mask_N))
    weights = {name: tensor.detach() for name, tensor in tower.named_parameters()}
    return config, weights, patches_NP, positions_N2, torch.from_numpy(mask_N), found_MC


@effect("objective.mim.decoder_width", "objective.mim.decoder_depth", "objective.mim.decoder_heads")
def mim_decoder(lab):
    """The decoder's formula, with rotary base and epsilon of the encoder, at sizes that are not the toy's."""
    for name, value in (("width", 48), ("depth", 2), ("heads", 4)):
        config, weights, patches_NP, positions_N2, mask_N, found_MC = mim(f"objective.mim.decoder_{name}={value}")
        sizes, encoder = config.objective.mim, vars(config.model.encoder)
        visible = (patches_NP[~mask_N], positions_N2[~mask_N], [int((~mask_N).sum())])
        x_VD = plain.vit(weights, "encoder.", *visible, encoder)
        rows_NQ = weights["mim.decoder.mask.token"].repeat(len(mask_N), 1)
        rows_NQ[~mask_N] = plain.linear(weights, "mim.decoder.enter", x_VD)
        decoder = {name: getattr(sizes, f"decoder_{name}") for name in ("width", "depth", "heads")}
        assert rows_NQ.shape[1] == decoder["width"]
        assert f"mim.decoder.blocks.{decoder['depth']}.qkv.weight" not in weights
        read_NQ = plain.trunk(weights, "mim.decoder.", rows_NQ, positions_N2, [len(mask_N)], encoder | decoder)
        read_MQ = read_NQ[mask_N]
        close(found_MC, plain.linear(weights, "mim.head", read_MQ))


@effect("objective.mim.masked")
def masked(lab):
    """With `token`, masked places go through the encoder as the token at position 0."""
    config, weights, patches_NP, positions_N2, mask_N, found_MC = mim("objective.mim.masked=token")
    x_ND = torch.where(
        mask_N[:, None],
        weights["mim.mask.token"],
        plain.embed(weights, "encoder.", patches_NP, vars(config.model.encoder)),
    )
    places_N2, sizes = positions_N2 * ~mask_N[:, None], vars(config.model.encoder)
    features_ND = plain.trunk(weights, "encoder.", x_ND, places_N2, [len(mask_N)], sizes)
    close(found_MC, plain.linear(weights, "mim.head", features_ND[mask_N]))
    assert not any(name.startswith("mim.decoder.") for name in weights)


@effect("objective.mim.mask_ratio")
def mask_ratio(lab):
    (chunk, _), *_ = lab.first("vit_mim", "objective.mim.mask_ratio=0.4")[2].collated
    masked_I = [part.sum() for part in chunk.mask_N.split(list(chunk.images.segments.q_lengths_N))]
    wanted_I = [np.floor(0.4 * patches + 0.5) for patches in chunk.images.segments.q_lengths_N]
    assert masked_I == wanted_I


@effect("objective.teacher")
def teacher(lab):
    """Its features are predicted: as many channels as it is wide."""
    stage, _, batch = lab.first("vit_mim")
    masked_images, target_MC = stage._objective.chunks(batch, CPU)[0].inputs
    assert target_MC.shape == (len(masked_images.masked_M), 32)
    assert stage._objective.tower.mim.head.out_features == 32


@effect("objective.contrastive.scale_init", "objective.contrastive.bias_init")
def contrastive_temperature(lab):
    overrides = ("objective.contrastive.scale_init=4.0", "objective.contrastive.bias_init=-3.0")
    scale, bias = new_tower(settings("vit_contrastive", *overrides)).contrastive.temperature()
    close(torch.stack([scale, bias]), torch.tensor([4.0, -3.0]))


@effect("objective.omni.scale_init", "objective.omni.bias_init")
def omni_temperatures(lab):
    overrides = ("objective.omni.scale_init=4.0", "objective.omni.bias_init=-3.0")
    temperatures = new_tower(settings("vit_omni", *overrides)).omni.temperatures.values()
    assert len(temperatures) == 3
    for temperature in temperatures:
        close(torch.stack(temperature()), torch.tensor([4.0, -3.0]))


@effect("objective.omni.decoder_width", "objective.omni.decoder_depth", "objective.omni.decoder_heads")
def omni_decoder(lab):
    overrides = [f"objective.omni.decoder_{name}" for name in ("width=48", "depth=2", "heads=3")]
    decoder = new_tower(settings("vit_omni", *overrides)).omni.reader.decoder
    assert decoder.tokens.weight.shape == (384, 48) and len(decoder.blocks) == 2
    assert decoder.head_width == 16 and all(block.qkv.heads == 3 for block in decoder.blocks)


@effect("norms of all towers")
def all_norms(lab):
    """Epsilon of every LayerNorm: the text encoder's own, or the encoder's."""
    for recipe in ("vit_mim", "vit_contrastive", "vit_omni"):
        tower = new_tower(settings(recipe, "model.encoder.norm_eps=0.2", "model.text.norm_eps=0.3"))
        for name, module in tower.named_modules():
            if isinstance(module, nn.LayerNorm):
                assert module.eps == (0.3 if name.startswith("text.") else 0.2), name


# ---- train and parallel ----------------------------------------------------------------------------------------------


@effect("train.seed")
def seed(lab):
    """First weights of both engines, and the order of the data."""
    seen = []
    for value in (0, 1):
        stage, prepared, _ = lab.first("stage1", f"train.seed={value}")
        weights = [weights_of(engine) for engine in stage.engines.by_name.values()]
        seen.append((*weights, prepared.plan.patches_I.tolist()))
    for mine, others in zip(*seen, strict=True):
        assert str(mine) != str(others)
    for mine, others in zip(seen[0][:2], seen[1][:2], strict=True):
        moved = [name for name in mine if mine[name].unique().numel() > 2]
        assert all(not torch.equal(mine[name], others[name]) for name in moved) and len(moved) > 8


@effect("train.precision")
def precision(lab):
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        _, engines = language(f"train.precision={name}")
        assert {parameter.dtype for parameter in engines.llm.chunks[0].parameters()} == {dtype}
        with torch.no_grad():
            assert engines.encoder.encode(packed(random_images([GRID]), [GRID])).dtype == dtype


@effect("train.deterministic", "train.recompute")
def flags_of_megatron(lab):
    config = language("train.deterministic=true", "train.recompute=selective")[1].llm.config
    assert config.deterministic_mode and config.recompute == "selective"
    config = language()[1].llm.config
    assert not config.deterministic_mode and config.recompute == "none"


@effect("train.trainable")
def trainable(lab):
    stage, *_ = lab.first("stage1", "train.trainable=[adapter,llm]")
    learning = {name for name, kind in whole_state(stage.engines.encoder) if kind == "exp_avg"}
    assert learning and {name.split(".")[0] for name in learning} == {"adapter"} and stage.engines.llm.trainable
    _, engines = language("train.trainable=[encoder,adapter]")
    assert not engines.llm.trainable and {kind for _, kind in whole_state(engines.llm)} == {"param"}


@effect("train.global_batch_size", "train.micro_batch_size", "train.seq_length")
def batch(lab):
    sizes = ("train.global_batch_size=6", "train.micro_batch_size=2", "train.seq_length=640")
    _, prepared, batch = lab.first("stage1", *sizes)
    assert len(batch.micro_batches) == 3 and batch.micro_batches[0].tokens_1T.shape == (1, 2 * 640)
    assert prepared.plan.seq_length == 640
    assert lab.first("vit_contrastive", "train.global_batch_size=5")[2].counts_W == [5]


@effect("parallel.compile")
def compiled(lab):
    for mode in ("always", "never"):
        language(f"parallel.compile={mode}")
        assert compilation.enabled(CPU) == (mode == "always")
    language()


@effect("parallel.attention")
def kernels_of_attention(lab):
    for name in ("sdpa", "auto"):
        language(f"parallel.attention={name}")
        assert attention._chosen == name
    refused("parallel.attention", "varlen", lambda: language("parallel.attention=varlen"))


@effect("parallel.kernels")
def kernels(lab):
    refused("parallel.kernels", "te", lambda: language("parallel.kernels=te"))
    assert language("parallel.kernels=torch")[1].llm.config.transformer_impl == "local"


def refused(key, value, build):
    try:
        build()
    except ValueError as error:
        assert f"{key}={value}" in str(error), error
    else:
        raise AssertionError(f"{key}={value} is taken")


@effect("parallel.encoder.zero_stage")
def zero_stage(lab):
    for stage in (1, 2, 3):
        engine = language(f"parallel.encoder.zero_stage={stage}")[1].encoder
        assert engine._run.zero_optimization_stage() == stage


@effect("parallel.encoder.chunk_patches")
def chunk_patches(lab):
    small, large = (lab.first("stage1", f"parallel.encoder.chunk_patches={most}")[2].chunks for most in (256, 512))
    assert len(small) > len(large)
    assert all(len(chunk.patches_NP) <= 256 for chunk in small) and any(len(c.patches_NP) > 256 for c in large)


@effect("parallel.encoder.recompute")
def recompute(lab):
    """What a tower keeps for its backward gets less; `replay` is the step's, whose tower keeps everything."""
    kept = {}
    for name in ("none", "full", "replay"):
        _, engines = language(f"parallel.encoder.recompute={name}")
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x):
            engines.encoder.encode(packed(random_images([GRID]), [GRID]))
        kept[name] = sum(saved)
    assert kept["full"] < kept["none"] == kept["replay"]


@effect("parallel.tp", "parallel.pp", "parallel.vpp", "parallel.ep", "parallel.etp", "parallel.cp")
def grid_of_the_llm(lab):
    """The layout has them, and Megatron-core's configuration has the layout's."""
    sizes = {"tp": 2, "pp": 2, "vpp": 2, "ep": 2, "etp": 1, "cp": 2}
    layout = settings("stage1", *(f"parallel.{key}={size}" for key, size in sizes.items())).layout(8)
    assert {key: getattr(layout, key) for key in sizes} == sizes and layout.dp == 1
    assert settings("stage1", "parallel.tp=2").layout(8).etp == 2


@effect("parallel.cp_comm_type", "parallel.balance_group_size", "parallel.sequence_parallel", "parallel.balance")
def divisions(lab):
    for name in ("a2a", "all_gather"):
        assert settings("stage1", "parallel.cp=2", f"parallel.cp_comm_type={name}").layout(2).cp_comm_type == name
    assert settings("stage1", "parallel.balance_group_size=2").layout(8).groups == 4
    config = settings("stage1", "parallel.tp=2", "parallel.sequence_parallel=false")
    refused("parallel.sequence_parallel", "false", lambda: check_config(config, 2))
    assert Layout(world=8).groups == 1
