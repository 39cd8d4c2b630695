"""The golden values, and how far other values are from them.

On the machine that recorded, every number is equal to the bit.  Elsewhere BLAS and vectorised functions sum and round
in another order.  The tolerances are about four times the largest relative differences that were measured on one
AVX-512 processor with ATEN_CPU_CAPABILITY=default or avx2, MKL_CBWR=COMPATIBLE, AVX2 or AVX512, and both together:
5.6e-7 of a loss, 2.5e-6 of a gradient norm and 3.7e-6 of a norm of a checkpoint.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from tandem.train.checkpoints import checkpoint

HERE = Path(__file__).parent
LOSSES, DIGESTS = HERE / "losses.json", HERE / "digests.json"
EXACT = ("step", "applied", "images", "trained_tokens", "visual_tokens", "samples")
TOLERANCE = {"loss": 2e-6, "grad_norm": 1e-5, "saved": 1.5e-5, "lr": 1e-12}  # by the beginning of a key; others: none

Numbers = dict[str, list[dict] | dict[str, float]]  # of a run: "steps", one dict per step, and "saved"


def golden() -> tuple[dict, dict[str, Numbers]]:
    """(fingerprint of the machine that recorded, numbers of every run)."""
    stored = json.loads(LOSSES.read_text())
    return stored["recorded_by"], stored["runs"]


def write(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def golden_part(line: dict) -> dict:
    """The numbers of a line of metrics.jsonl that do not depend on time; rates by part are multiples of the rate."""
    kept = tuple(TOLERANCE)
    return {
        key: value
        for key, value in line.items()
        if key in EXACT or (key.startswith(kept) and not key.startswith("lr_"))
    }


def saved_norms(run_dir: Path) -> dict[str, float]:
    """L2 norms of the last checkpoint by "module kind": weights, moments and averages after the last update."""
    reader = checkpoint.Reader(checkpoint.resolve(run_dir))
    squares: dict[str, float] = {}
    for name, facts in sorted(reader.tensors.items()):
        for kind in sorted(facts["kinds"]):
            key = f"{name.partition('.')[0]} {kind}"
            squares[key] = squares.get(key, 0.0) + reader.whole(name, kind).double().square().sum().item()
    return {key: math.sqrt(square) for key, square in sorted(squares.items())}


def differences(found: Numbers, expected: Numbers, exact: bool) -> list[str]:
    """One sentence per number of a run that is not as expected: to the bit if `exact`, else within TOLERANCE."""
    left, right, out = dict(_flat(found)), dict(_flat(expected)), []
    for key in dict.fromkeys((*right, *left)):
        tolerance = next((value for prefix, value in TOLERANCE.items() if key.startswith(prefix)), 0.0)
        off = _relative(left.get(key), right.get(key))
        if off > (0.0 if exact else tolerance):
            out.append(f"{key}: {left.get(key)}, expected {right.get(key)}, off by {off:.1e}")
    return out


def worst(found: Numbers, expected: Numbers, prefix: str) -> float:
    """The largest relative difference of a number whose key begins with `prefix`."""
    left, right = dict(_flat(found)), dict(_flat(expected))
    return max(_relative(left.get(key), right.get(key)) for key in left.keys() | right.keys() if key.startswith(prefix))


def _flat(numbers: Numbers) -> Iterator[tuple[str, float | bool]]:
    """("loss_by_domain.clip at step 2", value), ("saved.llm exp_avg", value) and so on."""
    yield from ((f"saved.{key}", norm) for key, norm in numbers["saved"].items())
    for line in numbers["steps"]:
        for key, value in line.items():
            for name, number in value.items() if isinstance(value, dict) else [(None, value)]:
                yield f"{key}{'.' * bool(name)}{name or ''} at step {line['step']}", number


def _relative(found: float | None, expected: float | None) -> float:
    if found == expected:
        return 0.0
    if found is None or expected is None:  # a number without a partner, or one that is not finite
        return float("inf")
    return abs(found - expected) / max(abs(expected), 1e-30)


def digests(path: Path) -> dict[str, str]:
    """The first half of the SHA-256 of every tensor of a checkpoint as fp32, by "name kind"."""
    reader = checkpoint.Reader(path)
    return {
        f"{name} {kind}": _digest(reader.whole(name, kind))
        for name, facts in sorted(reader.tensors.items())
        for kind in sorted(facts["kinds"])
    }


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()[:32]
