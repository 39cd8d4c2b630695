"""A tower (encoder and what is trained with it) under DeepSpeed ZeRO 1, 2 or 3, data-parallel over the whole world.

    encode ... encode   backward ... backward   squared_grad_norms   step(scale) or discard

The gradient convention: gradients are summed over ranks and over calls, and whoever knows the joint norm of all that is
trained passes the clip coefficient to `step`.  DeepSpeed averages over ranks, clips by its own norm, decides when a
step ends, updates group by group and keeps checkpoints that fit one world size; this module and `encoder_state.py`, and
no other, know how it is kept from that (written against DeepSpeed 0.19).  Stage 1 reduces once a step; stages 2 and 3
reduce in every `backward`.  Stage 3 gathers weights module by module in the order of calls, so every rank makes the
same calls, with blank input where it has none.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from tandem.parallel.engines.state import AdamSettings, StateChunk

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported

import deepspeed
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import partitioned_param_coordinator
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from tandem.parallel.engines import optimizers
from tandem.parallel.engines.encoder_state import EncoderState, instead_of_waiting

ZERO_SUPPORTED_OPTIMIZERS.append(optimizers.Lamb)  # the others it knows

BUCKET_NUMEL = 2**26  # gradients reduced in one collective
PERSISTENT_NUMEL = 8192  # stage 3 leaves smaller parameters (biases, norms) whole on every rank


class EncoderEngine:
    """A tower with sharded gradients, optimizer state and, at stage 3, weights.

    tower: its forward turns one chunk of input into a tensor or a tuple of tensors; rank 0's weights become everyone's.
    parts: disjoint modules of the tower, by their names in it, that hold all its trainable parameters; gradient norms
        are reported by part.  Parameters with requires_grad=False are frozen: no gradient, no optimizer state.
    precision: "fp32", or "bf16" for bf16 weights and activations with fp32 masters, reductions and accumulation.
    lr_scale: factor of the learning rate by a parameter's name in the tower (None: 1), and so of the weight decay,
        which is learning rate times decay.
    ema: highest decay of an average of the trained weights, in fp32 and sharded like Adam's moments; 0 for none.

    Raises ValueError for a stage, precision, set of parts, parameter or average that cannot be.
    """

    def __init__(
        self,
        tower: nn.Module,
        parts: Mapping[str, nn.Module],
        *,
        zero_stage: int,
        precision: str,
        adam: AdamSettings,
        lr_scale: Callable[[str], float] | None = None,
        ema: float = 0.0,
    ):
        _check(tower, parts, zero_stage, precision, ema)
        self.part_names = list(parts)
        self._stage = zero_stage
        self._world = dist.get_world_size()
        parameters = dict(tower.named_parameters())
        self._device = next(iter(parameters.values())).device
        self._run: Any = tower  # or, where something is trained, DeepSpeed's engine around it
        self._zero: Any = None  # DeepSpeed's optimizer
        self._backwards = 0
        self._reduced = False
        groups, self._part_of_group = _parameter_groups(tower, parts, adam, lr_scale)
        self.trainable = bool(groups)
        if self.trainable:
            self._initialize(tower, groups, precision, adam)
        else:
            _prepare_frozen(tower, precision)
        self._state = EncoderState(parameters, self._zero, zero_stage, ema)

    def _initialize(self, tower: nn.Module, groups: list[dict], precision: str, adam: AdamSettings) -> None:
        self._adam = optimizers.build(groups, adam, self._device)
        numel = sum(parameter.numel() for group in groups for parameter in group["params"])
        _prepare_environment(self._device)
        tower.register_forward_hook(_computed)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its memory use; warnings go to a log that stays
            self._run, *_ = deepspeed.initialize(
                model=tower, optimizer=self._adam, config=_config(self._stage, precision, numel)
            )
        self._zero = self._run.optimizer
        self._run.set_gradient_accumulation_boundary(False)  # until `_reduce` says so

    # ---- one step ----------------------------------------------------------------------------------------------------

    def encode(self, *inputs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """What the tower's forward makes of one chunk, with a graph unless autograd is off.

        In the tower's own dtype, unless the tower says otherwise.
        """
        return self._run(*inputs)

    def backward(
        self,
        outputs: torch.Tensor | Sequence[torch.Tensor],
        gradients: torch.Tensor | Sequence[torch.Tensor | None],
    ) -> None:
        """Adds the parameter gradients of one `encode` to those of this step; any order of encodes and backwards.

        gradients: of each output, cast to its dtype; None where none flows, on every rank for the same outputs.  An
        output that hangs on no trained weight takes none either.  A parameter that none reaches in a whole step has a
        gradient of zero in it: Adam's moments decay, and so does the weight.
        """
        if not self.trainable:
            return
        assert not self._reduced, "backward after squared_grad_norms: the step must end first"
        pairs = zip(_several(outputs), _several(gradients), strict=True)
        given = [(output, gradient) for output, gradient in pairs if gradient is not None]
        flowing = [(output, gradient.to(output.dtype)) for output, gradient in given if output.requires_grad]
        assert flowing or not given, "backward of outputs without a graph"
        if not flowing:
            return
        self._zero.clear_backward_seen_flag()  # DeepSpeed does so in each forward, and expects its backward to follow
        with self._ordered():
            roots, seeds = zip(*flowing, strict=True)
            torch.autograd.backward(roots, seeds)  # one call: DeepSpeed takes a gradient once a backward
        self._backwards += 1

    def squared_grad_norms(self) -> torch.Tensor:
        """This rank's share of each part's squared gradient norm, fp64 [parts]; the sum over the world is the whole.

        Ends the accumulation of the step.  Where a gradient is not finite anywhere, that sum is not finite either.
        """
        squares = torch.zeros(len(self.part_names), dtype=torch.float64, device=self._device)
        if self._backwards:
            self._reduce()
            for part, gradients in zip(self._part_of_group, self._gradients(), strict=True):
                norms = torch._foreach_norm(gradients, dtype=torch.float64)
                squares[part] += torch.stack(norms).square().sum()
        return squares * self._world**2

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Multiplies all gradients by `scale`, updates the weights and their average and clears the gradients.

        Without any gradient given to `backward` since the last step nothing changes.
        """
        if not self._backwards:
            return
        self._reduce()
        gradients = [_flat(pieces) for pieces in self._gradients()]
        torch._foreach_mul_(gradients, scale * self._world)  # in DeepSpeed's own memory; `discard` clears that
        self._state.update(gradients)
        self.discard()

    def discard(self) -> None:
        """Clears the gradients without an update."""
        if not self._backwards:
            return
        if self._stage == 3:
            self._zero.averaged_gradients = {}
            # DeepSpeed overwrites it by a step's first backward, but only where that has a gradient: what it leaves
            # would pass for a gradient of the next step
            self._zero.grad_partitions_flat_buffer.zero_()
        elif not isinstance(self._zero, BF16_Optimizer):
            for group in range(len(self._part_of_group)):
                self._zero.averaged_gradients[group] = None
                self._zero.all_grad_tensors[group] = None
        self._zero.zero_grad()
        self._backwards, self._reduced = 0, False

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step, where its factor is 1."""
        if self.trainable:
            for group in self._adam.param_groups:
                group["lr"] = lr * group["lr_scale"]

    @contextlib.contextmanager
    def _ordered(self) -> Iterator[None]:
        """Keeps DeepSpeed from stopping the host at the end of a backward of stage 2 or 3.

        It waits there, on the host, until its stream of reductions is through, so that what follows may read and free
        what they write.  All of that is in stream order: that the current stream waits is enough.
        """
        if self._device.type != "cuda" or self._stage == 1:
            yield
            return
        if self._stage == 2:
            reductions, waits_on = self._zero.reduction_stream, deepspeed.get_accelerator()
        else:
            reductions = waits_on = self._zero.reduce_and_partition_stream
        with instead_of_waiting(waits_on, lambda: torch.cuda.current_stream().wait_stream(reductions)):
            yield

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

    # ---- state by names ----------------------------------------------------------------------------------------------

    @property
    def optimizer_name(self) -> str | None:
        """Which implementation updates the weights; None where nothing is trained."""
        return optimizers.name_of(self._adam) if self.trainable else None

    @property
    def optimizer_steps(self) -> int:
        """Updates so far, as Adam counts them for its bias correction; 0 where nothing is trained."""
        return self._state.optimizer_steps

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        self._state.optimizer_steps = steps

    def state(self) -> Iterator[StateChunk]:
        """Weights (fp32) and, where trained, Adam moments and averaged weights that this rank saves: views of live
        memory where they can be.

        Over the ranks every entry comes once.  No collective: this is on the way of the training loop.
        """
        return self._state.chunks()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters, the same on every rank."""
        return self._state.shapes()

    def load(
        self,
        read: Callable[..., torch.Tensor],
        optimizer: bool,
        parts: Collection[str] | None = None,
        has_ema: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Takes weights, and with `optimizer` the moments, from read(name, kind, start, shape) -> CPU tensor.

        parts: those to load, None for all.  has_ema: whether `read` knows the average of a parameter, by its name;
        where it does not, and this engine keeps one, the average starts from the weights.  Collective.
        """
        self._state.load(read, optimizer, parts, has_ema)


def _check(tower: nn.Module, parts: Mapping[str, nn.Module], zero_stage: int, precision: str, ema: float) -> None:
    if zero_stage not in (1, 2, 3):
        raise ValueError(f"parallel.encoder.zero_stage={zero_stage}: must be 1, 2 or 3")
    if precision not in ("fp32", "bf16"):
        raise ValueError(f"train.precision={precision}: must be fp32 or bf16")
    if not 0 <= ema < 1:
        raise ValueError(f"optim.ema={ema}: must be 0 for no average of the weights, or a decay below 1")
    owners = [id(parameter) for part in parts.values() for parameter in part.parameters()]
    if len(owners) != len(set(owners)):
        raise ValueError(f"parts {', '.join(parts)} share parameters: a part's norm must count its own alone")
    for name, parameter in tower.named_parameters():
        if not parameter.dim():
            raise ValueError(f"parameter {name} has no dimension, which DeepSpeed cannot broadcast: give it shape [1]")
        if parameter.requires_grad and id(parameter) not in owners:
            raise ValueError(f"trainable parameter {name} is in none of the parts {', '.join(parts)}")


def _parameter_groups(
    tower: nn.Module, parts: Mapping[str, nn.Module], adam: AdamSettings, lr_scale: Callable[[str], float] | None
) -> tuple[list[dict], list[int]]:
    """The optimizer's groups, by part, weight decay and factor of the learning rate; and the part of each group.

    Biases, norms, tokens and scalars, whatever is longer than 1 in one dimension at most, have no weight decay and, in
    LAMB, no step in proportion to their norm.
    """
    names = {id(parameter): name for name, parameter in tower.named_parameters()}
    members: dict[tuple[int, bool, float], list[nn.Parameter]] = {}
    for part, module in enumerate(parts.values()):
        for parameter in module.parameters():
            if parameter.requires_grad:
                vector = sum(size > 1 for size in parameter.shape) <= 1
                factor = 1.0 if lr_scale is None else float(lr_scale(names[id(parameter)]))
                members.setdefault((part, vector, factor), []).append(parameter)
    groups = [
        {
            "params": members[part, vector, factor],
            "weight_decay": 0.0 if vector else adam.weight_decay,
            "lr": adam.lr * factor,
            "lr_scale": factor,
            "adapt": not vector,
        }
        for part, vector, factor in sorted(members)
    ]
    return groups, [part for part, _, _ in sorted(members)]


def _config(stage: int, precision: str, numel: int) -> dict:
    zero = {"stage": stage, "reduce_bucket_size": min(BUCKET_NUMEL, numel)}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = PERSISTENT_NUMEL
        zero["stage3_max_reuse_distance"] = 0  # who asks for stage 3 wants the memory
        zero["sub_group_size"] = 2**62  # one shard a parameter group, as in the other stages
    # Stages 2 and 3 reduce a bucket while the backward fills the next one.  Stage 1 has nothing to overlap with: it
    # reduces once a step, after the last backward.
    zero["overlap_comm"] = stage > 1
    return {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "bf16": {"enabled": precision == "bf16"},
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
    # Stage 3 broadcasts rank 0's order of modules and reads it back from the device whenever that order is not that of
    # the call before, as between an encode and a backward, so in every step.  All ranks make the same calls.
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda ints: None


def _prepare_frozen(tower: nn.Module, precision: str) -> None:
    """What DeepSpeed does to weights, for a tower that it has nothing to do for."""
    for parameter in tower.parameters():
        if precision == "bf16":
            parameter.data = parameter.data.to(torch.bfloat16)
        dist.broadcast(parameter.data, src=0)


def _computed(tower: nn.Module, inputs: tuple, outputs: Any) -> Any:
    """A forward hook: views in the place of outputs that are parameters themselves.

    DeepSpeed clears old gradients in a hook of computed outputs, which for a bare parameter comes after its new one.
    """
    several = outputs if isinstance(outputs, tuple) else (outputs,)
    if not any(isinstance(output, nn.Parameter) for output in several):
        return outputs
    views = tuple(output.view_as(output) if isinstance(output, nn.Parameter) else output for output in several)
    return views if isinstance(outputs, tuple) else views[0]


def _flat(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """All entries, in order: the pieces' own memory where they lie there one after the other, else a copy.

    DeepSpeed has one flat buffer a group at stages 1 and 2 with bf16 weights, and one for all groups at stage 3; at
    stages 1 and 2 with fp32 weights a piece may lie anywhere.
    """
    first, memory = pieces[0], pieces[0].untyped_storage().data_ptr()
    begins = [piece.data_ptr() for piece in pieces]
    ends = [piece.data_ptr() + piece.nbytes for piece in pieces]
    if begins[1:] == ends[:-1] and all(p.is_contiguous() and p.untyped_storage().data_ptr() == memory for p in pieces):
        return first.as_strided((sum(piece.numel() for piece in pieces),), (1,))
    return torch.cat([piece.flatten() for piece in pieces])


Part = TypeVar("Part", torch.Tensor, torch.Tensor | None)


def _several(tensors: torch.Tensor | Sequence[Part]) -> Sequence[torch.Tensor | Part]:
    return [tensors] if isinstance(tensors, torch.Tensor) else tensors
