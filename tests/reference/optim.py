"""Learning-rate schedule, joint clipping, AdamW, LAMB and the average of the weights, by their formulas.

    warm-up  lr * (t + 1) / W                                      t < W
    cosine   lr_min + (lr - lr_min) / 2 * (1 + cos(pi * (t - W) / (T - 1 - W)))
    m, v     m = b1 m + (1 - b1) g      v = b2 v + (1 - b2) g^2    mh = m / (1 - b1^t)      vh = v / (1 - b2^t)
    AdamW    w -= lr * s * (mh / (sqrt(vh) + eps) + decay * w)     s: factor of the parameter's learning rate
    LAMB     u = mh / (sqrt(vh) + eps) + decay * w                 w -= lr * s * |w| / |u| * u

Weight decay and LAMB's ratio are for matrices alone: not for biases, norms, tokens and scalars.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch

Tensors = dict[str, torch.Tensor]


def learning_rate(
    step: int, *, lr: float, min_lr: float, warmup_steps: int, steps: int, schedule: str = "cosine"
) -> float:
    """Learning rate of step 0, 1, ... of `steps`: linear warm-up, then constant or a cosine that ends at min_lr."""
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    share = (step - warmup_steps) / max(steps - 1 - warmup_steps, 1)
    return min_lr + (lr - min_lr) / 2 * (1 + math.cos(math.pi * share))


def norm(gradients: Mapping[str, torch.Tensor], prefix: str = "") -> float:
    """L2 norm over all gradients whose names begin with `prefix`."""
    squares = [g.double().square().sum().item() for name, g in gradients.items() if name.startswith(prefix)]
    return math.sqrt(sum(squares))


def clipped(gradients: Tensors, clip_norm: float) -> Tensors:
    """Gradients scaled down so that their joint norm is at most clip_norm."""
    scale = min(1.0, clip_norm / (norm(gradients) + 1e-6))
    return {name: g * scale for name, g in gradients.items()}


def is_matrix(tensor: torch.Tensor) -> bool:
    """Whether a parameter is longer than 1 in two dimensions or more."""
    return sum(size > 1 for size in tensor.shape) > 1


def layer_factor(name: str, depth: int, decay: float) -> float:
    """Factor of a parameter's learning rate: decay to the number of encoder layers above it, 1 for the last norm."""
    words = name.split(".")
    if words[:2] == ["encoder", "patch_embedding"]:
        return decay ** (depth + 1)
    return decay ** (depth - int(words[2])) if words[:2] == ["encoder", "blocks"] else 1.0


def part_factor(name: str, scale) -> float:
    """Factor of a parameter's learning rate by the part it is in; the router's stands on top of the LLM's."""
    part = name.split(".")[0]
    if part in ("encoder", "adapter"):
        return getattr(scale, part)
    if part in ("llm", "decoder", "embedding", "output_layer"):
        return scale.llm * (scale.router if "router" in name.split(".") else 1.0)
    return 1.0


def direction(
    w: torch.Tensor,
    m: torch.Tensor,
    v: torch.Tensor,
    steps: int,
    *,
    betas: Sequence[float],
    eps: float,
    weight_decay: float,
    adapts: bool,
) -> torch.Tensor:
    """What a weight moves against after `steps` steps, before the learning rate; adapts: LAMB's ratio of norms."""
    b1, b2 = betas
    update = m / (1 - b1**steps) / ((v / (1 - b2**steps)).sqrt() + eps)
    if not is_matrix(w):
        return update
    update = update + weight_decay * w
    if adapts and w.norm() > 0 and update.norm() > 0:
        update = update * (w.norm() / update.norm())
    return update


class AdamW:
    """AdamW on a dict of weights, which `step` replaces.  lr_scale: factor of the learning rate by name."""

    adapts = False

    def __init__(
        self,
        weights: Tensors,
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        lr_scale: Callable[[str], float] = lambda name: 1.0,
        ema: float = 0.0,
    ):
        self.weights, self.betas, self.eps, self.weight_decay = weights, betas, eps, weight_decay
        self.lr_scale, self.ema, self.steps = lr_scale, ema, 0
        self.exp_avg = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.exp_avg_sq = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.average = {name: w.clone() for name, w in weights.items()}

    def step(self, gradients: Tensors, lr: float) -> None:
        """One update from gradients by the same names, which are clipped already."""
        self.steps += 1
        b1, b2 = self.betas
        for name, gradient in gradients.items():
            w = self.weights[name]
            self.exp_avg[name] = m = b1 * self.exp_avg[name] + (1 - b1) * gradient
            self.exp_avg_sq[name] = v = b2 * self.exp_avg_sq[name] + (1 - b2) * gradient**2
            how = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay, "adapts": self.adapts}
            update = direction(w, m, v, self.steps, **how)
            self.weights[name] = w - lr * self.lr_scale(name) * update
        if self.ema:
            decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
            for name in gradients:
                self.average[name] = decay * self.average[name] + (1 - decay) * self.weights[name]


class Lamb(AdamW):
    """LAMB: AdamW's update of a matrix scaled by the ratio of the norms of the matrix and of the update."""

    adapts = True
