"""How fast data becomes shards and indexes: an import of LLaVA JSON beside Python's tarfile, indexing pairs and turns.

    python benchmarks/imports.py         about two minutes on two cores

The peer is what people write for themselves: two processes, each with half of the records, that read every JPEG, check
its header with Pillow and write JSON and image with tarfile.  Ours does the same with two workers, finds the format,
counts what it leaves out, and can go on after a kill.  Each way runs in fresh processes, in turns; the table has the
median of samples a second, process start included, and the memory of all processes of an import at its peak.
"""

import argparse
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import one_thread

WORKERS = 2
WAYS = ("tarfile", "import", "import and index", "index turns", "index pairs")


@dataclass(frozen=True)
class Size:
    """samples: of the corpus.  sides: of its images, in pixels.  rounds: of all ways."""

    samples: int
    sides: tuple[int, int]
    rounds: int


SIZES = {"docs": Size(20_000, (100, 300), rounds=2), "toy": Size(40, (28, 56), rounds=1)}

# ---------------------------------------------------------------------------------------------------------------------
# The corpus


def make(folder: Path, size: Size) -> None:
    """JPEG crops of a photograph with a question and an answer, as LLaVA's JSON and as shards of turns and of pairs."""
    import importlib.util

    import numpy as np
    from PIL import Image

    from tandem.data.media.text import build_byte_tokenizer

    source = Path(importlib.util.find_spec("skimage").origin).parent / "data" / "chelsea.png"
    photograph, draw = Image.open(source).convert("RGB"), np.random.default_rng(0)
    build_byte_tokenizer(folder / "tokenizer.json")
    (folder / "images").mkdir()
    records = []
    for i in range(size.samples):
        width, height = draw.integers(*size.sides, 2).tolist()
        x, y = draw.integers(0, 100, 2).tolist()
        photograph.crop((x, y, x + width, y + height)).save(folder / "images" / f"{i:06}.jpg", "JPEG", quality=85)
        said = [("human", "<image>\nWhat is in the picture?"), ("gpt", f"A cat, for the {i}th time. " * 8)]
        turns = [{"from": role, "value": value} for role, value in said]
        records.append({"id": f"{i:06}", "image": f"{i:06}.jpg", "conversations": turns})
    (folder / "llava.json").write_text(json.dumps(records))
    for kind in ("turns", "pairs"):
        with tarfile.open(folder / f"{kind}.tar", "w") as tar:
            for i, record in enumerate(records):
                data = (folder / "images" / f"{i:06}.jpg").read_bytes()
                caption = record["conversations"][1]["value"]
                said = json.dumps({"turns": turns_of(record)}) if kind == "turns" else caption
                names = ("json", "0.jpg") if kind == "turns" else ("txt", "jpg")
                for name, content in zip(names, (said.encode(), data), strict=True):
                    add(tar, f"{i:06}.{name}", content)


def turns_of(record: dict) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[turn["from"]], "text": turn["value"]} for turn in record["conversations"]]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# ---------------------------------------------------------------------------------------------------------------------
# The ways


def write_half(half: int, folder: str, out: str) -> None:
    """The peer's process."""
    from PIL import Image

    records = json.loads((Path(folder) / "llava.json").read_bytes())
    middle = len(records) // 2
    with tarfile.open(f"{out}/{half}.tar", "w") as tar:
        for i, record in enumerate(records[middle:] if half else records[:middle]):
            with open(f"{folder}/images/{record['image']}", "rb") as file:
                data = file.read()
            Image.open(io.BytesIO(data)).size  # noqa: B018 (reads the header)
            add(tar, f"{half}-{i:06}.json", json.dumps({"turns": turns_of(record)}).encode())
            add(tar, f"{half}-{i:06}.0.jpg", data)


def write_with_tarfile(folder: str, out: str) -> None:
    """The peer."""
    Path(out).mkdir()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=write_half, args=(half, folder, out)) for half in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def command(way: str, folder: str, out: str, samples: int) -> list[str]:
    """The command line of a way."""
    if way == "tarfile":
        return ["benchmarks/imports.py", "--tarfile", folder, out]
    if way.startswith("index "):
        words = ["launch/index_shards.py", f"{folder}/{way.split()[1]}.tar", "--force", "--workers", "1"]
        return [*words, "--tokenizer", f"{folder}/tokenizer.json"]
    words = ["launch/import_data.py", f"{folder}/llava.json", "--images", f"{folder}/images", "--out", out]
    words += ["--workers", str(WORKERS), "--shard-samples", str(max(samples // (2 * WORKERS), 1))]
    return [*words, *(["--tokenizer", f"{folder}/tokenizer.json"] if way == "import and index" else [])]


def measured(words: list[str]) -> tuple[float, int]:
    """(seconds, bytes that all its processes held at most at once) of a Python program."""
    import psutil

    begin, most = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, *words], cwd=results.ROOT, env=one_thread(), stdout=subprocess.DEVNULL)
    while process.poll() is None:
        most = max(most, sum(map(held, [psutil.Process(process.pid), *children(process.pid)])))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(words)} failed with exit code {process.returncode}")
    return time.perf_counter() - begin, most


def children(pid: int) -> list:
    import psutil

    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def held(process) -> int:
    import psutil

    try:
        return process.memory_info().rss
    except psutil.Error:
        return 0


def table(result: dict) -> str:
    """A row per way."""
    settings, ways = result["settings"], result["measured"]["ways"]
    seconds = {way: statistics.median(one["seconds"]) for way, one in ways.items()}
    lines = [
        f"{settings['samples']:,} JPEGs of {settings['sides'][0]} to {settings['sides'][1]} pixels a side, "
        f"{WORKERS} processes; indexing with one",
        f"{'':18}{'samples/s':>10}{'MiB at most':>13}  ratio",
    ]
    peers = {"import": "tarfile", "import and index": "tarfile", "index pairs": "index turns"}
    for way, one in ways.items():
        ratio = f"{seconds[peers[way]] / seconds[way]:.2f}x of {peers[way]}" if way in peers else ""
        rate = settings["samples"] / seconds[way]
        lines.append(f"{way:18}{rate:>10,.0f}{max(one['bytes']) / 2**20:>13,.0f}  {ratio}".rstrip())
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tarfile", nargs=2, help=argparse.SUPPRESS)  # folder and output, for the peer's process
    options = results.parse(parser, argv)
    if options.tarfile:
        write_with_tarfile(*options.tarfile)
        return
    size = SIZES[options.size]
    ways = {way: {"seconds": [], "bytes": []} for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), size)
        for round in range(size.rounds):
            for way, one in ways.items():
                seconds, most = measured(
                    command(way, folder, f"{folder}/{way.replace(' ', '-')}-{round}", size.samples)
                )
                one["seconds"].append(seconds)
                one["bytes"].append(most)
            os.sync()
    results.report("imports", options, asdict(size), {"ways": ways}, table, ["pillow"])


if __name__ == "__main__":
    main()
