"""What it takes to plan the largest steps from indexes alone: time, memory and how full the rows get.

    python benchmarks/planning.py            three seconds, one core

A catalog of 100,000 shards stands for a billion samples.  The stream over it is opened, resumed in the middle of the
epoch, and plans global batches of 71M tokens (about 110,000 samples), for rows of 32,768 and of 131,072 tokens.  Every
rank plans the whole step, so the world size plays no part.  Each row length is measured in a fresh process.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import alone

MIN_PATCHES, MAX_PATCHES = 4, 16384


@dataclass(frozen=True)
class Size:
    """shards: of the catalog.  samples: per shard.  batch_tokens: of a global batch.  seq_lengths: of rows.
    block_samples, window_shards: of the stream's shuffle.
    """

    shards: int
    samples: int
    batch_tokens: int
    seq_lengths: tuple[int, ...] = (32_768, 131_072)
    block_samples: int = 4096
    window_shards: int = 16


SIZES = {
    "docs": Size(shards=100_000, samples=10_000, batch_tokens=71_303_168),
    "toy": Size(100, 500, batch_tokens=65_536, seq_lengths=(8192,), block_samples=64, window_shards=2),
}


def make_catalog(folder: Path, size: Size) -> None:
    """A catalog of many shards: one real index, which stands for all of them."""
    import numpy as np

    from tandem.data.shards.catalog import Catalog, gather_catalog, write_catalog
    from tandem.data.shards.index import EVENT, MEDIA, SAMPLE, write_index

    count, shards, draw = size.samples, size.shards, np.random.default_rng(0)
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
        "format": "turns",
        "prompt": None,
        "untrained": 0,
        "found": {},
        "looks_like": None,
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
    header = {"tokenizer_sha256": "0" * 64, "formats": ["pairs"], "domains": ["captions"], "digest": 1}
    write_catalog(folder / "planned.catalog", Catalog(header, arrays))


def plan(folder: Path, size: Size, seq_length: int) -> dict:
    """Opens the stream over the catalog, resumes in the middle, plans global batches; seconds and bytes."""
    import numpy as np
    import psutil

    from tandem.data.planning.corpus import Corpus, SourceSettings
    from tandem.data.planning.stream import Stream, StreamConfig
    from tandem.data.vision import VisionSpec

    process, rows = psutil.Process(), size.batch_tokens // seq_length
    before, begin = process.memory_info().rss, time.perf_counter()
    source = SourceSettings(name="main", shards=(str(folder / "planned.catalog"),))
    corpus = Corpus.open([source], "0" * 64)
    config = StreamConfig(
        seq_length=seq_length,
        rows_per_step=rows,
        seed=0,
        vision=VisionSpec(MIN_PATCHES, MAX_PATCHES),
        video_budget=24576,
        video_levels=(640, 128),
        block_samples=size.block_samples,
        window_shards=size.window_shards,
        too_long="refuse",
        audio_seconds=0,
    )
    stream = Stream(corpus, config, lambda times: np.full(len(times), 8))
    middle = 7 * size.shards * size.samples // 10 // config.block_samples * config.block_samples
    stream.load_state(stream.state() | {"slot": middle})
    plans = [stream.next_step()]
    resumed = time.perf_counter() - begin
    times = []
    for _ in range(4):
        begin = time.perf_counter()
        plans.append(stream.next_step())
        times.append(time.perf_counter() - begin)
    return {
        "seq_length": seq_length,
        "resume_s": resumed,
        "plan_s": times,
        "bytes": process.memory_info().rss - before,
        "samples": plans[-1].shard_S.size,
        "fill": float(sum(plan.length_S.sum() for plan in plans) / (len(plans) * rows * seq_length)),
    }


def table(result: dict) -> str:
    """A row per row length."""
    settings = result["settings"]
    samples = settings["shards"] * settings["samples"]
    lines = [
        f"one core, a catalog of {settings['shards']:,} shards and {samples:,} samples, "
        f"global batches of {settings['batch_tokens']:,} tokens",
        f"{'row length':>10}{'samples':>9}{'plan s':>8}{'slowest':>9}{'open, resume, plan s':>22}"
        f"{'MiB more':>10}{'fill':>9}",
    ]
    for row in result["measured"]["rows"]:
        lines.append(
            f"{row['seq_length']:>10,}{row['samples']:>9,}{statistics.median(row['plan_s']):>8.2f}"
            f"{max(row['plan_s']):>9.2f}{row['resume_s']:>22.2f}{row['bytes'] / 2**20:>10.0f}{row['fill']:>9.2%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the catalog, for a process that plans
    parser.add_argument("--seq-length", type=int, help=argparse.SUPPRESS)  # of the rows that it plans
    options = results.parse(parser, argv)
    size = SIZES[options.size]
    if options.seq_length:
        print(json.dumps(plan(options.folder, size, options.seq_length)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_catalog(Path(folder), size)
        for length in size.seq_lengths:
            words = ["--seq-length", str(length), "--folder", folder, "--size", options.size]
            rows.append(alone("benchmarks/planning.py", *words))
    results.report("planning", options, asdict(size), {"rows": rows}, table, ["numpy"])


if __name__ == "__main__":
    main()
