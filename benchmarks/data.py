"""How fast samples reach a training process, ours and three peers' loaders in one run on the same shards.

    python benchmarks/data.py            about four minutes on two cores; needs the extra `bench` for megatron-energon

Every loader has two workers and does the same work for a sample: read it, decode its JPEG, resize to multiples of 28,
cut patches, tokenise the text, and hand packed arrays to the main process.  Ours also packs rows, checks every member's
checksum and can stop and resume at any step.  Each loader runs in a fresh process, in turns, several times; the table
shows the median of samples a second, CPU milliseconds of all its processes for a sample, and the ratio to ours.
"""

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import alone

WORKERS = 2
BATCH = 16  # samples a batch of the peers
SHARD_SAMPLES = 128
MIN_PATCHES, MAX_PATCHES, MAX_PIXELS = 4, 16384, 1 << 27
ROLES = ("assistant",)


@dataclass(frozen=True)
class Size:
    """samples: of the corpus.  sides: of its images, in pixels.  warm_s, measure_s: of each loader.  rounds: of all."""

    samples: int
    sides: tuple[int, int]
    warm_s: float
    measure_s: float
    rounds: int


SIZES = {"docs": Size(1536, (200, 1000), warm_s=3.0, measure_s=8.0, rounds=3), "toy": Size(256, (28, 56), 0.0, 0.01, 1)}

# ---------------------------------------------------------------------------------------------------------------------
# The corpus: crops of photographs, as webdataset shards, as an indexed folder, and prepared for energon


