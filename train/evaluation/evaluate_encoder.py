"""The part of launch/evaluate.py that scores a run of the encoder alone; see docs/evaluation.md."""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.progress import track
from rich.table import Table
from torch import nn

from tandem.data.media.text import Tokenizer
from tandem.data.reading.labelled import Labelled, LabelledSample, Sizes
from tandem.train.build import local_device
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.evaluation import encoder
from tandem.train.evaluation.embedding import BareEncoder, Embedded, Embedder, load_weights
from tandem.train.evaluation.measures import RECALL_AT
from tandem.train.evaluation.retrieval_picture import Gallery, draw
from tandem.train.tasks import find
from tandem.train.tasks.encoder_only import EncoderTask

MOST_NAMED = 100  # damaged samples that the result names
MOST_THREADS = 16


def evaluate(config: Config, path: Path, options: argparse.Namespace) -> dict:
    """Everything that can be measured, for evaluation.json.  Raises ValueError where that is nothing."""
    check(config, options)
    reader, features, weights = Reader(path), options.features or "patches", options.weights or "param"
    names = read_classes(options.classes) if options.classes else None
    templates = read_templates(options)
    embedder = build(config, reader, weights)
    data, gallery = labelled(config, options.data), Gallery(config.vision)
    scored: dict[str, str] = {}
    means, seen = bool(options.train) and features == "patches", partial(see, gallery) if options.picture else None
    samples = noted(progress(data), scored) if options.train else progress(data)
    embedded = embedder.embed(samples, embeddings=embedder.reads_texts, means=means, seen=seen)
    scores, skipped, device = {}, data.skipped, embedder.device
    if embedder.reads_texts:
        if any(label is not None for label in embedded.labels):
            classes = encoder.class_names(embedded, names)
            scores["zero_shot"] = encoder.zero_shot(embedded, classes, templates, embedder.texts, device)
        if found := encoder.retrieval(embedded, embedder.texts, device):
            scores["retrieval"] = found
        if options.picture:
            picture(gallery, embedder, embedded, options.picture)
    if options.train:
        train = labelled(config, options.train, sound=False)
        fitted_on = embedder.embed(apart(progress(train), scored), embeddings=not means, means=means)
        probed = encoder.linear_probe(fitted_on, embedded, features, device)
        scores["probe"] = {"features": features, "train": options.train, **probed}
        skipped = skipped + train.skipped
    if not scores:
        raise ValueError(f"there is nothing to measure: {', '.join(options.data)} has neither labels nor captions")
    state = {"task": config.task, "step": reader.state.step, "weights": weights, "data": options.data}
    told = {"skipped": some(skipped), "unheard": some(data.unheard)}
    return {"checkpoint": str(path), **state, **scores, **told}


