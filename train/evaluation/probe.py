"""A linear probe: multinomial logistic regression on features of a frozen encoder.

    minimise over W, b:   mean cross-entropy(x W + b, label)  +  l2 / 2 * |W|^2        (b is free)

in fp64 by L-BFGS from zero, so that the same features give the same answer.  Features are shifted and scaled to mean
zero and variance one of the training part.  l2 is the one of GRID that is best on a fifth of the training part, held
back for that; then all of the training part is fitted with it (as Radford et al. 2021, appendix A.3, do).

Legend: B samples, D features, C classes.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tandem.train.evaluation.measures import per_class

GRID = tuple(10.0**power for power in range(0, -7, -1))  # the stronger first: of equals it is taken
HELD_BACK = 5  # one in so many training samples of a class chooses l2
MOST_ITERATIONS = 1000


@dataclass(frozen=True)
class Probe:
    """Logits of features: (x - mean) / scale, then W and b."""

    mean_D: torch.Tensor
    scale_D: torch.Tensor
    weight_DC: torch.Tensor
    bias_C: torch.Tensor

    def logits(self, feature_BD: torch.Tensor) -> torch.Tensor:
        """fp64 [B, C]."""
        return (feature_BD.double() - self.mean_D) / self.scale_D @ self.weight_DC + self.bias_C


def probe(train_BD, train_label_B, test_BD, test_label_B, names: list[str]) -> dict:
    """Accuracy of a probe fitted on the one part and scored on the other.

    Labels are int64 places in `names`; -1 in the test part is a class that the training part lacks, and never right.
    Raises ValueError where features are not finite or the training part has under two classes or no class with two
    samples.
    """
    for part, feature_BD in (("training", train_BD), ("held-out", test_BD)):
        if not feature_BD.isfinite().all():
            raise ValueError(f"features of the {part} part are not finite: these weights cannot be probed")
    l2, accuracy = choose_l2(train_BD, train_label_B, len(names))
    fitted = fit(train_BD, train_label_B, len(names), l2)
    right_B = fitted.logits(test_BD).argmax(dim=1) == test_label_B
    return {
        "train_samples": len(train_BD),
        "samples": len(test_BD),
        "classes": len(names),
        "l2": l2,
        "accuracy_held_back": accuracy,
        "accuracy": float(right_B.double().mean()),
        "chance": 1 / len(names),
        "per_class": per_class(right_B, test_label_B, names),
    }


def choose_l2(feature_BD: torch.Tensor, label_B: torch.Tensor, classes: int) -> tuple[float, float]:
    """(l2, accuracy on the samples held back) of the best of GRID, the strongest of equals."""
    back_B = held_back(label_B)
    rest_BD, rest_label_B = feature_BD[~back_B], label_B[~back_B]
    best, start = (0.0, -1.0), None
    for l2 in GRID:
        start = fit(rest_BD, rest_label_B, classes, l2, start)
        right_B = start.logits(feature_BD[back_B]).argmax(dim=1) == label_B[back_B]
        accuracy = float(right_B.double().mean())
        if accuracy > best[1]:
            best = l2, accuracy
    return best


def held_back(label_B: torch.Tensor) -> torch.Tensor:
    """Which samples choose l2: of every class a fifth, at least one where it has two; bool [B].  Raises ValueError."""
    label = label_B.cpu().numpy()
    order = np.random.default_rng(0).permutation(len(label))
    back = np.zeros(len(label), dtype=bool)
    for value in np.unique(label):
        mine = order[label[order] == value]
        back[mine[: max(len(mine) // HELD_BACK, int(len(mine) > 1))]] = True
    if len(np.unique(label)) < 2 or not back.any():
        raise ValueError("a probe needs a training part with two classes or more, and with a class of two samples")
    return torch.from_numpy(back).to(label_B.device)


def fit(feature_BD: torch.Tensor, label_B: torch.Tensor, classes: int, l2: float, start: Probe | None = None) -> Probe:
    """The minimum for one l2; `start` is a fit of the same features with another."""
    x_BD = feature_BD.double()
    scale_D, mean_D = torch.std_mean(x_BD, dim=0, correction=0)
    scale_D = torch.where(scale_D > 1e-12 * (1 + mean_D.abs()), scale_D, 1.0)  # a constant feature says nothing
    x_BD = (x_BD - mean_D) / scale_D
    weight_DC = start.weight_DC.clone() if start else x_BD.new_zeros(x_BD.shape[1], classes)
    bias_C = start.bias_C.clone() if start else x_BD.new_zeros(classes)
    parameters = [weight_DC.requires_grad_(), bias_C.requires_grad_()]
    search: dict[str, Any] = {"line_search_fn": "strong_wolfe", "history_size": 10}
    solver = torch.optim.LBFGS(
        parameters, max_iter=MOST_ITERATIONS, tolerance_grad=1e-7, tolerance_change=1e-12, **search
    )

    def objective():
        solver.zero_grad()
        loss = F.cross_entropy(x_BD @ weight_DC + bias_C, label_B) + l2 / 2 * weight_DC.square().sum()
        loss.backward()
        return loss

    solver.step(objective)
    return Probe(mean_D, scale_D, weight_DC.detach(), bias_C.detach())
