"""Scores a checkpoint on held-out data.  Of a run with a language model, loss and exact match of its answers, with the
right images and, as a control, with exchanged ones:

    python launch/evaluate.py RUN data.sources.main.shards='[shards/toy/heldout/read-0000.tar]'

Of a run of the encoder alone, zero-shot classification, retrieval, and with --train a linear probe; on folders of
classes, or on shards, which need no index:

    python launch/evaluate.py RUN --data HELDOUT --train TRAIN

RUN is a run directory or one of its checkpoints; settings come from the run's config.yaml and can be overridden by
key=value.  Prints a table and writes evaluation.json into the run directory.  Encoders are scored in one process,
language models in one or under torchrun in any layout with cp = 1.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import torch.distributed as dist
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.train.checkpoints import checkpoint
from tandem.train.config.architecture import check_architecture
from tandem.train.config.checks import check_config
from tandem.train.config.saved import saved_settings
from tandem.train.config.schema import Config
from tandem.train.config.settings import read_config
from tandem.train.input.prefetcher import AgreedError
from tandem.train.tasks import find

RESULT = "evaluation.json"
EXPORTED = "exported"  # scores of the exported folder
ONE_PROCESS = ("tp", "pp", "vpp", "ep", "cp")
WIDTH = 150  # of tables in a pipe or file
LANGUAGE_ONLY = ("exported", "exchanged_at_most")
ENCODER_ONLY = ("data", "train", "template", "templates", "classes", "features", "weights", "picture")


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_intermixed_args(argv)  # settings may stand behind options
    try:
        path = checkpoint.resolve(arguments.run)
        config = settings_of(path, arguments.overrides)
        missed = (score_language if find(config.task).has_llm else score_encoder)(config, path, arguments)
    except (ValueError, AgreedError) as error:
        sys.exit(f"error: {error}")
    if missed:
        sys.exit(f"error: {missed}")


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("run", help="run directory or checkpoint")
    out.add_argument("overrides", nargs="*", help="settings as key=value, as in data.sources.main.shards='[a.tar]'")
    least = "fails the command below this: exact match over all; of an encoder zero-shot accuracy, or else the probe's"
    out.add_argument("--at-least", type=float, default=0.0, help=least)
    language = out.add_argument_group("runs with a language model")
    exported = "folder of launch/checkpoint.py export --format hf, to be scored as well: transformers generates answers"
    language.add_argument("--exported", metavar="FOLDER", help=exported)
    language.add_argument("--exchanged-at-most", type=float, help="fails above this exact match with exchanged images")
    encoder = out.add_argument_group("runs of the encoder alone, each of the first four as often as needed")
    place = "folder of classes, folder of shards, or shards by a path with braces and globs"
    encoder.add_argument("--data", action="append", metavar="PLACE", help=f"what is scored: {place}")
    encoder.add_argument("--train", action="append", metavar="PLACE", help="likewise, what a linear probe is fitted on")
    encoder.add_argument("--template", action="append", help="prompt of a class, as in 'a photo of {}'")
    encoder.add_argument("--templates", action="append", metavar="FILE", help="file with a template a line")
    encoder.add_argument("--classes", metavar="FILE", help="file with a class a line: label, or label, tab and name")
    encoder.add_argument(
        "--features", choices=("patches", "pooled"), help="of the probe: mean of patches (default), or embedding"
    )
    encoder.add_argument("--weights", choices=("param", "ema"), help="those trained (default), or their running mean")
    encoder.add_argument("--picture", metavar="FILE", help="PNG to write: images with their best captions")
    return out


def score_encoder(config: Config, path: Path, arguments: argparse.Namespace) -> str | None:
    """Evaluates a run of the encoder alone; what was missed of --at-least, in words."""
    from tandem.train.evaluation import evaluate_encoder

    for name in LANGUAGE_ONLY:
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: a run of task={config.task} has no answers to compare")
    scores = evaluate_encoder.evaluate(config, path, arguments)
    write(path, scores, *evaluate_encoder.tables(scores))
    for key, what in (("skipped", "samples cannot be used"), ("unheard", "videos without sound")):
        if count := scores[key]["count"]:
            print(f"{count} {what}, the first: {scores[key]['samples'][0]['name']}: {scores[key]['samples'][0]['why']}")
    if not arguments.at_least:
        return None
    what, value = evaluate_encoder.headline(scores)
    return None if value >= arguments.at_least else f"{what} {value:.1%} (at least {arguments.at_least:.1%} wanted)"


def score_language(config: Config, path: Path, arguments: argparse.Namespace) -> str | None:
    """Evaluates a run with a language model; what was missed of the limits, in words."""
    for name in ENCODER_ONLY:
        if getattr(arguments, name) is not None:
            hint = "name shards as data.sources.main.shards='[...]'"
            raise ValueError(
                f"--{name} is for runs of the encoder alone, and this is one of task={config.task}; {hint}"
            )
    scores = evaluate_checkpoint(config, path, arguments.exported)
    right, exchanged = (scores[kind]["all"]["exact_match"] for kind in ("images", "exchanged images"))
    if int(os.environ.get("RANK", "0")) == 0:
        shards = {name: source.shards for name, source in config.data.sources.items()}
        write(path, {"checkpoint": str(path), "shards": shards, **scores}, table(scores))
        left_out = {key: scores["images"]["all"][key] for key in ("unreadable", "refused")}
        if any(left_out.values()):
            print(f"not scored: {left_out['unreadable']} unreadable samples, {left_out['refused']} longer than a row")
    most = 1.0 if arguments.exchanged_at_most is None else arguments.exchanged_at_most
    if right >= arguments.at_least and exchanged <= most:
        return None
    return (
        f"exact match {right:.1%} (at least {arguments.at_least:.1%} wanted), with exchanged images {exchanged:.1%} "
        f"(at most {most:.1%} wanted)"
    )


def write(path: Path, scores: dict, *tables: Table) -> None:
    """Scores into the run's directory and onto the console."""
    target = checkpoint.run_directory(path) / RESULT
    target.write_text(json.dumps(scores, indent=2) + "\n")
    Console(width=None if sys.stdout.isatty() else WIDTH).print(*tables, sep="\n")
    print(f"written to {target}")