def check(config: Config, options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together, before anything is read."""
    check_config(config, 1)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("an encoder is evaluated in one process: start launch/evaluate.py with python, not torchrun")
    if not options.data:
        raise ValueError("--data is missing: name a folder of classes, or shards, to evaluate an encoder on")
    if not _task(config).reads_texts:
        if not options.train:
            raise ValueError(
                "--train is missing: an encoder of this task reads no texts, and is scored by a linear probe"
            )
        for flag in ("classes", "template", "templates", "picture"):
            if getattr(options, flag):
                raise ValueError(f"--{flag}: an encoder of this task reads no texts")
        if options.features == "pooled":
            raise ValueError("--features pooled: an encoder of this task has no pooled embedding")
    if options.picture:
        if not Path(options.picture).parent.is_dir():
            raise ValueError(f"--picture {options.picture}: its folder does not exist")
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise ValueError("--picture needs matplotlib, which is not installed: pip install 'tandem[dev]'") from error


def build(config: Config, reader: Reader, weights: str) -> Embedder:
    """The run's tower with the weights of a checkpoint, on this process's device."""
    task, tokenizer, most_tokens = _task(config), None, 0
    if not task.reads_texts:
        tower: nn.Module = BareEncoder(config.model.encoder)
    else:
        tower = task.tower(config)
        data, most_tokens = config.data, config.model.text.max_tokens
        tokenizer = Tokenizer(data.tokenizer, data.special_tokens, data.chat)
    load_weights(tower, reader, weights)
    chunk_patches = config.parallel.encoder.chunk_patches
    return Embedder(tower.to(config.train.dtype), config.vision, local_device(), chunk_patches, tokenizer, most_tokens)


def _task(config: Config) -> EncoderTask:
    task = find(config.task)
    assert isinstance(task, EncoderTask), "the language path is evaluated elsewhere"
    return task


def labelled(config: Config, places: list[str], sound: bool = True) -> Labelled:
    """The samples of some places as the run sees and hears them; videos at the frame rate of its first source."""
    data = config.data
    sizes = Sizes(
        vision=config.vision,
        max_pixels=data.max_pixels,
        fps=next(iter(data.sources.values())).fps,
        video_budget=data.video.budget,
        video_levels=tuple(data.video.levels),
        audio_seconds=data.audio_seconds if sound else 0.0,
    )
    return Labelled(places, sizes, threads=min(MOST_THREADS, len(os.sched_getaffinity(0))))


def progress(data: Labelled) -> Iterable[LabelledSample]:
    what = f"reading {', '.join(data.places)}"
    return track(data, what, total=None, transient=True, disable=not sys.stdout.isatty())


def noted(samples: Iterable[LabelledSample], names: dict[str, str]) -> Iterator[LabelledSample]:
    """Passes samples on; `names` gets {content: name} of those with a label."""
    for sample in samples:
        if sample.label is not None:
            names[sample.content] = sample.name
        yield sample


def apart(samples: Iterable[LabelledSample], scored: dict[str, str]) -> Iterator[LabelledSample]:
    """Passes samples on.  Raises ValueError for one with a label and the content of one that is scored."""
    for sample in samples:
        if sample.label is not None and sample.content in scored:
            raise ValueError(
                f"--train: {sample.name} is also scored, as {scored[sample.content]} of --data; a linear probe "
                "is to be fitted on other samples than it is scored on"
            )
        yield sample


def see(gallery: Gallery, place: int, sample: LabelledSample) -> None:
    """Shows a gallery the samples with a first caption."""
    if sample.captions and sample.captions[0]:
        gallery.see(place, sample)


def read_classes(path: str) -> dict[str, str]:
    """{label: what prompts call it} of a file with a class a line: a label, and after a tab its name if it has one."""
    lines = read_lines("--classes", path)
    pairs = [line.partition("\t") for line in lines]
    names = {label.strip(): (name.strip() or label.strip()) for label, _, name in pairs}
    if len(names) < max(1, len(lines)):
        raise ValueError(f"--classes {path} has {len(lines)} lines with {len(names)} different labels")
    return names


def read_templates(options: argparse.Namespace) -> list[str]:
    """Templates of the command line and of files; the default ones where there are none."""
    templates = [*(options.template or ())]
    for path in options.templates or ():
        templates += read_lines("--templates", path)
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} for the name of the class")
    return templates or list(encoder.TEMPLATES)


def read_lines(flag: str, path: str) -> list[str]:
    """Lines of a file that are not blank."""
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path} cannot be read: {error}") from error


def picture(gallery: Gallery, embedder: Embedder, embedded: Embedded, out: str) -> None:
    """Writes images with their best captions, of all captions that the data has."""
    texts = list(dict.fromkeys(said[0] for said in embedded.captions if said and said[0]))
    if not texts:
        print(f"{out} is not drawn: the data has no captions")
        return
    right = [embedded.captions[place][0] or "" for place in gallery.places]
    of_label: dict[str, set[str]] = {}
    for label, said in zip(embedded.labels, embedded.captions, strict=True):
        if label is not None:
            of_label.setdefault(label, set()).update(text for text in said[:1] if text)
    assert embedded.image_BE is not None, "embedded where texts are read"
    alike = [of_label.get(embedded.labels[place] or "", set()) for place in gallery.places]
    draw(gallery, right, alike, embedded.image_BE[gallery.places], texts, embedder.texts(texts), Path(out))
    print(f"written to {out}")


def some(named: list[tuple[str, str]]) -> dict:
    """How many samples, and the first of them by name, with the reason."""
    return {"count": len(named), "samples": [{"name": name, "why": why} for name, why in named[:MOST_NAMED]]}


def headline(scores: dict) -> tuple[str, float]:
    """(what --at-least is held against, its value)."""
    if "zero_shot" in scores:
        return "zero-shot accuracy", scores["zero_shot"]["top1"]
    if "probe" in scores:
        return "accuracy of the linear probe", scores["probe"]["accuracy"]
    raise ValueError("--at-least: nothing was classified, for the data has no labels")


def tables(scores: dict) -> list[Table]:
    """Every score beside chance."""
    classified = Table("classification", "accuracy", "chance", "samples", "classes", "how")
    if shot := scores.get("zero_shot"):
        of = f"{shot['samples']}", f"{shot['classes']}", f"{len(shot['templates'])} templates"
        classified.add_row("zero-shot, top 1", f"{shot['top1']:.1%}", f"{shot['chance']:.1%}", *of)
        if "top5" in shot:
            classified.add_row("zero-shot, top 5", f"{shot['top5']:.1%}", f"{5 * shot['chance']:.1%}", *of)
    if probe := scores.get("probe"):
        how = f"{probe['features']}, fitted on {probe['train_samples']} samples, l2 {probe['l2']:g}"
        of = f"{probe['samples']}", f"{probe['classes']}", how
        classified.add_row("linear probe", f"{probe['accuracy']:.1%}", f"{probe['chance']:.1%}", *of)
    ways = [f"{what}R@{k}" for what in ("", "same label, ") for k in RECALL_AT]
    found = Table("retrieval", "queries", "items", *(cell for way in ways for cell in (way, "chance")))
    for name, score in scores.get("retrieval", {}).items():
        cells = [
            f"{part[f'{what}r{k}']:.1%}" if part else ""
            for part in (score, score.get("same_label"))
            for k in RECALL_AT
            for what in ("", "chance_")
        ]
        found.add_row(name.replace("_", " "), f"{score['queries']}", f"{score['items']}", *cells)
    return [table for table in (classified, found) if table.row_count]
