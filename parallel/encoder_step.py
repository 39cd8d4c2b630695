"""One training step of the encoder alone, with an objective where the hybrid step has the LLM.

    encode chunks -> objective over the world's outputs -> encoder backward, chunk by chunk -> update

The objective sees the outputs of all of this rank's chunks as detached leaves and may communicate (a contrastive loss
does); its gradients then drive the backward of each chunk, the same number of chunks on every rank.

Legend: R rows of one output over all chunks, N rows of it in one chunk.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.grid import Grid
from tandem.parallel.hybrid_step import StepOutput, reduce_step_stats, update
from tandem.parallel.runtime.phases import PhaseTimer

Outputs = tuple[torch.Tensor, ...]
Objective = Callable[..., tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class EncoderEngines:
    """The encoder with its heads, and nothing else."""

    grid: Grid
    encoder: EncoderEngine

    @property
    def by_name(self) -> dict[str, EncoderEngine]:
        return {"encoder": self.encoder}


@dataclass(frozen=True)
class Chunk:
    """inputs: of one call of the tower.  counts: whether its outputs do; those of a blank chunk, which a rank encodes
    that has nothing more, do not."""

    inputs: tuple[Any, ...]
    counts: bool


def encoder_step(
    engines: EncoderEngines,
    chunks: Sequence[Chunk],
    objective: Objective,
    *,
    clip_norm: float,
    replay: bool,
    stop: bool,
    timer: PhaseTimer,
    accept: Callable[[float, float], bool],
) -> StepOutput:
    """Runs one training step (collective over the world).

    The tower's outputs are scalars, equal in every call, and tensors of rows.  objective(*leaves) gets each scalar once
    and each row tensor over all chunks [R, ...]; it returns this rank's share of the loss, of which the sum over the
    world is the loss, and numbers to report by name, the same names on all ranks, of which the sum is meant too.
    Other arguments: as of `hybrid_step`.
    """
    encoder = engines.encoder
    with timer.phase("encode"), torch.set_grad_enabled(not replay):
        kept = [_as_tuple(encoder.encode(*chunk.inputs)) for chunk in chunks]
    leaves = _leaves(kept, chunks)
    if replay:
        kept = []
    with timer.phase("objective"):
        share, report = objective(*leaves)
        share.backward()
    with timer.phase("encoder_backward"):
        gradients = _gradients(leaves)
        for index, chunk in enumerate(chunks):
            outputs = kept[index] if kept else _as_tuple(encoder.encode(*chunk.inputs))
            if kept:
                kept[index] = ()  # its graph is freed as soon as its backward is through
            encoder.backward(outputs, _of_chunk(outputs, gradients, first=index == 0, counts=chunk.counts))
    with timer.phase("update"):
        numbers = torch.stack([share.detach().double(), *(value.detach().double() for value in report.values())])
        stats = reduce_step_stats(encoder.part_names, encoder.squared_grad_norms(), numbers, stop)
        loss, *values = stats.report
        total, applied = update([encoder], loss, stats.norms, clip_norm, accept)
    values = dict(zip(report, values, strict=True))
    return StepOutput(values, loss, total, stats.norms, applied, stats.stop, stats.memory_bytes)


def _as_tuple(outputs: torch.Tensor | Outputs) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _leaves(kept: Sequence[Outputs], chunks: Sequence[Chunk]) -> list[torch.Tensor]:
    """Every output over all chunks, without its graph."""
    leaves = []
    for parts in zip(*kept, strict=True):
        if parts[0].dim() == 0:
            leaf = parts[0].detach().clone()
        else:
            rows = [part.detach() for part, chunk in zip(parts, chunks, strict=True) if chunk.counts]
            leaf = torch.cat([parts[0].detach()[:0], *rows])
        leaves.append(leaf.requires_grad_())
    return leaves


def _gradients(leaves: Sequence[torch.Tensor]) -> list[list]:
    """[gradient of each leaf, rows of it that chunks have taken]."""
    return [[torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, 0] for leaf in leaves]


def _of_chunk(outputs: Outputs, gradients: list[list], first: bool, counts: bool) -> Outputs:
    """The gradients of one chunk's outputs; chunks come in order."""
    mine = []
    for output, place in zip(outputs, gradients, strict=True):
        gradient, taken = place
        if output.dim() == 0:
            mine.append(gradient if first else torch.zeros_like(gradient))
        elif counts:
            mine.append(gradient[taken : taken + len(output)])
            place[1] = taken + len(output)
        else:
            mine.append(torch.zeros_like(output))
    return tuple(mine)
