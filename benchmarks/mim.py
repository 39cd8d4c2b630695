"""Does masked image modelling help what comes after it?  Contrastive training from its encoder against random weights.

    python benchmarks/mim.py            three seeds on two cores, about 12 minutes

For every seed: one run of vit_mim, then vit_contrastive twice for the same number of steps on the same samples in the
same order, once with the encoder of vit_mim and once with random weights.  Prints zero-shot accuracy on held-out scans,
with mean and spread over the seeds, and draws it; docs/mim.png is the picture of the documented size.  Needs the toy
shards and a teacher: launch/make_shards.py shards/toy, launch/make_teacher.py shards/toy/teacher.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import ROOT, one_thread

RATES = {"vit_mim": "optim.lr=2e-3", "vit_contrastive": "optim.lr=3e-3"}
PROMPTS = ("a photo of the digit {}", "a handwritten {}", "the digit {} in ink")
STARTS = ("random weights", "vit_mim")


@dataclass(frozen=True)
class Size:
    """seeds: runs of each kind.  vit_mim, vit_contrastive, warmup: steps."""

    seeds: int
    vit_mim: int
    vit_contrastive: int
    warmup: int


SIZES = {"docs": Size(3, vit_mim=1000, vit_contrastive=500, warmup=50), "toy": Size(1, 1, 1, warmup=0)}


Command = Callable[[Path, list[str]], None]  # runs a program of the project; its output goes to a file


def command(log: Path, words: list[str]) -> None:
    """A `Command` in a process of its own, on one thread."""
    with log.open("w") as file:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=file, stderr=file, env=one_thread())
    if done.returncode:
        raise SystemExit(f"error: {' '.join(words[:2])} ended with {done.returncode}: see {log}")


def main(argv: list[str] | None = None, command: Command = command) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/toy", help="folder that launch/make_shards.py has written")
    parser.add_argument("--teacher", help="folder that launch/make_teacher.py has written; SHARDS/teacher if left out")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs/mim-helps", help="for the runs and a toy's picture")
    options = results.parse(parser, argv)
    options.teacher = options.teacher or f"{options.shards}/teacher"
    if not (ROOT / options.teacher / "config.json").is_file():
        parser.error(f"{options.teacher} is missing; make it with python launch/make_teacher.py {options.teacher}")
    size = SIZES[options.size]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        scores = list(pool.map(lambda seed: one_seed(seed, size, options, command), range(size.seeds)))
    measured = {"top1": {start: [score[start] for score in scores] for start in STARTS}}
    path = results.report("mim", options, asdict(size), measured, table, ["transformers"])
    draw(results.read(path), (ROOT / "docs" if path.parent == results.FOLDER else options.folder) / "mim.png")


def table(result: dict) -> str:
    """Mean, standard deviation and every seed of both starts."""
    steps = result["settings"]["vit_contrastive"]
    lines = [f"zero-shot accuracy on held-out scans after {steps} steps of vit_contrastive from"]
    for start, values in result["measured"]["top1"].items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = "  ".join(f"{value:.1%}" for value in values)
        lines.append(f"  {start:15} {statistics.mean(values):6.1%} +- {spread:.1%}   seeds: {each}")
    return "\n".join(lines)


def one_seed(seed: int, size: Size, options: argparse.Namespace, command: Command) -> dict[str, float]:
    """Accuracy by start."""
    folder = options.folder / f"seed-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # of an earlier benchmark
    folder.mkdir(parents=True)

    def train(recipe: str, run: Path, *more: str) -> None:
        words = ["launch/pretrain.py", *settings(recipe, seed, size, options.shards), f"run.dir={run}", *more]
        command(run.with_suffix(".log"), words)

    train("vit_mim", folder / "mim", f"objective.teacher={options.teacher}")
    scores = {}
    for start, more in zip(STARTS, ([], [f"checkpoint.load_from={folder}/mim"]), strict=True):
        run = folder / start.replace(" ", "-")
        train("vit_contrastive", run, *more)
        data = ["--data", f"{options.shards}/vision/heldout/digit-*.tar"]
        prompts = [word for prompt in PROMPTS for word in ("--template", prompt)]
        command(folder / "evaluate.log", ["launch/evaluate.py", str(run), *data, *prompts])
        scores[start] = json.loads((run / "evaluation.json").read_text())["zero_shot"]["top1"]
    return scores


def settings(recipe: str, seed: int, size: Size, shards: str) -> list[str]:
    """Of a run, but for its folder and what it starts from."""
    files = ",".join(f"'{shards}/vision/train/{task}-*.tar'" for task in ("digit", "photo"))
    return [
        f"+recipe={recipe}",
        "scale=toy",
        f"train.seed={seed}",
        f"train.steps={getattr(size, recipe)}",
        "optim=adamw",
        RATES[recipe],
        "optim.min_lr=1e-5",
        f"optim.warmup_steps={size.warmup}",
        "logger.wandb=disabled",
        f"data.sources.main.shards=[{files}]",
        f"data.tokenizer={shards}/tokenizer.json",
    ]


def draw(result: dict, out: Path) -> None:
    """Accuracy of every seed, and the mean of each start."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.2, 3.4))
    for place, accuracies in enumerate(result["measured"]["top1"].values()):
        values = [100 * accuracy for accuracy in accuracies]
        axes.bar(place, statistics.mean(values), width=0.6, alpha=0.6)
        axes.plot([place] * len(values), values, "k.")
    axes.set_xticks(range(len(STARTS)), STARTS)
    steps = result["settings"]["vit_contrastive"]
    axes.set(ylabel="zero-shot accuracy, %", ylim=(0, 100), title=f"{steps} steps, held-out scans")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    print(f"picture written to {out}")


if __name__ == "__main__":
    main()
