"""Write the index beside each shard: one sequential pass over each tar, shards in parallel.

    python launch/index_shards.py 'corpus/train-{0000..0099}.tar' --tokenizer corpus/tokenizer.json --workers 8

Run it again after changing a shard or the tokenizer. Damaged samples are left out of the index and reported.
"""

import argparse
import functools
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.index import IndexReport, build_index, expand_shards
from data.text import Tokenizer


def index_shards(shards: list[str], tokenizer_file: str, workers: int) -> list[IndexReport]:
    """Index every shard, `workers` at a time; reports in the order of the shards. Raises ValueError."""
    tokenizer = Tokenizer(tokenizer_file)
    if workers == 1 or len(shards) == 1:
        return [build_index(shard, tokenizer) for shard in shards]
    with ProcessPoolExecutor(min(workers, len(shards))) as pool:
        return list(pool.map(functools.partial(_index_one, tokenizer_file=tokenizer_file), shards))


def _index_one(shard: str, tokenizer_file: str) -> IndexReport:
    return build_index(shard, Tokenizer(tokenizer_file))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", help="tar files; {0000..0099} and * are understood")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.json that training will use")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one shard each at a time)")
    arguments = parser.parse_args(argv)
    try:
        if arguments.workers < 1:
            raise ValueError(f"--workers is {arguments.workers}; it must be at least 1")
        reports = index_shards(expand_shards(arguments.shards), arguments.tokenizer, arguments.workers)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    for report in reports:
        print("\n".join(report.lines()))
    skipped = sum(sum(report.skipped.values()) for report in reports)
    print(f"{len(reports)} shards, {sum(report.samples for report in reports)} samples, {skipped} skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
