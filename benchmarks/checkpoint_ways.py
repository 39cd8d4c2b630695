"""The ways to save a checkpoint that benchmarks/checkpoint.py compares: tandem's, torch's (DCP) and Megatron-core's.

Each is given the same tensors of the same rank.  Plans of what is written where are cached by all peers that offer it,
as the structure of a checkpoint never changes here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)

# isort: split
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

from tandem.parallel.hybrid_step import Engines
from tandem.train.checkpoints.saving import Saver

START_INTERPRETERS = ("DCP async, process", "Megatron async, lasting process")  # one per rank, seconds each


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Way:
    """save: writes to a new, empty folder; returns when training may go on.  after_step: what a training loop calls
    after every step.  wait: returns when the checkpoint is complete and flushed.  close: at the end.
    """

    save: Callable[[int, str], None]
    wait: Callable[[], None] = _nothing
    after_step: Callable[[], None] = _nothing
    close: Callable[[], None] = _nothing


def ways_to_save(engines: Engines, folder: Path) -> dict[str, Way]:
    """All of them, by the names of the table; `save` takes the number of the save and the folder."""
    chunks = [*engines.encoder.state(), *engines.llm.state()]
    rank = engines.grid.rank
    tensors = {f"{rank}/{chunk.name}/{chunk.kind}": chunk.tensor_N for chunk in chunks}
    identity = {"task": "language", "trainable": ["encoder", "adapter", "llm"], "optimizer": "adamw"}
    saver = Saver(folder / "tandem", engines, **identity, tokenizer={}, architecture={}, keep=1, keep_every=0)
    return {
        "no save": Way(lambda number, path: None),
        "tandem": Way(lambda number, path: saver.save(number, {}), lambda: saver.wait() and None),
        "DCP": Way(lambda number, path: dcp.save(tensors, checkpoint_id=path, planner=_planner())),
        "DCP async, thread": dcp_async(tensors, engines, AsyncCheckpointerType.THREAD),
        "DCP async, process": dcp_async(tensors, engines, AsyncCheckpointerType.PROCESS),
        "Megatron": megatron(tensors),
        "Megatron async, forked process": megatron_async(tensors, persistent=False),
        "Megatron async, lasting process": megatron_async(tensors, persistent=True),
    }


def _planner() -> DefaultSavePlanner:
    return DefaultSavePlanner(enable_plan_caching=True)


def dcp_async(tensors: dict[str, torch.Tensor], engines: Engines, kind: AsyncCheckpointerType) -> Way:
    """torch's `async_save`: a copy of the tensors, then a thread or a process per rank that writes."""
    futures = []

    def save(number: int, path: str) -> None:
        group = engines.grid.control
        futures.append(
            dcp.async_save(
                tensors, checkpoint_id=path, process_group=group, planner=_planner(), async_checkpointer_type=kind
            )
        )

    return Way(save, lambda: futures.pop().result() and None)


def megatron(tensors: dict[str, torch.Tensor]) -> Way:
    strategy, sharded = _strategy(), _sharded(tensors)
    return Way(lambda number, path: dist_checkpointing.save(sharded, path, strategy))


def megatron_async(tensors: dict[str, torch.Tensor], persistent: bool) -> Way:
    """Megatron-core's asynchronous save, which every rank completes from its loop.

    persistent: one process per rank for all saves, instead of a fork per save.  On a GPU that process copies tensors to
    the host before `save` returns.  CPU tensors it shares, and writes them while training changes them: its time here
    lacks the copy.
    """
    strategy, sharded, calls = _strategy(), _sharded(tensors), AsyncCallsQueue(persistent)

    def save(number: int, path: str) -> None:
        request = dist_checkpointing.save(
            sharded, path, strategy, validate_access_integrity=number < 2, async_sharded_save=True
        )
        calls.schedule_async_request(request)

    return Way(
        save,
        wait=lambda: calls.maybe_finalize_async_calls(blocking=True) and None,
        after_step=lambda: calls.maybe_finalize_async_calls(blocking=False) and None,
        close=calls.close,
    )


def _strategy() -> TorchDistSaveShardedStrategy:
    return TorchDistSaveShardedStrategy("torch_dist", 1, cached_metadata=True)


def _sharded(tensors: dict[str, torch.Tensor]) -> dict[str, ShardedTensor]:
    return {key: ShardedTensor.from_rank_offsets(key, tensor) for key, tensor in tensors.items()}
