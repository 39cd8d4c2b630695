"""Process groups of both grids, built once; with the LLM engine, the only reader of Megatron-core's global state."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

from tandem.parallel.layout import Coordinates, Layout

PATIENCE = timedelta(hours=2)  # of threads that wait while the others still write a checkpoint


@dataclass(frozen=True)
class Grid:
    """This rank's place and its process groups.

    balance: the ranks among which images move.  control: gloo over the world, for plans and flags; text: gloo over the
    ranks of this replica that need token ids, None elsewhere; the prefetch thread alone uses both.
    saving: gloo over the world with the patience that writing a checkpoint takes.
    """

    layout: Layout
    rank: int
    place: Coordinates
    device: torch.device
    balance: dist.ProcessGroup | None
    control: dist.ProcessGroup
    text: dist.ProcessGroup | None
    saving: dist.ProcessGroup

    @property
    def is_first_stage(self) -> bool:
        return self.place.pp == 0


def build_grid(layout: Layout, device: torch.device, seed: int) -> Grid:
    """Builds every process group of `layout`; needs an initialised world of `layout.world` ranks (collective).

    seed: of Megatron-core's random states, which its tensor-parallel layers want even where nothing is drawn.
    """
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    rank = dist.get_rank()
    place = layout.coordinates(rank)
    seen = Coordinates(
        tp=parallel_state.get_tensor_model_parallel_rank(),
        cp=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_rank(),
        pp=parallel_state.get_pipeline_model_parallel_rank(),
    )
    assert seen == place, f"Megatron-core seats rank {rank} at {seen}, the layout at {place}"
    patient: dict[str, Any] = {"backend": "gloo", "timeout": PATIENCE}
    return Grid(
        layout=layout,
        rank=rank,
        place=place,
        device=device,
        balance=_group_of(rank, [layout.group_ranks(group) for group in range(layout.groups)]),
        control=dist.new_group(**patient),
        text=_group_of(rank, [layout.text_ranks(replica) for replica in range(layout.dp)], **patient),
        saving=dist.new_group(**patient),
    )


def _group_of(rank: int, groups: list[list[int]], **options) -> dist.ProcessGroup | None:
    """The group of ranks that `rank` is in, None if it is in none; all are built (collective over the world)."""
    handles = [dist.new_group(ranks, **options) for ranks in groups]
    return next((handle for handle, ranks in zip(handles, groups, strict=True) if rank in ranks), None)


def destroy_grid() -> None:
    """Forgets Megatron-core's parallel state, so that a test can build another grid in the same process."""
    parallel_state.destroy_model_parallel()
    get_moe_layer_wise_logging_tracker().clear()  # which has as many layers as the first model
