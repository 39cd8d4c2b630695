"""AdamW and LAMB on flat fp32 shards: the fastest form that is installed, state before a first step, step counts.

    AdamW    w -= lr * (m / (sqrt(v) + eps) + decay * w)
    LAMB     u  = m / (sqrt(v) + eps) + decay * w        w -= lr * |w| / |u| * u

with m and v corrected for their start at zero (Loshchilov and Hutter 2019; You et al. 2020, algorithm 2).  LAMB's norms
are those of a whole parameter, and an optimizer under ZeRO holds flat shards that cut parameters:

    rank 0   [ a a a a | b b ]        rank 1   [ b b b | c c c ]        |b|^2 = sum over its two runs, over the ranks
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tandem.parallel.engines.state import AdamSettings

try:  # NVIDIA's Apex with its CUDA kernels; the package of that name on PyPI is another one, without these
    import amp_C  # noqa: F401
    from apex.optimizers import FusedAdam as ApexAdam
except ImportError:
    ApexAdam = None

NAMES = ("adamw", "lamb")


@dataclass(frozen=True)
class Run:
    """Entries begin .. begin + length of a shard: this rank's part of parameter number `parameter`."""

    parameter: int
    begin: int
    length: int

    def of(self, shard_N: torch.Tensor) -> torch.Tensor:
        return shard_N[self.begin : self.begin + self.length]


class Lamb(torch.optim.Optimizer):
    """LAMB with the norms of whole parameters, wherever their shards lie.

    groups: as of AdamW, and `adapt`: whether the step follows the parameters' norms (True).  Without, the update is
    AdamW's: for biases, norms and learned vectors, which Apex's FusedLAMB leaves unadapted too.  Gradients are not
    clipped here: whoever knows the joint norm of all that is trained has done it.

    Apex's FusedLAMB is not used where it is installed: it takes each tensor that it is given for one parameter, so that
    on shards the ratio would be one of whatever parameters happen to share a shard, and change with the world size.
    """

    def __init__(self, groups: list[dict], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float):
        super().__init__(
            groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": True, "step": 0}
        )
        self._cuts: list[tuple[int, int, Run]] = []

    def place(
        self, runs: Mapping[torch.Tensor, Sequence[Run]], parameters: int, ranks: dist.ProcessGroup | None
    ) -> None:
        """Says which runs of a shard are which parameters, of `parameters` that all of `ranks` number alike.

        At most one run of a parameter on a rank.  To be called once the shards are there and before the first step.
        """
        self._cuts = [
            (group, place, run)
            for group, settings in enumerate(self.param_groups)
            if settings["adapt"]
            for place, shard_N in enumerate(settings["params"])
            for run in runs[shard_N]
        ]
        self._numbers = torch.tensor([run.parameter for *_, run in self._cuts], dtype=torch.long, device=self._device)
        self._parameters, self._ranks = parameters, ranks

    @property
    def _device(self) -> torch.device:
        return self.param_groups[0]["params"][0].device

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure would compute gradients again
        """One update of all shards from their gradients, after `create_state` and `place` (collective over the ranks).

        Overwrites the gradients with the updates, which are all needed before the first is applied.  One all-reduce of
        two numbers a parameter; nothing waits for the device.
        """
        updates = [self._update(group) for group in self.param_groups]
        self._adapt(updates)
        for group, of_group in zip(self.param_groups, updates, strict=True):
            torch._foreach_add_(group["params"], of_group, alpha=-group["lr"])

    def _update(self, group: dict) -> list[torch.Tensor]:
        """Moves the moments of a group; AdamW's update of each shard, as the formula above has it, in its gradient."""
        group["step"] += 1
        beta1, beta2 = group["betas"]
        shards = group["params"]
        gradients = [shard_N.grad for shard_N in shards]
        means = [self.state[shard_N]["exp_avg"] for shard_N in shards]
        squares = [self.state[shard_N]["exp_avg_sq"] for shard_N in shards]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, math.sqrt(1 - beta2 ** group["step"]))
        torch._foreach_add_(scales, group["eps"])
        torch._foreach_copy_(gradients, means)
        torch._foreach_div_(gradients, scales)
        torch._foreach_div_(gradients, 1 - beta1 ** group["step"])
        torch._foreach_add_(gradients, shards, alpha=group["weight_decay"])
        return gradients

    def _adapt(self, updates: list[list[torch.Tensor]]) -> None:
        """Multiplies runs of updates by |w| / |u| of their whole parameters; by 1 where either is 0."""
        squares_2P = torch.zeros(2, self._parameters, dtype=torch.float64, device=self._device)
        shards = [group["params"] for group in self.param_groups]
        mine_w, mine_u = ([run.of(of[group][place]) for group, place, run in self._cuts] for of in (shards, updates))
        if self._cuts:
            norms = torch.stack(torch._foreach_norm(mine_w + mine_u)).double()
            squares_2P.index_copy_(1, self._numbers, norms.square().view(2, -1))
        dist.all_reduce(squares_2P, group=self._ranks)
        if self._cuts:
            weight_P, update_P = squares_2P.sqrt()
            ratio_P = torch.where((weight_P > 0) & (update_P > 0), weight_P / update_P, 1.0).float()
            torch._foreach_mul_(mine_u, list(ratio_P[self._numbers].unbind()))


