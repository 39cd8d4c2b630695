"""Peak memory in benchmarks/gpu.py: real engines at full size on one GPU, beside the formulas of train/cost/memory.py.

The stage is what one rank of ep = 8 holds of four of the LLM's layers, from the middle of a pipeline, with optimizer.
"""

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core.utils import unwrap_model

from benchmarks import gpu_moe, gpu_tower
from benchmarks.gpu_measure import Place, Variant, Work
from benchmarks.workloads import language, tower
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.parallel.layout import Layout
from tandem.train.cost.memory import encoder_memory, stage_memory
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_recompute import RECOMPUTE
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers.vision_tower import VisionTower

ADAM = AdamSettings(lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
STAGE = LLMConfig(
    layers=4,
    width=5120,
    heads=32,
    kv_heads=8,
    head_width=128,
    vocab_size=131072,
    ffn_width=0,
    num_experts=16,
    top_k=8,
    expert_width=1920,
    shared_expert_width=0,
    aux_loss=1e-3,
    z_loss=1e-4,
    rope_base=1e6,
    norm_eps=1e-6,
    init_std=0.02,
)
ROW = 32768


def variants(place: Place, world: language.World) -> Iterator[Variant]:
    for recompute in ("none", "selective", "offload", "full"):
        yield encoder_row(place, recompute)
    for recompute in RECOMPUTE:
        yield stage_row(place, world, recompute)


def encoder_row(place: Place, recompute: str) -> Variant:
    """Encoder and adapter under the training engine, one chunk."""
    config, pack = gpu_tower.config_of(place), next(iter(gpu_tower.packs(place).values()))
    llm_width = STAGE.width if place.full else 64

    def build() -> Work:
        gpu_tower.choose(place)
        module = VisionTower(config, ConnectorConfig(), llm_width, recompute)
        initialize(module, seed=0)
        engine = EncoderEngine(
            module.to(place.device),
            dict(module.named_children()),
            zero_stage=1,
            precision="bf16" if place.dtype is torch.bfloat16 else "fp32",
            adam=ADAM,
        )
        images = pack.images(place.device)
        gradient_VE = tower.random_like((pack.patches // 4, llm_width), place.device, place.dtype)

        def step():
            engine.backward(engine.encode(images), gradient_VE)
            engine.squared_grad_norms()
            engine.step(1.0)

        formula = encoder_memory(
            config,
            ConnectorConfig(),
            llm_width,
            chunk_patches=pack.patches,
            chunks=1,
            recompute=recompute,
            zero_stage=1,
            world=1,
            element=place.dtype.itemsize,
        )
        return Work(step, tokens=pack.patches, formula_bytes=formula.total)

    return Variant("memory, encoder", f"recompute {recompute}", build)


def stage_row(place: Place, world: language.World, recompute: str) -> Variant:
    """One micro-batch through the stage under the training engine."""
    config, row = (STAGE, ROW) if place.full else (gpu_moe.TOY, 256)

    def build() -> Work:
        gpu_tower.choose(place)
        megatron = transformer_config(config, world.layout, dtype=place.dtype, recompute=recompute, deterministic=False)

        def middle(vp_stage, first, last):
            chunk = build_chunk(config, megatron, vp_stage=vp_stage, first=False, last=False).to(world.device)
            language.draw_weights(chunk, config.init_std)
            return chunk

        random = language.random_row(config, world, place.dtype, row, row)

        def forward(model, batch, leaf):
            unwrap_model(model).set_input_tensor(random.hidden_T1D)
            return model(tokens_1S=None, labels_1S=None, row=random.plan)

        def loss(output_T1D, batch):
            total = (output_T1D * random.gradient_T1D).sum()
            return total, total.detach()

        engine = LLMEngine(megatron, world.grid, build=middle, forward=forward, loss=loss, trainable=True, adam=ADAM)

        def step():
            engine.forward_backward([Batch(row)], [None], 1.0)
            random.hidden_T1D.grad = None
            engine.squared_grad_norm()
            engine.step(1.0)

        # the same layers as the middle third of a pipeline
        pipeline = dataclasses.replace(config, layers=3 * config.layers)
        formula = stage_memory(
            pipeline,
            Layout(world=3, pp=3),
            stage=1,
            row_tokens=row,
            micro_batches=1,
            recompute=recompute,
            element=place.dtype.itemsize,
        )
        flops = language.slice_flops(config, row, row)
        return Work(step, flops=flops, tokens=row, formula_bytes=formula.total)

    return Variant("memory, LLM stage", f"recompute {recompute}", build)


@dataclasses.dataclass(frozen=True)
class Batch:
    """What the engine asks a micro-batch."""

    row_tokens: int