def make(folder: Path, size: Size) -> None:
    """JPEG crops of scikit-image's photographs with captions of 20 to 120 words."""
    import importlib.util

    import numpy as np
    from PIL import Image
    from webdataset import TarWriter

    from tandem.data.media.text import Tokenizer, build_byte_tokenizer
    from tandem.data.shards.indexing import build_index

    source = Path(importlib.util.find_spec("skimage").origin).parent / "data"
    names = ("astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "motorcycle_left.png")
    photographs = [Image.open(source / name).convert("RGB") for name in names]
    draw = np.random.default_rng(0)
    words = np.array(
        ["a", "the", "photograph", "of", "shows", "large", "small", "red", "left", "beside", "person", "cup"]
    )
    shards, files = folder / "shards", folder / "files"
    shards.mkdir(parents=True)
    files.mkdir()
    build_byte_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    for shard in range(size.samples // SHARD_SAMPLES):
        path = shards / f"train-{shard:04d}.tar"
        with TarWriter(str(path), encoder=False, mtime=0) as writer:
            for i in range(shard * SHARD_SAMPLES, (shard + 1) * SHARD_SAMPLES):
                width, height = draw.integers(*size.sides, 2).tolist()
                photograph = photographs[draw.integers(len(photographs))]
                x, y = (draw.random(2) * 0.3 * np.array(photograph.size)).astype(int).tolist()
                crop = photograph.crop((x, y, *photograph.size)).resize((width, height), Image.Resampling.BICUBIC)
                file = io.BytesIO()
                crop.save(file, "JPEG", quality=88)
                turns = [
                    {"role": "user", "text": "<image>Describe the image."},
                    {"role": "assistant", "text": " ".join(draw.choice(words, draw.integers(20, 120)))},
                ]
                content = json.dumps({"domain": "caption", "turns": turns}).encode()
                writer.write({"__key__": f"s{i:06d}", "json": content, "0.jpg": file.getvalue()})
                (files / f"s{i:06d}.json").write_bytes(content)
                (files / f"s{i:06d}.jpg").write_bytes(file.getvalue())
        build_index(path, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# The work for one sample, and the peers


class Work:
    """Decodes and tokenises one sample with the same functions as ours."""

    def __init__(self, folder: Path):
        from tandem.data.media.text import Tokenizer

        self.tokenizer = Tokenizer(folder / "tokenizer.json")

    def __call__(self, sample: dict) -> dict:
        import torch

        from tandem.data.media.image import decode_image, image_size
        from tandem.data.vision import VisionSpec

        image = sample["0.jpg"]
        height, width = image_size(io.BytesIO(image), MAX_PIXELS)
        vision = VisionSpec(MIN_PATCHES, MAX_PATCHES)
        grid = vision.views(height, width).tolist()
        patches = vision.cut(decode_image(image, MAX_PIXELS, vision.pixels_hw(grid)))
        turns = json.loads(sample["json"])["turns"]
        encoded = self.tokenizer.encode_sample(turns, ROLES, ("image",), "sample")
        return {
            "patches": torch.from_numpy(patches.copy()),
            "grid": torch.tensor(grid),
            "tokens": torch.from_numpy(encoded.tokens_T),
            "trained": torch.from_numpy(encoded.trained_T),
        }


def collate(samples: list[dict]) -> dict:
    """Packs a batch as ours packs a step: arrays end to end, and how many samples they hold."""
    import torch

    packed = {key: torch.cat([sample[key] for sample in samples]) for key in ("patches", "tokens", "trained")}
    return packed | {"grid": torch.stack([sample["grid"] for sample in samples]), "samples": len(samples)}


def webdataset_batches(folder: Path):
    """webdataset: a shuffled stream of tars into torch's DataLoader."""
    import webdataset

    work = Work(folder)
    shards = [str(path) for path in sorted((folder / "shards").glob("*.tar"))]
    stream = webdataset.WebDataset(shards, shardshuffle=len(shards), resampled=False, empty_check=False, seed=0)
    stream = stream.shuffle(SHARD_SAMPLES).map(work).batched(BATCH, collation_fn=collate).repeat()
    yield from webdataset.WebLoader(stream, batch_size=None, num_workers=WORKERS)


class Folder:
    """A torch map-style dataset: one file an image, one a json."""

    def __init__(self, folder: Path):
        self.files, self.work = sorted((folder / "files").glob("*.json")), Work(folder)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i: int) -> dict:
        path = self.files[i]
        return self.work({"json": path.read_bytes(), "0.jpg": path.with_suffix(".jpg").read_bytes()})


def dataloader_batches(folder: Path):
    """torch's DataLoader over an indexed folder, shuffled."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Folder(folder), BATCH, shuffle=True, num_workers=WORKERS, collate_fn=collate, persistent_workers=True
    )
    while True:
        yield from loader


def energon_batches(folder: Path):
    """megatron-energon's savable loader."""
    from megatron import energon

    work = Work(folder)

    class Encoder(energon.DefaultTaskEncoder):
        decoder = None
        cookers = (energon.Cooker(energon.stateless(lambda sample: dict(sample))),)

        @energon.stateless
        def encode_sample(self, sample):
            return work({"json": sample["json"], "0.jpg": sample["0.jpg"]})

        def batch(self, samples):
            return collate(samples)

    workers = energon.WorkerConfig(rank=0, world_size=1, num_workers=WORKERS)
    dataset = energon.get_train_dataset(
        folder / "energon",
        worker_config=workers,
        batch_size=BATCH,
        shuffle_buffer_size=SHARD_SAMPLES,
        max_samples_per_sequence=None,
        task_encoder=Encoder(),
    )
    yield from energon.get_savable_loader(dataset)


def prepare_energon(folder: Path) -> None:
    """Indexes the same shards for energon, in a folder of their own."""
    (folder / "energon").mkdir(exist_ok=True)
    for shard in (folder / "shards").glob("*.tar"):
        link = folder / "energon" / shard.name
        if not link.exists():
            os.link(shard, link)
    command = [sys.executable, "-m", "megatron.energon.cli.main", "prepare", str(folder / "energon")]
    command += ["--non-interactive", "--split-ratio", "1,0,0", "--sample-type", "CrudeWebdataset", "--num-workers", "2"]
    subprocess.run(command, check=True, capture_output=True, text=True)


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def open_ours(folder: Path, seq_length: int = 8192, rows: int = 2):
    """(stream, reader factory) over the corpus, as training opens them."""
    from tandem.data.media.text import Tokenizer
    from tandem.data.planning.corpus import Corpus, SourceSettings
    from tandem.data.planning.stream import Stream, StreamConfig
    from tandem.data.reading.reader import ShardReader
    from tandem.data.vision import VisionSpec

    tokenizer = Tokenizer(folder / "tokenizer.json")
    source = SourceSettings(name="main", shards=(f"{folder}/shards/*.tar",), train_roles=ROLES)
    corpus = Corpus.open([source], tokenizer.sha256)
    config = StreamConfig(
        seq_length=seq_length,
        rows_per_step=rows,
        seed=0,
        vision=VisionSpec(MIN_PATCHES, MAX_PATCHES),
        video_budget=seq_length,
        video_levels=(64,),
        block_samples=1024,
        window_shards=32,
        too_long="refuse",
        audio_seconds=0,
    )
    return Stream(corpus, config, tokenizer.stamp_lengths), lambda: ShardReader(
        corpus, tokenizer, VisionSpec(), MAX_PIXELS, WORKERS
    )


def our_batches(folder: Path):
    """Steps of the stream, read two ahead as training does."""
    import numpy as np

    stream, open_reader = open_ours(folder)
    reader, pending = open_reader(), []
    rows = np.arange(stream.config.rows_per_step)
    try:
        while True:
            while len(pending) < 3:
                plan = stream.next_step()
                pending.append((plan, reader.begin(plan, np.arange(plan.tokens_I.size), rows)))
            plan, reading = pending.pop(0)
            images, text = reader.finish(reading)
            if images.failures or text.failures:
                raise RuntimeError(str((images.failures + text.failures)[0]))
            yield {"samples": plan.shard_S.size, "patches": images.patches_NP, "tokens": text.tokens}
            images.release()
    finally:
        reader.close()


LOADERS = {
    "tandem": our_batches,
    "webdataset": webdataset_batches,
    "torch DataLoader, folder": dataloader_batches,
    "megatron-energon": energon_batches,
}


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def measure(name: str, folder: Path, size: Size) -> dict:
    """Samples a second and CPU seconds a sample of one loader, in this process and its children."""
    import psutil

    batches = LOADERS[name](folder)
    begin = time.perf_counter()
    next(batches)
    while time.perf_counter() - begin < size.warm_s:
        next(batches)
    me = psutil.Process()
    cpu, begin, samples = cpu_seconds(me), time.perf_counter(), 0
    while time.perf_counter() - begin < size.measure_s:
        samples += next(batches)["samples"]
    seconds = time.perf_counter() - begin
    return {"samples_per_s": samples / seconds, "cpu_s_per_sample": (cpu_seconds(me) - cpu) / samples}


def cpu_seconds(process) -> float:
    """User and system time so far of a process and all below it."""
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def compare(folder: Path, size_name: str) -> list[dict]:
    """Figures of every loader, round after round; a loader that is not installed has a reason instead."""
    names, missing = list(LOADERS), []
    try:
        prepare_energon(folder)
    except (OSError, subprocess.CalledProcessError):
        names.remove("megatron-energon")
        missing.append({"name": "megatron-energon", "reason": "not installed: pip install 'tandem[bench]'"})
    found = {name: [] for name in names}
    for _ in range(SIZES[size_name].rounds):
        for name in names:
            words = ["--loader", name, "--folder", str(folder), "--size", size_name]
            found[name].append(alone("benchmarks/data.py", *words))
    keys = ("samples_per_s", "cpu_s_per_sample")
    return [{"name": name, **{key: [one[key] for one in found[name]] for key in keys}} for name in names] + missing


def table(result: dict) -> str:
    """A row per loader."""
    settings, rows = result["settings"], result["measured"]["loaders"]
    ours = statistics.median(rows[0]["samples_per_s"])
    title, (smallest, largest) = f"loader, {WORKERS} workers", settings["sides"]
    lines = [
        f"{settings['samples']:,} JPEGs of {smallest} to {largest} pixels a side with captions",
        f"{title:<26}{'samples/s':>10}{'CPU ms/sample':>15}{'tandem speedup':>16}",
    ]
    for row in rows:
        if reason := row.get("reason"):
            lines.append(f"{row['name']:<26}  {reason}")
            continue
        rate, cpu_ms = statistics.median(row["samples_per_s"]), 1e3 * statistics.median(row["cpu_s_per_sample"])
        lines.append(f"{row['name']:<26}{rate:>10.1f}{cpu_ms:>15.2f}{ours / rate:>15.2f}x")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # of the corpus, for a process that reads
    parser.add_argument("--loader", choices=LOADERS, help=argparse.SUPPRESS)  # that it reads with
    options = results.parse(parser, argv)
    size = SIZES[options.size]
    if options.loader:
        print(json.dumps(measure(options.loader, options.folder, size)))
        return
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), size)
        loaders = compare(Path(folder), options.size)
    peers = ["webdataset", "megatron-energon"]
    results.report("data", options, asdict(size), {"loaders": loaders}, table, peers)


if __name__ == "__main__":
    main()
