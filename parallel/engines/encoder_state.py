"""Weights, Adam moments and averaged weights of a tower under DeepSpeed ZeRO, found by the parameters' names.

    stages 1, 2   a group's parameters flat, one after the other    [ rank 0 | rank 1 | ... padding ]
    stage 3       each parameter by itself                          [ rank 0 | rank 1 | ... padding ]

A rank's shard of a parameter group, flat and fp32, is that group's *master*; the optimizer updates it and keeps its
moments beside it.  The average of the weights, ema = decay * ema + (1 - decay) * weight after each update, is one more
entry beside those: no optimizer nor DeepSpeed reads it, and DeepSpeed's own map from parameters to masters finds it.

DeepSpeed's own step would update group by group, each with a collective of LAMB's, and look at the gradients' norm on
the host; `update` does without.
Written, as `encoder_engine.py` is, against DeepSpeed 0.19.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import nn

from tandem.parallel.engines import optimizers
from tandem.parallel.engines.state import EMA, KINDS, StateChunk


class EncoderState:
    """What is saved of a tower, and put back.

    parameters: of the tower, by name.  zero: DeepSpeed's optimizer around ours, None where nothing is trained.
    ema: highest decay of the average of the weights, 0 for no average.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], zero: Any, zero_stage: int, ema: float):
        self._parameters, self._zero, self._stage, self._ema = parameters, zero, zero_stage, ema
        self._device = next(iter(parameters.values())).device
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._masters = [] if zero is None else self._find_masters()
        self._steps = 0
        if zero is not None:
            self._create()

    @property
    def optimizer_steps(self) -> int:
        """Updates so far, as Adam counts them for its bias correction; 0 where nothing is trained."""
        return self._steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        if self._masters:
            self._steps = steps
            optimizers.set_steps(self._zero.optimizer, steps)

    @torch.no_grad()
    def update(self, gradients: Sequence[torch.Tensor]) -> None:
        """One update by the flat gradients of the masters, of those, the weights and their average (collective).

        The n-th update's decay is min(ema, (1 + n) / (10 + n)), as in TensorFlow's ExponentialMovingAverage: without
        that, the weights that a short run began with would outweigh all that it learnt.
        """
        for master, gradient_N in zip(self._masters, gradients, strict=True):
            master.grad = gradient_N
        self._zero.optimizer.step()
        for master in self._masters:
            master.grad = None
        self._steps += 1  # the optimizer's own count went up with the update
        if self._ema:
            decay = min(self._ema, (1 + self._steps) / (10 + self._steps))
            averages = [self._zero.optimizer.state[master][EMA] for master in self._masters]
            torch._foreach_lerp_(averages, self._masters, 1 - decay)
        self._drop_gathered()
        self._refresh_weights()

    def chunks(self) -> Iterator[StateChunk]:
        """Weights (fp32) and, where trained, moments and average that this rank saves: views of live memory where they
        can be.  Over the ranks every entry comes once; the kinds of a tensor are cut alike.  No collective.
        """
        for index, (name, parameter) in enumerate(self._parameters.items()):
            shape = _whole_shape(parameter)
            for kind in self._kinds(parameter):
                begin, tensor_N = self._mine(index, parameter, kind)
                if tensor_N.numel():
                    yield StateChunk(
                        name=name,
                        kind=kind,
                        shape=shape,
                        local_shape=shape,
                        pieces=(),
                        begin=begin,
                        tensor_N=tensor_N,
                    )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Whole shapes of all parameters."""
        return {name: _whole_shape(parameter) for name, parameter in self._parameters.items()}

    @torch.no_grad()
    def load(
        self,
        read: Callable[..., torch.Tensor],
        optimizer: bool,
        parts: Collection[str] | None,
        has_ema: Callable[[str], bool],
    ) -> None:
        """As `EncoderEngine.load` says."""
        if self._zero is not None:
            self._drop_gathered()
        for name, parameter in self._parameters.items():
            if parts is not None and name.split(".")[0] not in parts:
                continue
            shape = _whole_shape(parameter)
            for kind in self._kinds(parameter):
                if kind in KINDS[1:] and not optimizer:
                    continue
                source = "param" if kind == EMA and not has_ema(name) else kind
                self._put(parameter, kind, read(name, source, (0,) * len(shape), shape))
        if self._zero is not None:
            self._refresh_weights()

    def _kinds(self, parameter: nn.Parameter) -> tuple[str, ...]:
        if not parameter.requires_grad:
            return KINDS[:1]
        return (*KINDS, EMA) if self._ema else KINDS

    def _mine(self, index: int, parameter: nn.Parameter, kind: str) -> tuple[int, torch.Tensor]:
        """The run of a parameter's entries that this rank saves: where it begins, and the entries, flat."""
        numel = math.prod(_whole_shape(parameter))
        if _is_sharded(parameter):
            held = _held(parameter)
            shard = held.numel()  # the last one, or more, are padded
            begin = min(self._rank * shard, numel)
            if not parameter.requires_grad:
                mine = held.detach().float()
            elif kind == "param":
                mine = safe_get_local_fp32_param(parameter)
            else:
                mine = safe_get_local_optimizer_state(parameter, kind)
            return begin, mine.flatten()[: max(0, min(shard, numel - begin))]
        if not parameter.requires_grad:
            whole = parameter.detach().float().flatten()
            return 0, whole if index % self._world == self._rank else whole[:0]
        fragment = parameter._hp_mapping  # type: ignore[attr-defined]  # set by DeepSpeed
        if fragment is None:
            return 0, torch.empty(0)
        return fragment.lp_fragment_address.start, fragment.get_hp_fragment(None if kind == "param" else kind).detach()

    def _put(self, parameter: nn.Parameter, kind: str, value: torch.Tensor) -> None:
        value = value.to(self._device)
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=_is_sharded(parameter)):
                parameter.data.copy_(value)
        elif not _is_sharded(parameter):
            set_full = safe_set_full_fp32_param if kind == "param" else safe_set_full_optimizer_state
            set_full(parameter, value, *(() if kind == "param" else (kind,)))
        else:
            # DeepSpeed's setter of whole tensors fails at stage 3 where their size does not divide by the world's
            numel = _held(parameter).numel()
            mine = value.flatten()[self._rank * numel : (self._rank + 1) * numel]
            mine = nn.functional.pad(mine, (0, numel - mine.numel()))
            set_local = safe_set_local_fp32_param if kind == "param" else safe_set_local_optimizer_state
            set_local(parameter, mine, *(() if kind == "param" else (kind,)))

    def _drop_gathered(self) -> None:
        """Stage 3 keeps no weight that it gathered, which would be an old one after an update."""
        if self._stage == 3:
            self._zero._partition_all_parameters()

    def _refresh_weights(self) -> None:
        """Makes the weights that the tower computes with those of the fp32 masters."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._masters)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            # the current stream waits for these gathers; DeepSpeed has the host wait for the device as well
            with instead_of_waiting(deepspeed.get_accelerator(), lambda: None):
                self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)
        # what the current stream has written is read by gathers on a stream of their own; there is none on a CPU
        gathers = self._zero.parameter_offload._DeepSpeedZeRoOffload__allgather_stream
        if gathers is not None:
            gathers.wait_stream(torch.cuda.current_stream())

    def _find_masters(self) -> list[torch.Tensor]:
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        if isinstance(self._zero, BF16_Optimizer):
            return self._zero.fp32_groups_flat_partition
        return self._zero.single_partition_of_fp32_groups

    def _create(self) -> None:
        optimizer = self._zero.optimizer
        for group, master in zip(optimizer.param_groups, self._masters, strict=True):
            group["params"] = [master]  # stage 3 has them there only while it steps
        optimizers.create_state(optimizer)
        if self._ema:
            for master in self._masters:
                optimizer.state[master][EMA] = master.detach().clone()
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()
        if isinstance(optimizer, optimizers.Lamb):
            optimizer.place(self._runs(), len(self._parameters), dist.group.WORLD)

    def _runs(self) -> dict[torch.Tensor, list[optimizers.Run]]:
        """Which run of each master is which parameter, by the parameter's place in the tower."""
        runs: dict[torch.Tensor, list[optimizers.Run]] = {master: [] for master in self._masters}
        for index, parameter in enumerate(self._parameters.values()):
            if not parameter.requires_grad:
                continue
            _, mine_N = self._mine(index, parameter, "param")
            if mine_N.numel():
                master = next(m for m in self._masters if _holds(m, mine_N))
                begin = (mine_N.data_ptr() - master.data_ptr()) // master.element_size()
                runs[master].append(optimizers.Run(index, begin, mine_N.numel()))
        return runs


@contextlib.contextmanager
def instead_of_waiting(waits_on: Any, order: Callable[[], None]) -> Iterator[None]:
    """Calls `order`, which puts streams in order, where DeepSpeed calls `waits_on.synchronize` and stops the host."""
    waits_on.synchronize = lambda device_index=None: order()
    try:
        yield
    finally:
        del waits_on.synchronize


def _held(parameter: nn.Parameter) -> torch.Tensor:
    """This rank's part of a parameter that ZeRO-3 shards."""
    return parameter.ds_tensor  # type: ignore[attr-defined]  # set by DeepSpeed


def _holds(whole_N: torch.Tensor, part_M: torch.Tensor) -> bool:
    """Whether a part begins in the memory of a whole, which may itself be part of a buffer shared with others."""
    return whole_N.data_ptr() <= part_M.data_ptr() < whole_N.data_ptr() + whole_N.nbytes


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
