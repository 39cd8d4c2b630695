"""Filter raw shards: what is damaged, tiny, stretched, wordless, blocked, mismatched or seen before is left out.

    python launch/curate.py 'raw/{0000..0099}.tar' --out curated --workers 8
    python launch/curate.py 'raw/*.tar' --out curated --clip models/clip-vit-large-patch14 --block blocked.txt

writes a tar of the same name for every shard of which something is kept, and beside them curation.md and curation.json
(what was dropped, why, with examples) and dropped.jsonl (every dropped sample). Run it before launch/index_shards.py.
The order of the shards decides which of two duplicates stays; the number of workers changes nothing.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import sys
from pathlib import Path

from rich.console import Console

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.data.curation.filters import Rules, read_block_list
from tandem.data.curation.pipeline import curate
from tandem.data.curation.report import Report
from tandem.data.curation.runners import in_processes, on_ray
from tandem.data.curation.similar import MAX_DISTANCE
from tandem.data.shards.catalog import expand_shards
from tandem.data.shards.storage import is_url, shown


def find_shards(patterns: list[str]) -> list[str]:
    """Local tars in the order named, those of a * by name. Raises ValueError, also where two have one base name."""
    shards = expand_shards(patterns, urls=True)
    names: dict[str, str] = {}
    for shard in shards:
        if is_url(shard):
            raise ValueError(f"{shown(shard)} is remote; curation reads local tar files")
        if (other := names.setdefault(os.path.basename(shard), shard)) is not shard:
            raise ValueError(f"{other} and {shard} have one name; curate them into two folders")
    return shards


def curate_into(out: str | Path, shards: list[str], rules: Rules, clip: str | None, run) -> Report:
    """curate() into a folder that exists only when complete, with the tables. Raises ValueError."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out} is not empty; choose another folder")
    make_scorer = None
    if clip is not None:
        from tandem.train.models.pretrained.clip_similarity import ClipSimilarity, check_clip_folder

        check_clip_folder(clip)
        make_scorer = functools.partial(ClipSimilarity, str(Path(clip).resolve()))
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    report = curate(shards, partial.resolve(), rules, make_scorer, run)
    settings = dataclasses.asdict(rules) | {"clip": clip, "blocked": len(rules.blocked)}
    (partial / "curation.json").write_text(json.dumps({"settings": settings} | report.as_json(), indent=1))
    (partial / "curation.md").write_text(report.markdown(), encoding="utf-8")
    partial.rename(out)
    return report


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="tar files; {0000..0099} and * are understood")
    parser.add_argument("--out", required=True, help="folder to write; must not exist, or be empty")
    parser.add_argument("--min-side", type=int, default=28, help="least pixels of an image's shorter side")
    parser.add_argument("--max-aspect", type=float, default=5.0, help="longest side of an image over its shortest")
    parser.add_argument("--min-chars", type=int, default=1, help="least characters of what the assistant says")
    parser.add_argument("--max-chars", type=int, help="most characters of what the assistant says")
    parser.add_argument(
        "--near", type=int, default=6, help=f"bits of 64 in which near duplicates differ, 0..{MAX_DISTANCE}"
    )
    parser.add_argument("--keep-duplicates", action="store_true", help="for data that asks much about one image")
    parser.add_argument("--block", metavar="FILE", help='hosts and URL prefixes whose samples go (json key "url")')
    parser.add_argument("--clip", metavar="FOLDER", help="local Hugging Face CLIP that compares images with text")
    parser.add_argument("--min-similarity", type=float, default=0.2, help="least cosine under --clip")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one shard each at a time)")
    parser.add_argument(
        "--ray", action="store_true", help="workers are actors on Ray Data, on the cluster of RAY_ADDRESS"
    )
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each Ray actor, for --clip; may be a fraction")
    arguments = parser.parse_args(argv)
    arguments.fail = lambda error: parser.exit(2, f"error: {error}\n")
    return arguments


def main(argv: list[str] | None = None) -> int:
    given = parse(argv)
    try:
        if given.workers < 1:
            raise ValueError(f"--workers is {given.workers}; it must be at least 1")
        if given.gpus and not given.ray:
            raise ValueError(f"--gpus is {given.gpus:g}; it belongs to --ray (processes share the machine's GPUs)")
        rules = Rules(
            min_side=given.min_side,
            max_aspect=given.max_aspect,
            min_chars=given.min_chars,
            max_chars=given.max_chars,
            near=None if given.keep_duplicates else given.near,
            min_similarity=given.min_similarity,
            blocked=read_block_list(given.block) if given.block else (),
        )
        shards = find_shards(given.shards)
        if given.ray:
            run = functools.partial(on_ray, workers=given.workers, gpus=given.gpus)
        else:
            run = functools.partial(in_processes, workers=given.workers)
        report = curate_into(given.out, shards, rules, given.clip, run)
    except (ValueError, OSError) as error:
        given.fail(error)
    console = Console()
    console.print(report.table())
    for line in report.broken():
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{given.out}: {report.kept:,} of {report.samples:,} samples kept", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