def settings_of(path: Path, overrides: list[str]) -> Config:
    """A run's settings with overrides, in one process unless they name a layout.

    Raises ValueError for an unknown key.
    """
    settings = saved_settings(path)
    for key in ONE_PROCESS:
        settings.parallel[key] = 1
    settings.parallel.etp = settings.parallel.balance_group_size = None
    settings.train.recompute = "none"
    _score_once(settings.data.sources, overrides)
    try:
        settings.merge_with_dotlist(overrides)
    except Exception as error:
        raise ValueError(f"{' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    return read_config(settings)


def _score_once(sources: DictConfig, overrides: list[str]) -> None:
    """Leaves only the sources whose shards are named anew, if any are, and no mixture: each sample is scored once."""
    named = {match[1] for override in overrides if (match := re.match(r"data\.sources\.(\w+)\.shards=", override))}
    for name in list(sources):
        if named and name not in named:
            del sources[name]
            continue
        source = sources[name]
        source.weight = source.max_samples = source.entity_cap = None
        source.repeat, source.rare_domain_copies = 1.0, 1


def evaluate_checkpoint(config: Config, path: Path, exported: str | None = None) -> dict:
    """Loads the weights of a checkpoint and scores them both ways; then the folder that was exported from it."""
    from tandem.train.build import build_engines, local_device, start_world
    from tandem.train.evaluation.answers import answer_forward, answer_report, evaluate
    from tandem.train.input.dataset import open_data

    layout = check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    if layout.cp > 1:
        raise ValueError(f"parallel.cp={layout.cp}: evaluation needs whole rows, set parallel.cp=1")
    if exported and layout.world > 1:
        raise ValueError(f"--exported {exported}: is scored in one process, start it without torchrun")
    config.train.trainable = []  # forwards only: no gradients, no optimizer
    data, reader, device = open_data(config), checkpoint.Reader(path), local_device()
    check_architecture(config, reader.state.architecture, find(config.task).parts, path)
    start_world(device)
    engines = build_engines(config, layout, device, forward=answer_forward, loss=answer_report)
    checkpoint.load(reader, engines, optimizer=False, modules=find(config.task).parts)  # none is left random
    scores = {
        "images": evaluate(config, engines, data, exchanged=False),
        "exchanged images": evaluate(config, engines, data, exchanged=True),
    }
    data.reader.close()
    dist.destroy_process_group()
    if exported:
        from tandem.train.evaluation.exported import evaluate_folder

        scores[EXPORTED] = evaluate_folder(config, data, exported, device)
    return scores


def table(scores: dict) -> Table:
    """Exact match and loss by domain, side by side."""
    rows = Table("domain", "samples", "exact match", "exact match, exchanged", "loss", "loss, exchanged")
    right, wrong, exported = scores["images"], scores["exchanged images"], scores.get(EXPORTED)
    if exported:
        rows.add_column("exact match, transformers")
    for name in right:
        cells = [
            name,
            str(right[name]["samples"]),
            f"{right[name]['exact_match']:.1%}",
            f"{wrong[name]['exact_match']:.1%}",
            f"{right[name]['loss']:.4f}",
            f"{wrong[name]['loss']:.4f}",
        ]
        rows.add_row(*cells, *([f"{exported[name]['exact_match']:.1%}"] if exported else []))
    return rows


if __name__ == "__main__":
    main()
