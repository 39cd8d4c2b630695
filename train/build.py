"""What computes in a run: world, grid, and the two engines with equal weights on every layout."""

import functools
import logging
import os
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tandem.parallel.comm.exchange import Exchange
from tandem.parallel.engines import llm_shards
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.parallel.grid import Grid, build_grid
from tandem.parallel.hybrid_step import Engines
from tandem.parallel.kernels import attention, compilation
from tandem.parallel.layout import Layout
from tandem.train.config.schema import Config, LrScaleConfig
from tandem.train.models.language import llm_spec
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers import vision_tower
from tandem.train.reliability.rendezvous import agent_store

CHOICES = logging.getLogger("tandem.parallel")  # where everything below it says once what it has chosen


def local_device() -> torch.device:
    """This process's GPU by LOCAL_RANK, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def start_world(device: torch.device) -> None:
    """Joins the world that torchrun describes, or makes a world of one; NCCL on CUDA, gloo on the CPU."""
    for key, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(key, value)
    if "MASTER_PORT" in os.environ:
        store = agent_store()
    else:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    where: dict[str, Any] = {
        "store": store,
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **(where if store else {}))


def settle_kernels(config: Config, device: torch.device) -> None:
    """Decides, for this process, how attention is computed and what is compiled; rank 0 tells what was chosen.

    Raises ValueError, naming the key, for kernels that are not to be had here.
    """
    if dist.get_rank() == 0 and not CHOICES.handlers:
        CHOICES.addHandler(logging.StreamHandler())
        CHOICES.setLevel(logging.INFO)
    compilation.configure(config.parallel.compile)
    compiled = "compiled" if compilation.enabled(device) else "not compiled"
    CHOICES.info("blocks and pointwise regions: %s (parallel.compile=%s)", compiled, config.parallel.compile)
    attention.choose(config.parallel.attention, device, config.train.dtype)


def build_engines(config: Config, layout: Layout, device: torch.device, *, forward, loss) -> Engines:
    """Grid, encoder engine and LLM engine of this rank (collective over the world).

    forward, loss: what the LLM's schedule runs, see `LLMEngine`; `train_forward` and `train_loss` in training.
    """
    settle_kernels(config, device)
    grid = build_grid(layout, device, config.train.seed)
    model = config.model
    tower = vision_tower.VisionTower(model.encoder, model.connector, model.llm.width, config.parallel.encoder.recompute)
    initialize(tower, config.train.seed)
    return Engines(
        grid=grid,
        encoder=build_encoder_engine(config, tower, device),
        llm=_llm_engine(config, grid, forward, loss),
        exchange=Exchange(grid.balance),
        width=model.llm.width,
    )


def build_encoder_engine(config: Config, tower: nn.Module, device: torch.device) -> EncoderEngine:
    """The engine of a tower whose children are its parts (collective over the world)."""
    parts = dict(tower.named_children())
    for name, part in parts.items():
        part.requires_grad_(name in config.train.trainable)
    return EncoderEngine(
        tower.to(device),
        parts,
        zero_stage=config.parallel.encoder.zero_stage,
        precision=config.train.precision,
        adam=_adam_settings(config),
        lr_scale=functools.partial(tower_lr_scale, config=config),
        ema=config.optim.ema,
    )


def tower_lr_scale(name: str, config: Config) -> float:
    """Factor of the learning rate of a tower's parameter: that of its part times that of its layer."""
    of_layer = layer_lr_scale(name, config.model.encoder.depth, config.optim.layer_decay)
    return config.optim.lr_scale.of(name.partition(".")[0]) * of_layer


def llm_lr_scale(name: str, scale: LrScaleConfig) -> float:
    """Factor of the learning rate of an LLM's parameter."""
    return scale.of("router" if ".router." in name else "llm")


def layer_lr_scale(name: str, depth: int, decay: float) -> float:
    """Factor of a parameter's learning rate: decay ** (layers of the encoder above it); 1 outside of the encoder.

    The patch embedding lies under all `depth` blocks, with positions, class token and the norm before them; the final
    norm lies above them (BEiT, Bao et al. 2022).
    """
    place = re.match(r"encoder\.(?:blocks\.(\d+)|(patch_embedding|positions|class_token|pre_norm))\.", name)
    if place is None:
        return 1.0
    return decay ** (depth + 1 if place[2] else depth - int(place[1]))


def _adam_settings(config: Config) -> AdamSettings:
    optim = config.optim
    first, second = optim.betas
    return AdamSettings(
        lr=optim.lr, betas=(first, second), eps=optim.eps, weight_decay=optim.weight_decay, name=optim.name
    )


def _llm_engine(config: Config, grid: Grid, forward, loss) -> LLMEngine:
    model = config.model.llm
    kernels = llm_spec.choose_kernels(config.parallel.kernels, grid.device)
    CHOICES.info("the LLM's layers: %s (parallel.kernels=%s)", kernels, config.parallel.kernels)
    megatron = llm_spec.transformer_config(
        model,
        grid.layout,
        dtype=config.train.dtype,
        recompute=config.train.recompute,
        deterministic=config.train.deterministic,
        kernels=kernels,
    )

    def build(vp_stage, first, last):
        chunk = llm_spec.build_chunk(model, megatron, vp_stage=vp_stage, first=first, last=last)
        llm_shards.initialize(chunk, config.train.seed, model.init_std, model.layers)
        return chunk

    return LLMEngine(
        megatron,
        grid,
        build=build,
        forward=forward,
        loss=loss,
        trainable="llm" in config.train.trainable,
        adam=_adam_settings(config),
        lr_scale=functools.partial(llm_lr_scale, scale=config.optim.lr_scale),
        bias_update=model.balance.bias_update,
    )
