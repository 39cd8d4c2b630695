"""The learning rate as a pure function of the step."""

import math


def learning_rate(step: int, *, lr: float, min_lr: float, warmup_steps: int, total_steps: int, schedule: str) -> float:
    """Rate of step 0, 1, ...: linear warm-up to `lr`, then a full cosine down to `min_lr`, or constant.

    The cosine reaches `min_lr` at the last step.
    """
    if step < warmup_steps:
        return lr * (step + 1) / warmup_steps
    if schedule == "constant":
        return lr
    span = max(1, total_steps - 1 - warmup_steps)
    progress = min(1.0, (step - warmup_steps) / span)
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * progress))
