"""Write the index beside each shard: one sequential pass over each tar, shards in parallel.

    python launch/index_shards.py 'corpus/train-{0000..0099}.tar' --tokenizer corpus/tokenizer.json --workers 8

The format of a shard's samples is told: turns, pairs, images, text or video (docs/data.md). `--format` names it where
the first samples mislead, and `--prompt` is what the user says in pairs and videos, '<image>' or '<video>' if left out.

Run it again after changing a shard or the tokenizer, or after an interruption: shards whose index is current are left
alone. Damaged samples are left out of the index and reported. Remote shards (s3://, https://, ...) need --index-dir,
where their indexes go, and --catalog, the file that training names in their place.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tandem.data.formats.in_place import AUTO, find_format, formats
from tandem.data.media.text import Tokenizer
from tandem.data.media.tokenizer_files import ChatConfig, SpecialTokens
from tandem.data.shards.catalog import CATALOG_SUFFIX, expand_shards, gather_catalog, write_catalog
from tandem.data.shards.index import SUFFIX, load_index
from tandem.data.shards.indexing import IndexReport, build_index, is_current
from tandem.data.shards.storage import base_name, is_url, shown


@dataclass(frozen=True)
class Outcome:
    """What became of one shard: a report, `made` now or before, and the sentence that says why it cannot be used."""

    report: IndexReport | None
    made: bool
    error: str = ""


def index_shards(
    shards: list[str], paths: list[str], settings: str, workers: int, force: bool, **reading: str | None
) -> Generator[Outcome, None, None]:
    """Index every shard, `workers` at a time, into its path; outcomes in the order of the shards. Raises ValueError.

    settings: of the tokenizer, as JSON.  reading: format and prompt, as `build_index` takes them.
    """
    act = functools.partial(_index_one, settings=settings, force=force, reading=reading)
    if workers == 1 or len(shards) == 1:
        yield from map(act, shards, paths)
        return
    context = multiprocessing.get_context("spawn")  # neither tokenizers nor fsspec is safe to fork
    with ProcessPoolExecutor(min(workers, len(shards)), context) as pool:
        try:
            with _interrupts_held_back():
                outcomes = pool.map(act, shards, paths)  # starts the workers
            yield from outcomes
        except (KeyboardInterrupt, GeneratorExit):  # here, or while the caller had the last outcome
            print("interrupted: waiting for the shards at hand", file=sys.stderr, flush=True)
            raise
        except BrokenProcessPool as error:
            raise ValueError("a worker process ended abruptly, perhaps for want of memory; run it again") from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """An interruption comes after it; processes that start inside have it blocked for good, from their first moment."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _index_one(shard: str, path: str, settings: str, force: bool, reading: dict) -> Outcome:
    tokenizer = _tokenizer(settings)
    try:
        made = force or not is_current(shard, tokenizer, path, **reading)
        if made:
            report = build_index(shard, tokenizer, path, **reading)
        else:
            report = IndexReport.of(load_index(shard, tokenizer.sha256, path))
        return Outcome(report, made, "" if report.samples else report.nothing())
    except (ValueError, OSError) as error:
        return Outcome(None, False, str(error))


@functools.cache
def _tokenizer(settings: str) -> Tokenizer:
    return Tokenizer.of(json.loads(settings))


