"""One training step of encoder and LLM on the same ranks, in the five phases of docs/architecture.md.

    plan -> encode -> deliver -> LLM schedule -> return and update

The plan is made ahead on the CPU (`parallel.routes`).  The LLM sees visual rows as detached leaves; their gradients
travel home and drive the encoder's backward, chunk by chunk, the same number of chunks on every rank.  One gradient
scale (1 / trained tokens of the global batch) and one clip norm over both modules are computed here, by neither
library; both optimizers step or neither does.

Legend: V visual rows this rank encodes, U rows this rank's leaves hold, D LLM width.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from parallel.encoder_engine import EncoderEngine
from parallel.exchange import Exchange
from parallel.grid import Grid
from parallel.llm_engine import Leaf, LLMEngine
from parallel.phases import PhaseTimer
from parallel.routes import Routes
from parallel.transfer import host_to_device


@dataclass(frozen=True)
class Engines:
    """The two halves of the model and the way between them."""

    grid: Grid
    encoder: EncoderEngine
    llm: LLMEngine
    exchange: Exchange
    width: int

    @property
    def by_name(self) -> dict[str, EncoderEngine | LLMEngine]:
        """The engines that train and save, by the names that checkpoints know them by."""
        return {"encoder": self.encoder, "llm": self.llm}


@dataclass(frozen=True)
class StepInput:
    """One planned step of this rank.

    chunks: encoder input of each chunk (a blank one where the rank has no image); chunk_rows: visual rows that count in
    each chunk (0 for a blank); micro_batches: in order; trained_tokens: of the whole global batch.
    """

    routes: Routes
    chunks: list
    chunk_rows: list[int]
    micro_batches: list
    trained_tokens: int


@dataclass(frozen=True)
class StepOutput:
    """reports: of the micro-batches, on last-stage ranks.  loss: mean over the trained tokens of the global batch.
    Norms are of the whole gradients before clipping; `applied` is False where every rank skipped the update; stop: any
    rank wished to stop."""

    reports: list
    loss: float
    grad_norm: float
    part_norms: dict[str, float]
    applied: bool
    stop: bool


def hybrid_step(
    engines: Engines,
    batch: StepInput,
    *,
    clip_norm: float,
    replay: bool,
    stop: bool,
    timer: PhaseTimer,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: True,
) -> StepOutput:
    """Runs one training step (collective over the world).

    clip_norm: joint gradient norm above which both modules' gradients are scaled down; 0 turns clipping off.
    replay: encode without autograd first, and again chunk by chunk in the backward (memory of one chunk).
    stop: this rank's wish to stop, which travels with the norms.
    A step without a trained token changes nothing either.
    accept: whether to update, from the loss and the gradient norm, which are equal on all ranks; asked where both are
    finite, because no step with a non-finite value anywhere is ever applied.
    """
    encoder, llm, exchange = engines.encoder, engines.llm, engines.exchange

    with timer.phase("encode"):
        kept, rows_VD = encode(engines, batch, keep=not replay)

    with timer.phase("deliver"):
        leaf_UD = exchange.deliver(rows_VD, batch.routes)
        leaves = split_leaves(engines.grid, leaf_UD, batch.routes, requires_grad=True)

    with timer.phase("llm"):
        reports = llm.forward_backward(batch.micro_batches, leaves, 1.0 / max(batch.trained_tokens, 1))

    with timer.phase("return"):
        grad_UD = llm.leaf_gradient(leaves, leaf_UD)
        del leaves, leaf_UD
        grad_VD = exchange.give_back(grad_UD, batch.routes)
    with timer.phase("encoder_backward"):
        _encoder_backward(encoder, batch, kept, grad_VD)

    with timer.phase("update"):
        grid, loss = engines.grid, torch.zeros((), dtype=torch.float64, device=engines.grid.device)
        if reports and grid.place.tp == 0:  # ranks of a tensor-parallel group hold equal reports
            loss = torch.stack([report[0].sum() for report in reports]).sum() / max(batch.trained_tokens, 1)
        squares = torch.cat([encoder.squared_grad_norms(), llm.squared_grad_norm().double()[None]])
        loss, norms, stop = agree([*encoder.part_names, "llm"], squares, loss, stop)
        learnt = batch.trained_tokens > 0  # else an update would be weight decay and momentum alone
        total, applied = update([encoder, llm], loss, norms, clip_norm, lambda *said: learnt and accept(*said))
    return StepOutput(reports, loss, total, norms, applied, stop)


@torch.no_grad()
def forward_only(engines: Engines, batch: StepInput) -> list:
    """Loss reports of one planned step without gradients (collective over the world)."""
    _, rows_VD = encode(engines, batch, keep=False)
    leaf_UD = engines.exchange.deliver(rows_VD, batch.routes)
    leaves = split_leaves(engines.grid, leaf_UD, batch.routes, requires_grad=False)
    return engines.llm.forward_backward(batch.micro_batches, leaves, 1.0, forward_only=True)


def encode(engines: Engines, batch: StepInput, *, keep: bool) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Encodes this rank's chunks; returns (outputs with their graphs if `keep`, detached rows that count [V, D])."""
    with torch.set_grad_enabled(keep):
        outputs = [engines.encoder.encode(chunk) for chunk in batch.chunks]
    rows = [output.detach()[:count] for output, count in zip(outputs, batch.chunk_rows, strict=True)]
    empty_0D = torch.zeros(0, engines.width, device=engines.grid.device, dtype=rows[0].dtype if rows else None)
    return outputs if keep else [], torch.cat([empty_0D, *rows])


