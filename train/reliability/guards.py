"""Which steps to skip, and when skipping is not enough: decisions as plain functions of numbers that all ranks share.

    loss, grad norm --spike_reason--> skip or update --after--> record --should_roll_back--> go on or roll back

A value is a spike where it lies far above the median of the steps before, measured in robust standard deviations
(1.4826 times the median absolute deviation), so that earlier spikes do not widen what counts as usual.  PaLM (section
5.1) rolled back to a checkpoint and left out the batches around a spike, which past the limit is done here too.
"""

import math
from dataclasses import asdict, dataclass, replace
from statistics import median

from tandem.train.config.schema import GuardConfig

DEVIATION = 1.4826  # of a normal distribution, in median absolute deviations
LEAST_DEVIATION = 0.01  # of the median: values that hardly vary are not judged more finely


@dataclass(frozen=True)
class Record:
    """What the guards remember: losses and norms of the last updates, and which of the last steps were skipped."""

    losses: tuple[float, ...] = ()
    norms: tuple[float, ...] = ()
    skipped: tuple[bool, ...] = ()

    def state(self) -> dict:
        """Fit for JSON, exact."""
        return asdict(self)

    @classmethod
    def of(cls, state: dict) -> "Record":
        return cls(**{name: tuple(values) for name, values in state.items()})


def deviations(value: float, before: tuple[float, ...]) -> float:
    """How many robust standard deviations `value` lies above the median of `before`."""
    middle = median(before)
    spread = DEVIATION * median(abs(other - middle) for other in before)
    return (value - middle) / max(spread, LEAST_DEVIATION * abs(middle), 1e-30)


def spike_reason(config: GuardConfig, record: Record, loss: float, grad_norm: float) -> str | None:
    """Why a step must not be applied; None where nothing speaks against it."""
    judged = (
        ("loss", loss, record.losses, config.spike_loss),
        ("gradient norm", grad_norm, record.norms, config.spike_norm),
    )
    for name, value, before, most in judged:
        if not math.isfinite(value):
            return f"{name} {value}"
        if most > 0 and len(before) * 2 >= config.window and (far := deviations(value, before)) > most:
            return f"{name} {value:.4g} is {far:.1f} deviations above the median {median(before):.4g}"
    return None


def after(config: GuardConfig, record: Record, loss: float, grad_norm: float, applied: bool) -> Record:
    """The record with one more step in it."""
    skipped = (*record.skipped, not applied)[-config.window :]
    if not applied:
        return replace(record, skipped=skipped)
    return Record((*record.losses, loss)[-config.window :], (*record.norms, grad_norm)[-config.window :], skipped)


def should_roll_back(config: GuardConfig, record: Record) -> str | None:
    """Why the run should go back to its last checkpoint; None where it can go on."""
    if len(record.skipped) >= config.consecutive and all(record.skipped[-config.consecutive :]):
        return f"{config.consecutive} steps in a row were skipped"
    if sum(record.skipped) >= config.total:
        return f"{sum(record.skipped)} of the last {len(record.skipped)} steps were skipped"
    return None


def replay_finding(first: tuple[float, float], again: tuple[float, float], still: str | None) -> str:
    """What computing a suspicious step again says: (loss, norm) of both times, and the spike_reason on the second."""
    same = all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in zip(first, again, strict=True))
    if still is None:
        return "transient: computed again, the step is sound; a device or its memory is suspect"
    return "persistent: computed again, the step is " + ("the same" if same else f"no better ({still})")