def build(groups: list[dict], adam: AdamSettings, device: torch.device) -> torch.optim.Optimizer:
    """AdamW, or LAMB, as `adam.name` says, of groups with their own "lr", "weight_decay" and "adapt" (see Lamb).

    On CUDA AdamW is Apex's where it is installed and torch's fused one where it is not.
    """
    settings: dict[str, Any] = {"lr": adam.lr, "betas": adam.betas, "eps": adam.eps, "weight_decay": adam.weight_decay}
    if adam.name == "lamb":
        return Lamb(groups, **settings)
    if device.type == "cuda" and ApexAdam is not None:
        return ApexAdam(groups, adam_w_mode=True, **settings)
    return torch.optim.AdamW(groups, **settings, fused=device.type == "cuda")


def fuse(optimizer: torch.optim.Optimizer) -> None:
    """Makes torch's AdamW of parameters on CUDA the fused one, before it has state: Megatron-core builds it plain.

    Other optimizers, and those of a CPU, stay as they are.
    """
    groups = optimizer.param_groups
    if isinstance(optimizer, torch.optim.AdamW) and all(p.is_cuda for group in groups for p in group["params"]):
        for group in (optimizer.defaults, *groups):
            group["fused"], group["foreach"] = True, False


def name_of(optimizer: torch.optim.Optimizer) -> str:
    """For a log: which implementation it is."""
    package = {"torch": "torch", "apex": "Apex", "transformer_engine": "Transformer Engine"}
    if isinstance(optimizer, Lamb):
        return "LAMB"
    fused = "" if not optimizer.defaults.get("fused", True) else "fused "
    return f"{fused}AdamW of {package[type(optimizer).__module__.split('.')[0]]}"


# ---- state, which torch, Apex and Transformer Engine keep each in its own way ----------------------------------------


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Moments of 0 and a count of 0: optimizers have no state before their first step; saving and loading need it."""
    by_parameter = isinstance(optimizer, torch.optim.AdamW)  # where the count of steps is; else one a group
    for group in optimizer.param_groups:
        if not by_parameter:
            group["step"] = 0
        for parameter in group["params"]:
            state = {kind: torch.zeros_like(parameter) for kind in ("exp_avg", "exp_avg_sq")}
            if by_parameter:
                state["step"] = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            optimizer.state[parameter] = state


def steps_of(optimizer: torch.optim.Optimizer) -> int:
    """Updates so far; 0 on a rank that holds nothing."""
    return max((int(place["step"]) for place in _counts(optimizer)), default=0)


def set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Sets what `steps_of` says, and bias corrections follow."""
    for place in _counts(optimizer):
        place["step"] = torch.full_like(place["step"], steps) if torch.is_tensor(place["step"]) else steps


def _counts(optimizer: torch.optim.Optimizer) -> Iterator[dict]:
    """Every dict that holds a count of steps."""
    for place in (*optimizer.state.values(), *optimizer.param_groups):
        if "step" in place:
            yield place
