"""Does masked image modelling help what comes after it?  Contrastive training from its encoder against random weights.

    python benchmarks/mim.py --teacher shards/toy/teacher            # three seeds on two cores, about 12 minutes

For every seed: one run of vit_mim, then vit_contrastive twice for the same number of steps on the same samples in the
same order, once with the encoder of vit_mim and once with random weights.  Prints zero-shot accuracy on held-out scans,
with mean and spread over the seeds, and draws it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = {"vit_mim": 1000, "vit_contrastive": 500}
RATES = {"vit_mim": "optim.lr=2e-3", "vit_contrastive": "optim.lr=3e-3"}
PROMPTS = ("a photo of the digit {}", "a handwritten {}", "the digit {} in ink")
STARTS = ("random weights", "vit_mim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder that launch/make_teacher.py has written")
    parser.add_argument("--shards", default="shards/toy", help="folder that launch/make_shards.py has written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/mim-helps"), help="folder for the runs and the picture")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(cores) as pool:
        scores = list(pool.map(lambda seed: one_seed(seed, options), range(options.seeds)))
    print(f"zero-shot accuracy on held-out scans after {STEPS['vit_contrastive']} steps of vit_contrastive from")
    for start in STARTS:
        values = [score[start] for score in scores]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = "  ".join(f"{value:.1%}" for value in values)
        print(f"  {start:15} {statistics.mean(values):6.1%} +- {spread:.1%}   seeds: {each}")
    draw(scores, options.out / "mim.png")


def one_seed(seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Accuracy by start."""
    folder = options.out / f"seed-{seed}"
    train("vit_mim", folder / "mim", seed, options, f"objective.teacher={options.teacher}")
    scores = {}
    for start, more in zip(STARTS, ([], [f"checkpoint.load_from={folder}/mim"]), strict=True):
        run = folder / start.replace(" ", "-")
        train("vit_contrastive", run, seed, options, *more)
        data = ["--data", f"{options.shards}/vision/heldout/digit-*.tar"]
        prompts = [word for prompt in PROMPTS for word in ("--template", prompt)]
        command(folder / "evaluate.log", "launch/evaluate.py", str(run), *data, *prompts)
        scores[start] = json.loads((run / "evaluation.json").read_text())["zero_shot"]["top1"]
    return scores


def train(recipe: str, run: Path, seed: int, options: argparse.Namespace, *more: str) -> None:
    shards = ",".join(f"'{options.shards}/vision/train/{task}-*.tar'" for task in ("digit", "photo"))
    settings = [f"+recipe={recipe}", "scale=toy", f"run.dir={run}", f"train.seed={seed}", RATES[recipe]]
    settings += [
        "optim=adamw",
        "optim.min_lr=1e-5",
        "optim.warmup_steps=50",
        f"train.steps={STEPS[recipe]}",
        "logger.wandb=disabled",
    ]
    settings += [f"data.sources.main.shards=[{shards}]", f"data.tokenizer={options.shards}/tokenizer.json"]
    run.parent.mkdir(parents=True, exist_ok=True)
    command(run.parent / f"{run.name}.log", "launch/pretrain.py", *settings, *more)


def command(log: Path, *words: str) -> None:
    """Runs one of the project's commands in one process on one thread; its output goes to `log`."""
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, *words], cwd=ROOT, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words[:2])} ended with {done.returncode}: see {log}")


def draw(scores: list[dict[str, float]], out: Path) -> None:
    """Accuracy of every seed, and the mean of each start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.2, 3.4))
    for place, start in enumerate(STARTS):
        values = [100 * score[start] for score in scores]
        axes.bar(place, statistics.mean(values), width=0.6, alpha=0.6)
        axes.plot([place] * len(values), values, "k.")
    axes.set_xticks(range(len(STARTS)), STARTS)
    axes.set(ylabel="zero-shot accuracy, %", ylim=(0, 100), title=f"{STEPS['vit_contrastive']} steps, held-out scans")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
