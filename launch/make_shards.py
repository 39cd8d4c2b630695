"""Make a small multimodal corpus to train and test on, from images that ship inside two packages: the handwritten
digits of scikit-learn (1,797 scans, 8x8) and the photographs of scikit-image. Nothing is downloaded.

    python launch/make_shards.py OUT              about 56,700 training samples, about a minute on two cores
    python launch/make_shards.py OUT --samples 60 a tiny set

writes OUT/tokenizer.json and, each with its index, OUT/train/<task>-0000.tar ... and OUT/heldout/<task>-0000.tar.
Tasks: read, count, ground, multi, caption, text, video. For training an encoder alone, OUT/vision/train and
OUT/vision/heldout have images with captions and labels, and videos with sound: digit, photo, sound.

A digit scan is either in train or held out, never both, and so is each region of a photograph; the text task has few
distinct questions, so its held-out share repeats some. Where espeak-ng is installed, a voice says what a video of the
sound task shows, and the corpus depends on its version; elsewhere telephone tones stand for it.
"""

import argparse
import functools
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.data.media.text import Tokenizer, build_byte_tokenizer
from tandem.data.shards.indexing import build_index
from tandem.data.synthesis.images import ImageTasks
from tandem.data.synthesis.maker import Maker, load_sources
from tandem.data.synthesis.once import made_once
from tandem.data.synthesis.videos import VideoTasks
from tandem.data.synthesis.vision import VisionTasks

VERSION = 3  # of the corpus: another one is another corpus, whatever the arguments


@dataclass(frozen=True)
class Task:
    """Who makes the samples of one task, and the default number of them."""

    maker: type[Maker]
    train: int
    heldout: int = 400
    shard: int = 1000  # samples in one tar
    folder: str = ""  # inside the corpus; holds train and heldout


TASKS = {
    "read": Task(ImageTasks, 30000),
    "count": Task(ImageTasks, 6000),
    "ground": Task(ImageTasks, 1500),
    "multi": Task(ImageTasks, 1500),
    "caption": Task(ImageTasks, 1500),
    "text": Task(ImageTasks, 1500),
    "video": Task(VideoTasks, 600, heldout=60, shard=200),
}
VISION_TASKS = {
    "digit": Task(VisionTasks, 12000, heldout=800, folder="vision"),
    "photo": Task(VisionTasks, 1500, heldout=200, folder="vision"),
    "sound": Task(VisionTasks, 800, heldout=120, shard=200, folder="vision"),
}
ALL_TASKS = TASKS | VISION_TASKS


@dataclass(frozen=True)
class Shard:
    """One tar to write."""

    split: str
    task: str
    number: int
    first: int
    count: int
    seed: int


def write_shard(shard: Shard, folder: str) -> None:
    """Write one tar and its index. What is in it depends on the shard's own seed, not on who writes it."""
    from webdataset import TarWriter

    task = ALL_TASKS[shard.task]
    seed = [shard.seed, shard.split == "heldout", list(ALL_TASKS).index(shard.task), shard.number]
    maker = task.maker(load_sources(), shard.split, np.random.default_rng(seed))
    path = Path(folder) / task.folder / shard.split / f"{shard.task}-{shard.number:04d}.tar"
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for i in range(shard.first, shard.first + shard.count):
            made = getattr(maker, shard.task)()
            key = f"{shard.task}-{i:06d}"
            content = {"key": key, "domain": shard.task, "turns": made.turns, "scans": [int(s) for s in made.scans]}
            content |= {name: value for name in ("entity", "label") if (value := getattr(made, name)) is not None}
            sample = {"__key__": key, "json": json.dumps(content).encode()}
            for number, (extension, encoded) in enumerate(made.media):
                sample[f"{number}.{extension}"] = encoded
            writer.write(sample)
    build_index(path, Tokenizer(Path(folder) / "tokenizer.json"))


def plan_shards(samples: int | None, seed: int) -> list[Shard]:
    """The tars to write: default sizes, or `samples` for every task with a quarter of that (at least 16) held out."""
    shards = []
    for name, task in ALL_TASKS.items():
        count = samples or task.train
        shards += [
            Shard("train", name, number, first, min(task.shard, count - first), seed)
            for number, first in enumerate(range(0, count, task.shard))
        ]
        heldout = max(16, samples // 4) if samples else task.heldout
        shards.append(Shard("heldout", name, 0, 0, min(heldout, task.heldout), seed))
    return shards


def make_shards(out: str | Path, samples: int | None = None, seed: int = 0) -> bool:
    """Make the corpus in `out`; False if it is there already. Raises ValueError if `out` holds anything else."""
    out = Path(out)
    made = {"version": VERSION, "samples": samples, "seed": seed}
    if samples is not None and samples < 1:
        raise ValueError(f"--samples is {samples}; it must be at least 1")
    with made_once(out, made, "a corpus") as partial:
        if partial is None:
            return False
        shards = plan_shards(samples, seed)
        for shard in shards:
            (partial / ALL_TASKS[shard.task].folder / shard.split).mkdir(parents=True, exist_ok=True)
        build_byte_tokenizer(partial / "tokenizer.json")
        write = functools.partial(write_shard, folder=str(partial))
        if sum(shard.count for shard in shards) < 2000:
            for shard in shards:
                write(shard)
        else:
            with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                list(pool.map(write, shards))
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="folder to write; must not exist, or be empty, or be made by the same arguments")
    parser.add_argument("--samples", type=int, help="training samples of every task; the default sizes if left out")
    parser.add_argument("--seed", type=int, default=0, help="another seed makes another corpus from the same scans")
    arguments = parser.parse_args(argv)
    try:
        made = make_shards(arguments.out, arguments.samples, arguments.seed)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{arguments.out}: " + ("made" if made else "already made with these arguments; nothing to do"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
