"""Encoder and adapter under DeepSpeed ZeRO 1, 2 or 3, data-parallel over the whole world.

    encode ... encode   backward ... backward   squared_grad_norms   step(scale) or discard

The gradient convention: gradients are summed over ranks and over calls, and whoever knows the joint norm of encoder and
LLM passes the clip coefficient to `step`.  DeepSpeed averages over ranks, clips by its own norm, decides when a step
ends and keeps checkpoints that fit one world size; this module, and no other, knows how it is kept from that (written
against DeepSpeed 0.19).  Stage 1 reduces once a step; stages 2 and 3 reduce in every `backward`.  Stage 3 gathers
weights module by module in the order of calls, so every rank makes the same calls, with blank input where it has none.
"""

import contextlib
import io
import math
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.state import KINDS, AdamSettings, StateChunk

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.utils import (
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)

BUCKET_NUMEL = 2**26  # gradients reduced in one collective
PERSISTENT_NUMEL = 8192  # stage 3 leaves smaller parameters (biases, norms) whole on every rank


class EncoderEngine:
    """A vision tower with sharded gradients, optimizer state and, at stage 3, weights.

    tower: its forward turns one chunk of images into rows [V, D]; rank 0's weights become everyone's.
    parts: disjoint modules of the tower, by their names in it, that hold all its trainable parameters; gradient norms
        are reported by part.  Parameters with requires_grad=False are frozen: no gradient, no optimizer state.
    precision: "fp32", or "bf16" for bf16 weights and activations with fp32 masters, reductions and accumulation.

    Raises ValueError for a stage, precision or set of parts that cannot be.
    """

    def __init__(
        self,
        tower: nn.Module,
        parts: Mapping[str, nn.Module],
        *,
        zero_stage: int,
        precision: str,
        adam: AdamSettings,
    ):
        _check(tower, parts, zero_stage, precision)
        self.part_names = list(parts)
        self._stage = zero_stage
        self._rank, self._world = dist.get_rank(), dist.get_world_size()
        self._parameters = dict(tower.named_parameters())
        self._device = next(iter(self._parameters.values())).device
        self._run: Callable = tower  # or, where something is trained, DeepSpeed's engine around it
        self._backwards = 0
        self._reduced = False
        groups, self._part_of_group = _parameter_groups(parts, adam.weight_decay)
        self.trainable = bool(groups)
        if self.trainable:
            self._initialize(tower, groups, precision, adam)
        else:
            _prepare_frozen(tower, precision)

    def _initialize(self, tower: nn.Module, groups: list[dict], precision: str, adam: AdamSettings) -> None:
        fused = self._device.type == "cuda"
        self._adam = torch.optim.AdamW(groups, lr=adam.lr, betas=adam.betas, eps=adam.eps, fused=fused)
        numel = sum(parameter.numel() for group in groups for parameter in group["params"])
        _prepare_environment(self._device)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use; warnings go to a log that stays
            self._run, *_ = deepspeed.initialize(
                model=tower, optimizer=self._adam, config=_config(self._stage, precision, numel)
            )
        self._zero = self._run.optimizer
        self._run.set_gradient_accumulation_boundary(False)  # until `_reduce` says so
        self._create_state(fused)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def encode(self, *inputs: Any) -> torch.Tensor:
        """Rows [V, D] of one chunk, in the tower's own dtype, with a graph unless autograd is off."""
        return self._run(*inputs)

    def backward(self, rows_VD: torch.Tensor, gradient_VD: torch.Tensor) -> None:
        """Adds the parameter gradients of one `encode` to those of this step; any order of encodes and backwards."""
        if not self.trainable:
            return
        assert not self._reduced, "backward after squared_grad_norms: the step must end first"
        self._zero.clear_backward_seen_flag()  # DeepSpeed does so in each forward, and expects its backward to follow
        rows_VD.backward(gradient_VD.to(rows_VD.dtype))
        self._backwards += 1

    def squared_grad_norms(self) -> torch.Tensor:
        """This rank's share of each part's squared gradient norm, fp64 [parts]; the sum over the world is the whole.

        Ends the accumulation of the step.  Where a gradient is not finite anywhere, that sum is not finite either.
        """
        squares = torch.zeros(len(self.part_names), dtype=torch.float64, device=self._device)
        if self._backwards:
            self._reduce()
            for part, gradients in zip(self._part_of_group, self._gradients(), strict=True):
                for gradient in gradients:
                    squares[part] += torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        return squares * self._world**2

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Multiplies all gradients by `scale`, updates the weights and clears the gradients.

        Without any `backward` since the last step there is no gradient, and nothing changes.
        """
        if not self._backwards:
            return
        self._reduce()
        for gradients in self._gradients():
            torch._foreach_mul_(list(gradients), scale * self._world)
        self._zero.step()
        if self._zero.overflow:
            raise RuntimeError("DeepSpeed refused an update: step() was called although a gradient is not finite")
        self._clear()

    def discard(self) -> None:
        """Clears the gradients without an update."""
        if not self._backwards:
            return
        if self._stage == 3:
            self._zero.averaged_gradients = {}
        elif not isinstance(self._zero, BF16_Optimizer):
            for group in range(len(self._part_of_group)):
                self._zero.averaged_gradients[group] = None
                self._zero.all_grad_tensors[group] = None
        self._clear()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        if self.trainable:
            for group in self._adam.param_groups:
                group["lr"] = lr

    def _reduce(self) -> None:
        """Finishes what an accumulation boundary finishes in DeepSpeed: the mean over ranks, sharded over them."""
        if self._reduced:
            return
        self._run.set_gradient_accumulation_boundary(True)
        if self._stage == 1:
            self._run.allreduce_gradients()
        else:
            self._zero.finalize_gradient_accumulation_boundary()
        self._run.set_gradient_accumulation_boundary(False)
        self._reduced = True

    def _gradients(self) -> list[list[torch.Tensor]]:
        """This rank's disjoint pieces of the mean gradient, by parameter group."""
        if isinstance(self._zero, BF16_Optimizer):  # DeepSpeed's choice at stage 1 with bf16 weights
            return [[gradient] for gradient in self._zero.fp32_groups_gradient_flat_partition]
        return [self._zero.averaged_gradients[group] for group in range(len(self._part_of_group))]

    def _clear(self) -> None:
        self._zero.zero_grad()
        self._backwards, self._reduced = 0, False

    # ---- state by names ----------------------------------------------------------------------------------------------

    @property
    def optimizer_steps(self) -> int:
        """Adam's step count, for its bias correction; 0 where nothing is trained."""
        return int(self._adam.state[self._masters()[0]]["step"]) if self.trainable else 0

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for master in self._masters() if self.trainable else []:
            self._adam.state[master]["step"].fill_(steps)

    def state(self) -> Iterator[StateChunk]:
        """Weights (fp32) and, where trained, Adam moments that this rank saves: views of live memory where they can be.

        Over the ranks every entry comes once.  No collective: this is on the way of the training loop.
        """
        for index, (name, parameter) in enumerate(self._parameters.items()):
            shape = _whole_shape(parameter)
            for kind in KINDS if parameter.requires_grad else KINDS[:1]:
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

    @torch.no_grad()
    def load(self, read: Callable, optimizer: bool, parts: Collection[str] | None = None) -> None:
        """Takes weights, and with `optimizer` the moments, from read(name, kind, start, shape) -> CPU tensor.

        parts: those to load, None for all (collective).
        """
        if self._stage == 3 and self.trainable:
            self._zero._partition_all_parameters()
        for name, parameter in self._parameters.items():
            if parts is not None and name.split(".")[0] not in parts:
                continue
            shape = _whole_shape(parameter)
            for kind in KINDS if optimizer and parameter.requires_grad else KINDS[:1]:
                self._put(parameter, kind, read(name, kind, (0,) * len(shape), shape))
        if self.trainable:
            self._refresh_weights()

    def _mine(self, index: int, parameter: nn.Parameter, kind: str) -> tuple[int, torch.Tensor]:
        """The run of a parameter's entries that this rank saves: where it begins, and the entries, flat."""
        numel = math.prod(_whole_shape(parameter))
        if _is_sharded(parameter):
            shard = parameter.ds_tensor.numel()  # the last one, or more, are padded
            begin = min(self._rank * shard, numel)
            if not parameter.requires_grad:
                mine = parameter.ds_tensor.detach().float()
            elif kind == "param":
                mine = safe_get_local_fp32_param(parameter)
            else:
                mine = safe_get_local_optimizer_state(parameter, kind)
            return begin, mine.flatten()[: max(0, min(shard, numel - begin))]
        if not parameter.requires_grad:
            whole = parameter.detach().float().flatten()
            return 0, whole if index % self._world == self._rank else whole[:0]
        fragment = parameter._hp_mapping
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
            numel = parameter.ds_tensor.numel()
            mine = value.flatten()[self._rank * numel : (self._rank + 1) * numel]
            mine = nn.functional.pad(mine, (0, numel - mine.numel()))
            set_local = safe_set_local_fp32_param if kind == "param" else safe_set_local_optimizer_state
            set_local(parameter, mine, *(() if kind == "param" else (kind,)))

    def _refresh_weights(self) -> None:
        """Makes the weights that the tower computes with those of the fp32 masters."""
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        for group in range(len(self._masters())):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        if self._zero.persistent_parameters:
            self._zero.persistent_parameters[0].all_gather(self._zero.persistent_parameters)

    def _masters(self) -> list[torch.Tensor]:
        """The flat fp32 shard of each parameter group that Adam updates."""
        if self._stage == 3:
            return self._zero.fp32_partitioned_groups_flat
        if isinstance(self._zero, BF16_Optimizer):
            return self._zero.fp32_groups_flat_partition
        return self._zero.single_partition_of_fp32_groups

    def _create_state(self, fused: bool) -> None:
        """torch's AdamW has no state before its first step; saving and loading need it."""
        for master in self._masters():
            self._adam.state[master] = {
                "step": torch.zeros((), device=master.device if fused else "cpu"),
                "exp_avg": torch.zeros_like(master),
                "exp_avg_sq": torch.zeros_like(master),
            }
        if self._stage < 3:
            self._zero._lazy_init_hp_params_optimizer_state()


