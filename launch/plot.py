"""Draws a run as one picture: training loss by data domain, and exact match where the run was evaluated.

python launch/plot.py RUN [--out RUN/curve.png]
"""

import argparse
import json
import sys
from pathlib import Path

SMOOTH = 25  # steps of the running mean


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="picture to write; RUN/curve.png if left out")
    arguments = parser.parse_args(argv)
    metrics = arguments.run / "metrics.jsonl"
    if not metrics.is_file():
        sys.exit(f"error: {metrics} is missing; {arguments.run} is not a run directory")
    evaluation = arguments.run / "evaluation.json"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    scores = json.loads(evaluation.read_text()) if evaluation.is_file() else None
    draw(lines, scores, arguments.out or arguments.run / "curve.png")


def draw(lines: list[dict], evaluation: dict | None, out: Path) -> None:
    """Writes the picture; the right half only where there is an evaluation."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2 if evaluation else 1, figsize=(10 if evaluation else 6, 3.6), squeeze=False)
    domains = sorted({domain for line in lines for domain in line["loss_by_domain"]})
    for domain in domains:
        points = [(line["step"], line["loss_by_domain"][domain]) for line in lines if domain in line["loss_by_domain"]]
        axes[0][0].plot(*running_mean(points), label=domain)
    axes[0][0].set(xlabel="step", ylabel="loss of trained tokens", ylim=(0, None), title="training")
    axes[0][0].legend()
    if evaluation:
        names = list(evaluation["images"])
        for shift, kind in ((-0.2, "images"), (0.2, "exchanged images")):
            values = [evaluation[kind][name]["exact_match"] * 100 for name in names]
            bars = axes[0][1].bar([place + shift for place in range(len(names))], values, width=0.38, label=kind)
            axes[0][1].bar_label(bars, fmt="%.1f")
        axes[0][1].set_xticks(range(len(names)), names)
        axes[0][1].set(ylabel="exact match, %", ylim=(0, 130), yticks=range(0, 101, 20), title="held-out scans")
        axes[0][1].legend(loc="upper center", ncols=2)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"written to {out}")


def running_mean(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Mean over the last SMOOTH points at each point."""
    steps, means, window = [], [], []
    for step, value in points:
        window = [*window, value][-SMOOTH:]
        steps.append(step)
        means.append(sum(window) / len(window))
    return steps, means


if __name__ == "__main__":
    main()
