"""One training step of encoder and LLM on the same ranks, in the five phases of docs/architecture.md.

    plan -> encode -> dispatch -> LLM schedule -> combine and update

The plan is made ahead on the CPU (`parallel.plan.routes`).  Rows travel chunk by chunk, each while the next one is
encoded.  The LLM sees them as detached leaves; their gradients travel back and drive the encoder's backward, each
chunk's while the backward of the one before runs, the same number of chunks on every rank.  One gradient scale (1 /
trained tokens of the global batch) and one clip norm over both modules are computed here, by neither library; both
optimizers step or neither does.  The host waits for the device in one place, `reduce_step_stats`.

Legend: V visual rows of a chunk, N rows of its output, U rows this rank's leaves hold, D LLM width, R reported numbers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from tandem.parallel.comm.exchange import Dispatch, DispatchPlan, Exchange
from tandem.parallel.engines.balance import ExpertBalance, ExpertLoad
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.llm_engine import Leaf, LLMEngine
from tandem.parallel.grid import Grid
from tandem.parallel.runtime.phases import PhaseTimer


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

    chunks: encoder input of each chunk (a blank one where the rank has no image); micro_batches: in order;
    trained_tokens: of the whole global batch.
    """

    dispatch_plan: DispatchPlan
    chunks: list
    micro_batches: list
    trained_tokens: int


@dataclass(frozen=True)
class StepOutput:
    """Equal on all ranks.  report: what the micro-batches or the objective report, summed over the world.  loss: mean
    over the trained tokens of the global batch.  Norms are of the whole gradients before clipping; `applied` is False
    where every rank skipped the update; stop: any rank wished to stop.  memory_bytes: most that was ever allocated on
    the device of a rank, None on a CPU; experts: None without experts."""

    report: Any
    loss: float
    grad_norm: float
    part_norms: dict[str, float]
    applied: bool
    stop: bool
    memory_bytes: int | None = None
    experts: ExpertLoad | None = None


@dataclass(frozen=True)
class StepStats:
    """What the host has to know of a step before it updates, over the world.

    norms: gradient norm of every part.  report: sums of what is reported, the loss among it.  stop: whether any rank
    would stop.  experts: what `ExpertBalance.load` reads.  memory_bytes: as of StepOutput.
    """

    norms: dict[str, float]
    report: list[float]
    stop: bool
    experts: list[float]
    memory_bytes: int | None


def hybrid_step(
    engines: Engines,
    batch: StepInput,
    *,
    report_shape: tuple[int, ...],
    clip_norm: float,
    replay: bool,
    stop: bool,
    timer: PhaseTimer,
    accept: Callable[[float, float], bool] = lambda loss, grad_norm: True,
) -> StepOutput:
    """Runs one training step (collective over the world).

    report_shape: of a micro-batch's report, whose first row holds its summed loss; the output's is their sum, fp64.
    clip_norm: joint gradient norm above which both modules' gradients are scaled down; 0 turns clipping off.
    replay: encode without autograd first, and again chunk by chunk in the backward (memory of one chunk).
    stop: this rank's wish to stop, which travels with the norms.
    A step without a trained token changes nothing either.
    accept: whether to update, from the loss and the gradient norm, which are equal on all ranks; asked where both are
    finite, because no step with a non-finite value anywhere is ever applied.
    """
    encoder, llm, exchange = engines.encoder, engines.llm, engines.exchange

    with timer.phase("encode"):
        kept, dispatch = encode(engines, batch, keep=encoder.trainable and not replay)

    with timer.phase("dispatch"):
        leaf_UD = dispatch.leaves()
        leaves = split_leaves(engines.grid, leaf_UD, batch.dispatch_plan, requires_grad=True)

    with timer.phase("llm"):
        reports = llm.forward_backward(batch.micro_batches, leaves, 1.0 / max(batch.trained_tokens, 1))

    with timer.phase("combine"):
        grad_UD = llm.leaf_gradient(leaves, leaf_UD)
        del leaves, leaf_UD
        gradients = exchange.combine(grad_UD, batch.dispatch_plan) if encoder.trainable else None
    with timer.phase("encoder_backward"):
        if gradients is not None:
            _encoder_backward(encoder, batch.chunks, kept, gradients)

    with timer.phase("update"):
        report = torch.zeros(report_shape, dtype=torch.float64, device=engines.grid.device)
        if reports and engines.grid.place.tp == 0:  # ranks of a tensor-parallel group hold equal reports
            report += torch.stack(reports).sum(dim=0)
        squares = torch.cat([encoder.squared_grad_norms(), llm.squared_grad_norm()[None]])
        names = [*encoder.part_names, "llm"]
        stats = reduce_step_stats(names, squares, report.flatten(), stop, balance=llm.balance)
        summed = np.array(stats.report).reshape(report_shape)
        loss = float(summed[0].sum()) / max(batch.trained_tokens, 1)
        learnt = batch.trained_tokens > 0  # else an update would be weight decay and momentum alone
        total, applied = update([encoder, llm], loss, stats.norms, clip_norm, lambda *said: learnt and accept(*said))
    experts = None
    if llm.balance is not None:
        experts = llm.balance.load(stats.experts, len(batch.micro_batches) * engines.grid.layout.dp)
    return StepOutput(summed, loss, total, stats.norms, applied, stats.stop, stats.memory_bytes, experts)