def _check(tower: nn.Module, parts: Mapping[str, nn.Module], zero_stage: int, precision: str) -> None:
    if zero_stage not in (1, 2, 3):
        raise ValueError(f"parallel.encoder.zero_stage={zero_stage}: must be 1, 2 or 3")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"train.precision={precision}: must be fp32 or bf16")
    owners = [id(parameter) for part in parts.values() for parameter in part.parameters()]
    if len(owners) != len(set(owners)):
        raise ValueError(f"parts {', '.join(parts)} share parameters: a part's norm must count its own alone")
    for name, parameter in tower.named_parameters():
        if parameter.requires_grad and id(parameter) not in owners:
            raise ValueError(f"trainable parameter {name} is in none of the parts {', '.join(parts)}")


def _parameter_groups(parts: Mapping[str, nn.Module], weight_decay: float) -> tuple[list[dict], list[int]]:
    """AdamW's groups, by part and by weight decay (biases and norms have none), and the part of each group."""
    groups, part_of_group = [], []
    for part, module in enumerate(parts.values()):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if parameter.dim() > 1]
        vectors = [parameter for parameter in trained if parameter.dim() <= 1]
        for parameters, decay in ((matrices, weight_decay), (vectors, 0.0)):
            if parameters:
                groups.append({"params": parameters, "weight_decay": decay})
                part_of_group.append(part)
    return groups, part_of_group


def _config(stage: int, precision: str, numel: int) -> dict:
    zero = {"stage": stage, "reduce_bucket_size": min(BUCKET_NUMEL, numel)}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMEL
        zero["stage3_max_reuse_distance"] = 0  # who asks for stage 3 wants the memory
        zero["sub_group_size"] = 2**62  # one shard a parameter group, as in the other stages
    elif not (stage == 1 and precision == "bf16"):
        zero["compute_grad_norm"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,  # the default clips
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16", "check_grad_overflow": False},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "timers": {"throughput": {"enabled": False}},  # it synchronises the device in every forward
    }


def _prepare_environment(device: torch.device) -> None:
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    if device.type == "cpu":  # else initialize compiles a C++ collective, which takes a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    for old in ("all_gather_into_tensor", "reduce_scatter_tensor"):  # names before torch 2.13, used in every step
        warnings.filterwarnings("ignore", f".*torch.distributed.{old}. is deprecated", FutureWarning)


def _prepare_frozen(tower: nn.Module, precision: str) -> None:
    """What DeepSpeed does to weights, for a tower that it has nothing to do for."""
    for parameter in tower.parameters():
        if precision == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
        dist.broadcast(parameter.data, src=0)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def _whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
