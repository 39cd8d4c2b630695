"""What it takes to plan the largest steps from indexes alone: time, memory and how full the rows get.

    python benchmarks/planning.py            half a minute

A catalog of 100,000 shards stands for a billion samples.  The stream over it is opened, resumed in the middle of the
epoch, and plans global batches of 71M tokens (about 110,000 samples), for rows of 32,768 and of 131,072 tokens.  Every
rank plans the whole step, so the world size plays no part.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

MIN_PATCHES, MAX_PATCHES = 4, 16384


def make_billion(folder: Path) -> None:
    """A catalog of 100,000 shards of 10,000 samples: one real index, which stands for all of them."""
    import numpy as np

    from data.catalog import Catalog, gather_catalog, write_catalog
    from data.index import EVENT, MEDIA, SAMPLE, write_index

    count, shards, draw = 10_000, 100_000, np.random.default_rng(0)
    images_N = draw.poisson(1.5, count)
    samples, media = np.zeros(count, SAMPLE), np.zeros(int(images_N.sum()), MEDIA)
    samples["text_tokens"] = np.clip(draw.lognormal(np.log(150), 1.0, count), 4, 1e6) + 2 * images_N
    samples["first_media"], samples["media"] = np.cumsum(images_N) - images_N, images_N
    media["height"], media["width"] = draw.integers(100, 800, (2, len(media)))
    media["at"] = 2 + np.arange(len(media)) - np.repeat(samples["first_media"], images_N)
    header = {
        "shard": "part.tar",
        "shard_bytes": 1 << 30,
        "stamp": "",
        "tokenizer_sha256": "0" * 64,
        "groups": [["captions", None, count]],
        "skipped": {},
        "broken": None,
    }
    write_index(str(folder / "part.tar.index"), header, samples, media, np.zeros(0, EVENT))
    one = gather_catalog(["http://store/000000/part.tar"], "0" * 64, [str(folder / "part.tar.index")])
    names = [f"http://store/{shard:06d}/part.tar".encode() for shard in range(shards)]
    path = str(folder / "part.tar.index").encode()
    arrays = {
        "samples": np.full(shards, count),
        "shard_bytes": np.full(shards, 1 << 30),
        "index_digest": np.full(shards, one._arrays["index_digest"][0]),
        "group_start": np.arange(shards + 1),
        "name_start": np.arange(shards + 1) * len(names[0]),
        "index_start": np.arange(shards + 1) * len(path),
        "name": np.frombuffer(b"".join(names), np.uint8),
        "index": np.frombuffer(path * shards, np.uint8),
        "group_domain": np.zeros(shards),
        "group_entity": np.full(shards, -1),
        "group_samples": np.full(shards, count),
        "group_base": np.zeros(shards),
        "entity_samples": np.zeros(0),
    }
    write_catalog(
        folder / "billion.catalog",
        Catalog({"tokenizer_sha256": "0" * 64, "domains": ["captions"], "digest": 1}, arrays),
    )


def plan_at_scale(folder: Path, seq_length: int) -> dict:
    """Opens the stream over a billion samples, resumes in the middle, plans global batches; seconds and MiB."""
    import numpy as np
    import psutil

    from data.corpus import Corpus, SourceSettings
    from data.stream import Stream, StreamConfig

    process, rows = psutil.Process(), 71_303_168 // seq_length
    before, begin = process.memory_info().rss, time.perf_counter()
    source = SourceSettings(name="main", shards=(str(folder / "billion.catalog"),))
    corpus = Corpus.open([source], "0" * 64)
    config = StreamConfig(
        seq_length=seq_length,
        rows_per_step=rows,
        seed=0,
        min_patches=MIN_PATCHES,
        max_patches=MAX_PATCHES,
        video_budget=24576,
        video_levels=(640, 128),
        block_samples=4096,
        window_shards=16,
    )
    stream = Stream(corpus, config, lambda times: np.full(len(times), 8))
    middle = 7 * 10**8 // config.block_samples * config.block_samples
    stream.load_state(stream.state() | {"slot": middle})
    plans = [stream.next_step()]
    resumed = time.perf_counter() - begin
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        plans.append(stream.next_step())
        times.append(time.perf_counter() - begin)
    return {
        "resume_s": resumed,
        "plan_s": statistics.median(times),
        "slowest_s": max(times),
        "mib": (process.memory_info().rss - before) / 2**20,
        "samples": plans[-1].shard_S.size,
        "fill": float(sum(plan.length_S.sum() for plan in plans) / (len(plans) * rows * seq_length)),
    }


def report(folder: Path) -> None:
    """The table of planning, one fresh process a row length."""
    if not (folder / "billion.catalog").is_file():
        make_billion(folder)
    print("one core, a catalog of 100,000 shards and a billion samples, global batches of 71M tokens")
    print(
        f"{'row length':>10}{'samples':>9}{'plan s':>8}{'slowest':>9}{'open, resume, plan s':>22}"
        f"{'MiB more':>10}{'fill':>9}"
    )
    for seq_length in (32_768, 131_072):
        got = alone(__file__, "--seq-length", str(seq_length), "--folder", str(folder))
        print(
            f"{seq_length:>10,}{got['samples']:>9,}{got['plan_s']:>8.2f}{got['slowest_s']:>9.2f}{got['resume_s']:>22.2f}"
            f"{got['mib']:>10.0f}{got['fill']:>9.2%}"
        )


def alone(*arguments: str) -> dict:
    """What a program prints as json in its last line, run with these arguments in a process of its own."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the catalog is or will be; a temporary one if left out")
    parser.add_argument("--seq-length", type=int, help="plan rows of this length alone and print the figures as json")
    arguments = parser.parse_args()
    if arguments.seq_length:
        return print(json.dumps(plan_at_scale(arguments.folder, arguments.seq_length)))
    with tempfile.TemporaryDirectory() as temporary:
        report(arguments.folder or Path(temporary))


if __name__ == "__main__":
    main()