@torch.no_grad()
def forward_only(engines: Engines, batch: StepInput) -> list:
    """Loss reports of one planned step without gradients (collective over the world)."""
    _, dispatch = encode(engines, batch, keep=False)
    leaves = split_leaves(engines.grid, dispatch.leaves(), batch.dispatch_plan, requires_grad=False)
    return engines.llm.forward_backward(batch.micro_batches, leaves, 1.0, forward_only=True)


def encode(engines: Engines, batch: StepInput, *, keep: bool) -> tuple[list[torch.Tensor], Dispatch]:
    """Encodes this rank's chunks and sends each off; (outputs with their graphs if `keep`, the rows under way)."""
    kept, dispatch = [], engines.exchange.dispatch(batch.dispatch_plan)
    with torch.set_grad_enabled(keep):
        for chunk in batch.chunks:
            output_ND = _encoded(engines.encoder, chunk)
            dispatch.send(output_ND.detach())
            if keep:
                kept.append(output_ND)
    return kept, dispatch


def _encoded(encoder: EncoderEngine, chunk: Any) -> torch.Tensor:
    output_ND = encoder.encode(chunk)
    assert isinstance(output_ND, torch.Tensor), "encoder and adapter have one output"
    return output_ND


def split_leaves(
    grid: Grid, leaf_UD: torch.Tensor, dispatch_plan: DispatchPlan, *, requires_grad: bool
) -> list[Leaf | None]:
    """One leaf a micro-batch on first-stage ranks, zero rows included, so that a frozen LLM still has a graph."""
    if not grid.is_first_stage:
        return [None] * len(dispatch_plan.at_MU)
    rows_MUD = leaf_UD.detach().split([len(at_U) for at_U in dispatch_plan.at_MU])
    return [Leaf(r.requires_grad_(requires_grad), at) for r, at in zip(rows_MUD, dispatch_plan.at_MU, strict=True)]


def _encoder_backward(
    encoder: EncoderEngine, chunks: list, kept: list, gradients: Iterator[tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """kept: outputs with their graphs, empty where chunks are encoded again.  gradients: as `Exchange.combine`."""
    for index, chunk in enumerate(chunks):
        output_ND = kept[index] if kept else _encoded(encoder, chunk)
        if kept:
            kept[index] = None  # its graph is freed as soon as its backward is through
        place_V, got_VD = next(gradients)
        gradient_ND = torch.empty_like(output_ND)
        gradient_ND[len(place_V) :] = 0  # rows that nobody took: padding, or a blank chunk
        encoder.backward(output_ND, gradient_ND.index_copy_(0, place_V, got_VD))


def reduce_step_stats(
    names: Sequence[str],
    squares_P: torch.Tensor,
    report_R: torch.Tensor,
    stop: bool,
    balance: ExpertBalance | None = None,
) -> StepStats:
    """Sums over the world, non-finite where any value is.

    One reduction and one read for all of it: the only place in a step where the host waits for the device.  What the
    experts counted is made a few numbers by layer before that.
    names: of the parts; squares_P: this rank's share of their squared norms, report_R: of the report, both fp64.
    """
    counts = report_R[:0] if balance is None else balance.take()
    memory_W = report_R[:0]
    if report_R.is_cuda:
        memory_W = report_R.new_zeros(dist.get_world_size())
        memory_W[dist.get_rank()] = torch.cuda.max_memory_allocated()
    shares = [squares_P, report_R, report_R.new_full((1,), float(stop)), memory_W, counts]
    sums = torch.cat(shares)
    dist.all_reduce(sums)
    *sums, memory_W, counts = sums.split([len(share) for share in shares])
    read = [*sums, memory_W.amax(0, keepdim=True) if report_R.is_cuda else memory_W]
    read.append(counts if balance is None else balance.digest(counts))
    numbers = iter(torch.cat(read).tolist())
    squares, report, (wishes,), memory, experts = (list(islice(numbers, len(part))) for part in read)
    norms = {name: math.sqrt(square) for name, square in zip(names, squares, strict=True)}
    return StepStats(norms, report, wishes > 0, experts, int(memory[0]) if memory else None)


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
