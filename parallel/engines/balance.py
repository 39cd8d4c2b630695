"""How a step's tokens were spread over the experts of every layer, over all ranks, and the bias that evens it out.

    b_e += rate * sign(mean over experts of n - n_e)        n_e: tokens of the step that chose expert e, without padding

(Wang et al. 2024, arXiv:2408.15664, algorithm 1).  Counts are sums over the world in the one reduction of a step, so
every rank moves its biases alike, in any layout, and only with a step that is applied.

Legend: L layers, E experts, M kinds of tokens (text, visual, padding), G groups of them that are reported.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tandem.parallel.kernels.router import Router
from tandem.parallel.plan.tokens import KINDS, TEXT, VISUAL

GROUPS = ("all", "text", "visual")


@dataclass(frozen=True)
class ExpertLoad:
    """Of one step, by group of tokens ("all", "text", "visual", those that the step has), padding left out.

    max_over_mean: tokens of the fullest expert over the mean expert's, by layer.  dead: share of experts that no token
    chose, by layer.  None stands for a layer without experts.  aux_loss, z_loss: without their coefficients, means over
    micro-batches and layers with experts; None where a loss is off.
    """

    max_over_mean: dict[str, list[float | None]]
    dead: dict[str, list[float | None]]
    aux_loss: float | None
    z_loss: float | None

    @property
    def highest(self) -> float:
        """The fullest expert of all layers over its layer's mean."""
        return max((load for load in self.max_over_mean.get("all", []) if load is not None), default=math.nan)


class ExpertBalance:
    """The routers of this rank's model chunks; update_rate: of their biases."""

    def __init__(self, config, chunks: Sequence[torch.nn.Module], update_rate: float, device: torch.device):
        self._config, self._rate, self._device = config, update_rate, device
        routers = (module for chunk in chunks for module in chunk.modules() if isinstance(module, Router))
        self._routers = {router.layer_number - 1: router for router in routers}
        self._shape = (config.num_layers, KINDS * config.num_moe_experts + 2)
        self._count_LME: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        """This rank's share of what the layers counted since the last call, flat fp64; the world's sum is the whole."""
        whole = torch.zeros(self._shape, dtype=torch.float64, device=self._device)
        for layer, router in self._routers.items():
            if router.totals is not None:
                whole[layer] = router.totals
                router.totals = None
        return whole.flatten()

    def digest(self, sums: torch.Tensor) -> torch.Tensor:
        """Keeps the world's sums for `update`; the numbers that `load` reads, few enough for the host."""
        sums = sums.view(self._shape)
        self._count_LME = count_LME = sums[:, :-2].unflatten(1, (KINDS, -1))
        text_LE, visual_LE = count_LME[:, TEXT], count_LME[:, VISUAL]
        chosen_GLE = torch.stack([text_LE + visual_LE, text_LE, visual_LE])
        total_GL = chosen_GLE.sum(-1)
        fullest_GL = chosen_GLE.amax(-1) * chosen_GLE.shape[-1] / total_GL  # NaN in a layer without experts
        dead_GL = torch.where(total_GL > 0, (chosen_GLE == 0).double().mean(-1), math.nan)
        return torch.cat([fullest_GL.flatten(), dead_GL.flatten(), sums[:, -2:].sum(0)])

    def load(self, numbers: Sequence[float], micro_batches: int) -> ExpertLoad:
        """What `digest` found, read on the host.  micro_batches: of the global batch."""
        layers = self._config.num_layers
        rows = [[None if math.isnan(x) else x for x in numbers[i * layers :][:layers]] for i in range(2 * len(GROUPS))]
        fullest, dead = (dict(zip(GROUPS, part, strict=True)) for part in (rows[: len(GROUPS)], rows[len(GROUPS) :]))
        there = [group for group in GROUPS if any(value is not None for value in fullest[group])]
        routed = sum(value is not None for value in fullest["all"])
        of_losses = (self._config.moe_aux_loss_coeff, self._config.moe_z_loss_coeff)
        aux, z = (
            total / (routed * micro_batches) if coefficient and routed else None
            for total, coefficient in zip(numbers[-2:], of_losses, strict=True)
        )
        return ExpertLoad({g: fullest[g] for g in there}, {g: dead[g] for g in there}, aux, z)

    @torch.no_grad()
    def update(self) -> None:
        """Moves the biases by the counts of the step that `digest` has seen last."""
        if not self._rate or self._count_LME is None:
            return
        for layer, router in self._routers.items():
            text_E, visual_E = self._count_LME[layer, TEXT], self._count_LME[layer, VISUAL]
            if router.expert_bias_visual is None:
                self._move(router.expert_bias, text_E + visual_E)
            else:
                self._move(router.expert_bias, text_E)
                self._move(router.expert_bias_visual, visual_E)

    def _move(self, bias_E: torch.Tensor, count_E: torch.Tensor) -> None:
        bias_E += self._rate * torch.sign(count_E.sum() - count_E * len(count_E)).float()  # of whole numbers: exact
