"""What both engines share: Adam's settings, and the unit in which trained state is saved and loaded."""

from dataclasses import dataclass

import torch

KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdamSettings:
    """AdamW; biases and normalisation parameters are exempt from weight decay (report, section 4)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float


@dataclass(frozen=True)
class StateChunk:
    """A box of one fp32 tensor of the whole model: `kind` is "param", "exp_avg" or "exp_avg_sq".

    start: global index of the box's corner; written_here: whether this rank is the one that saves it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    tensor: torch.Tensor
    written_here: bool