def add_set_option(parser: argparse.ArgumentParser) -> None:
    """The option whose values `tokenizer_settings` takes as `chosen`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="special_tokens.* or chat.* as training will have it in data.*; may be given several times",
    )


def tokenizer_settings(path: str, chosen: list[str]) -> str:
    """Settings of the tokenizer, as JSON.  chosen: KEY=VALUE as below `data` in a run.  Raises ValueError."""
    parts = OmegaConf.structured({"special_tokens": SpecialTokens, "chat": ChatConfig})
    try:
        merged: Any = OmegaConf.to_object(OmegaConf.merge(parts, OmegaConf.from_dotlist(chosen)))
    except OmegaConfBaseException as error:
        raise ValueError(f"--set {' '.join(chosen)}: {str(error).splitlines()[0]}") from error
    tokenizer = Tokenizer(path, merged["special_tokens"], merged["chat"])
    if tokenizer.added:
        print(f"{path} lacks {', '.join(tokenizer.added)}: they get the ids from {tokenizer.known} on", flush=True)
    return json.dumps(tokenizer.settings)


def index_paths(shards: list[str], folder: str | None) -> list[str]:
    """Where the index of each shard goes: beside it, or into a folder. Raises ValueError where two would collide."""
    if folder is None:
        return [shard + SUFFIX for shard in shards]
    first: dict[str, str] = {}
    for shard in shards:
        other = first.setdefault(base_name(shard), shard)
        if other != shard:
            both = f"{shown(other)} and {shown(shard)}"
            raise ValueError(f"--index-dir {folder} would hold one index for both {both}; index them into two folders")
    return [os.path.join(folder, base_name(shard) + SUFFIX) for shard in shards]


def _check(arguments: argparse.Namespace, shards: list[str]) -> None:
    remote = next((shard for shard in shards if is_url(shard)), None)
    if arguments.format != AUTO:
        find_format(arguments.format).check_prompt(arguments.prompt)
    if arguments.workers < 1:
        raise ValueError(f"--workers is {arguments.workers}; it must be at least 1")
    if remote and not (arguments.index_dir and arguments.catalog):
        raise ValueError(f"shard {shown(remote)} is remote: --index-dir and --catalog say where to keep what is known")
    if arguments.catalog and not arguments.catalog.endswith(CATALOG_SUFFIX):
        raise ValueError(f"--catalog is {arguments.catalog}; its name must end in {CATALOG_SUFFIX}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="tar files or URLs; {0000..0099} is understood, in paths * too")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json or folder that training will use")
    add_set_option(parser)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one shard each at a time)")
    parser.add_argument("--index-dir", help="folder for the indexes; without it each goes beside its shard")
    parser.add_argument("--catalog", help="file ending in .catalog for all shards; use it where there are thousands")
    parser.add_argument("--format", default=AUTO, help=f"of the samples: {AUTO} or one of {', '.join(formats())}")
    parser.add_argument("--prompt", metavar="TEXT", help="what the user says in pairs and videos, with a placeholder")
    parser.add_argument("--force", action="store_true", help="index also shards whose index is current")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    outcomes = []
    try:
        shards = expand_shards(arguments.shards, urls=True)
        _check(arguments, shards)
        paths = index_paths(shards, arguments.index_dir)
        if arguments.index_dir:
            os.makedirs(arguments.index_dir, exist_ok=True)
        reading = {"format": arguments.format, "prompt": arguments.prompt}
        settings = tokenizer_settings(arguments.tokenizer, arguments.set)
        made = index_shards(shards, paths, settings, arguments.workers, arguments.force, **reading)
        with contextlib.closing(made):
            for outcome in made:
                outcomes.append(outcome)
                lines = outcome.report.lines() if outcome.report else []
                lines += [f"not indexed: {outcome.error}"] if outcome.error else []
                print("\n".join(lines), flush=True)
        _summary(outcomes)
        failed = [outcome.error for outcome in outcomes if outcome.error]
        if failed:
            raise ValueError(f"{len(failed)} of {len(shards)} shards could not be indexed, the first: {failed[0]}")
        if arguments.catalog:
            write_catalog(arguments.catalog, gather_catalog(shards, _tokenizer(settings).sha256, paths))
            print(f"{arguments.catalog}: the catalog of {len(shards)} shards")
    except KeyboardInterrupt:
        parser.exit(130, f"interrupted after {len(outcomes)} shards; run it again to go on\n")
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


def _summary(outcomes: list[Outcome]) -> None:
    reports = [outcome.report for outcome in outcomes if outcome.report and not outcome.error]
    skipped = sum(sum(report.skipped.values()) for report in reports)
    before = sum(not outcome.made for outcome in outcomes if outcome.report and not outcome.error)
    note = f" ({before} shards were indexed before)" if before else ""
    print(f"{len(reports)} shards, {sum(report.samples for report in reports)} samples, {skipped} skipped{note}")


if __name__ == "__main__":
    sys.exit(main())
