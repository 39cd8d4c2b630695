"""Draws a run as one picture: training loss by data domain or by term, and its scores where the run was evaluated.

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
    draw_losses(axes[0][0], lines)
    if evaluation:
        (draw_answers if "images" in evaluation else draw_encoder)(axes[0][1], evaluation)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"written to {out}")


def draw_losses(axis, lines: list[dict]) -> None:
    """By data domain; of a run of the encoder alone, by term of its loss."""
    of_domains = any("loss_by_domain" in line for line in lines)
    parts = [line["loss_by_domain" if of_domains else "losses"] for line in lines]
    for name in sorted({name for part in parts for name in part}):
        points = [(line["step"], part[name]) for line, part in zip(lines, parts, strict=True) if name in part]
        axis.plot(*running_mean(points), label=name)
    axis.set(xlabel="step", ylabel="loss of trained tokens" if of_domains else "loss", ylim=(0, None), title="training")
    axis.legend()


def draw_answers(axis, evaluation: dict) -> None:
    """Exact match by data domain, with the right images and with exchanged ones."""
    names = list(evaluation["images"])
    for shift, kind in ((-0.2, "images"), (0.2, "exchanged images")):
        values = [evaluation[kind][name]["exact_match"] * 100 for name in names]
        bars = axis.bar([place + shift for place in range(len(names))], values, width=0.38, label=kind)
        axis.bar_label(bars, fmt="%.1f")
    axis.set_xticks(range(len(names)), names)
    axis.set(ylabel="exact match, %", ylim=(0, 130), yticks=range(0, 101, 20), title="held-out scans")
    axis.legend(loc="upper center", ncols=2)


def draw_encoder(axis, evaluation: dict) -> None:
    """Whatever was measured of an encoder, beside chance."""
    bars = {}
    if shot := evaluation.get("zero_shot"):
        bars["zero-shot"] = (shot["top1"], shot["chance"])
    if probe := evaluation.get("probe"):
        bars["probe"] = (probe["accuracy"], probe["chance"])
    for name, found in evaluation.get("retrieval", {}).items():
        bars[name.replace("_to_", " to\n") + " R@5"] = (found["r5"], found["chance_r5"])
    for shift, kind, part in ((-0.2, "encoder", 0), (0.2, "chance", 1)):
        values = [100 * values[part] for values in bars.values()]
        drawn = axis.bar([place + shift for place in range(len(bars))], values, width=0.38, label=kind)
        axis.bar_label(drawn, fmt="%.0f", fontsize=8)
    axis.set_xticks(range(len(bars)), list(bars), fontsize=7)
    axis.set(ylabel="%", ylim=(0, 130), yticks=range(0, 101, 20), title="held-out data")
    axis.legend(loc="upper center", ncols=2)


def running_mean(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Mean over the last SMOOTH points at each point."""
    steps: list[int] = []
    means: list[float] = []
    window: list[float] = []
    for step, value in points:
        window = [*window, value][-SMOOTH:]
        steps.append(step)
        means.append(sum(window) / len(window))
    return steps, means


if __name__ == "__main__":
    main()