def split_leaves(grid: Grid, leaf_UD: torch.Tensor, routes: Routes, *, requires_grad: bool) -> list[Leaf | None]:
    """One leaf a micro-batch on first-stage ranks, zero rows included, so that a frozen LLM still has a graph."""
    if not grid.is_first_stage:
        return [None] * len(routes.leaf_rows_M)
    at_U = host_to_device(routes.at_U, leaf_UD.device)
    rows = leaf_UD.detach().split(routes.leaf_rows_M)
    places = at_U.split(routes.leaf_rows_M)
    return [Leaf(r.requires_grad_(requires_grad), at) for r, at in zip(rows, places, strict=True)]


def _encoder_backward(encoder: EncoderEngine, batch: StepInput, kept: list, grad_VD: torch.Tensor) -> None:
    place = 0
    for index, (chunk, count) in enumerate(zip(batch.chunks, batch.chunk_rows, strict=True)):
        output = kept[index] if kept else encoder.encode(chunk)
        if kept:
            kept[index] = None  # its graph is freed as soon as its backward is through
        gradient = torch.zeros_like(output)
        gradient[:count] = grad_VD[place : place + count]
        encoder.backward(output, gradient)
        place += count


def agree(
    names: Sequence[str], squares_P: torch.Tensor, loss: torch.Tensor, stop: bool
) -> tuple[float, dict[str, float], bool]:
    """What decides about the update, over the world: the loss, the gradient norm of every part, both non-finite where
    any value is; and whether any rank would stop.  One reduction for all of it.

    names: of the parts whose squared norms, this rank's share of them fp64 [P], are given.  loss: this rank's share.
    """
    flags = torch.stack([loss.double(), torch.full_like(loss, float(stop), dtype=torch.float64)])
    sums = torch.cat([squares_P, flags])
    dist.all_reduce(sums)
    *squares, loss, wishes = sums.tolist()
    return loss, {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}, wishes > 0


def update(
    engines: Sequence[EncoderEngine | LLMEngine],
    loss: float,
    norms: Mapping[str, float],
    clip_norm: float,
    accept: Callable[[float, float], bool],
) -> tuple[float, bool]:
    """Updates all engines or none; (joint gradient norm before clipping, whether they were updated)."""
    total = math.hypot(*norms.values())
    applied = math.isfinite(loss) and math.isfinite(total) and accept(loss, total)
    scale = min(1.0, clip_norm / (total + 1e-6)) if clip_norm > 0 else 1.0
    for engine in engines:
        if applied:
            engine.step(scale)
        else:
            engine.discard()
    return total, applied
