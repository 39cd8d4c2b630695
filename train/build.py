"""What computes in a run: world, grid, and the two engines with equal weights on every layout."""

import logging
import os
import re

import torch
import torch.distributed as dist
from torch import nn

from parallel import attention, compilation, llm_shards
from parallel.encoder_engine import EncoderEngine
from parallel.exchange import Exchange
from parallel.grid import Grid, build_grid
from parallel.hybrid_step import Engines
from parallel.layout import Layout
from parallel.llm_engine import Leaf, LLMEngine
from parallel.state import AdamSettings
from train.batch import MicroBatch
from train.config import Config
from train.models import llm_spec, vision_tower
from train.models.initial import initialize
from train.rendezvous import agent_store

CHOICES = logging.getLogger("parallel")  # where everything below it says once what it has chosen


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
    where = {"store": store, "rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
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
        lr_scale=lambda name: layer_lr_scale(name, config.model.encoder.depth, config.optim.layer_decay),
        ema=config.optim.ema,
    )


def layer_lr_scale(name: str, depth: int, decay: float) -> float:
    """Factor of a parameter's learning rate: decay ** (layers of the encoder above it); 1 outside of the encoder.

    The patch embedding lies under all `depth` blocks, the final norm above them (BEiT, Bao et al. 2022).
    """
    place = re.match(r"encoder\.(?:blocks\.(\d+)|(patch_embedding))\.", name)
    if place is None:
        return 1.0
    return decay ** (depth + 1 if place[2] else depth - int(place[1]))


def _adam_settings(config: Config) -> AdamSettings:
    optim = config.optim
    return AdamSettings(
        lr=optim.lr, betas=tuple(optim.betas), eps=optim.eps, weight_decay=optim.weight_decay, name=optim.name
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
    )


def train_forward(chunk, batch: MicroBatch, leaf: Leaf | None) -> torch.Tensor:
    """Per-token losses [1, T] on the last stage, hidden states before."""
    return chunk(
        tokens_1S=batch.tokens_1T,
        labels_1S=batch.labels_1T,
        row=batch.row,
        visual_UD=leaf.rows_UD if leaf else None,
        at_U=leaf.at_U if leaf else None,
    )


def train_loss(losses_1T: torch.Tensor, batch: MicroBatch, domains: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over trained tokens, and the report: loss sum and trained tokens of every data domain, fp64 [2, domains]."""
    mask_1T = batch.loss_mask_1T
    total = (losses_1T.float() * mask_1T).sum()
    with torch.no_grad():
        domain_1T = batch.domain_1T.long().clamp(min=0)
        report_2X = losses_1T.new_zeros(2, domains, dtype=torch.float64)
        trained_1T = mask_1T.to(torch.float64)
        report_2X[0].index_add_(0, domain_1T[0], losses_1T.detach()[0].to(torch.float64) * trained_1T[0])
        report_2X[1].index_add_(0, domain_1T[0], trained_1T[0])
    return total, report_2X
