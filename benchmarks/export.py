"""What it takes to write a model as a folder for transformers, beside `cp`, and to read one on several ranks.

    python benchmarks/export.py            20 GB, a quarter of an hour, mostly the disk's; needs 45 GB of it

A checkpoint of random weights, in fp32 as four ranks would cut it, is copied by `cp -r`, exported in a process of its
own, and copied again; the page cache is emptied of it before each, and each counts until the disk has everything.  The
export also compares every byte with its checksums.  Then four ranks under tp2.pp2.ep2 read an exported language model,
each its own slices.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import InRanks, alone, in_ranks

NOISE = 1 << 26  # random numbers, which all tensors begin with
RANKS = 4  # that wrote the checkpoint, and that read the folder
LAYOUT = ("parallel.tp=2", "parallel.pp=2", "parallel.ep=2")


@dataclass(frozen=True)
class Size:
    """Of the language model, of Qwen3-MoE's family."""

    layers: int
    width: int
    heads: int
    num_experts: int
    expert_width: int
    vocab_size: int


SIZES = {
    "docs": Size(layers=24, width=2048, heads=16, num_experts=32, expert_width=1024, vocab_size=32768),
    "toy": Size(layers=4, width=64, heads=4, num_experts=4, expert_width=64, vocab_size=384),
}
READ = Size(layers=4, width=256, heads=8, num_experts=8, expert_width=256, vocab_size=2048)  # by four ranks


def main(argv: list[str] | None = None, in_ranks: InRanks = in_ranks) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", help="where to write; a temporary folder if left out")
    parser.add_argument("--layers", type=int, help="of the language model; 24 make 20 GB")
    options = results.parse(parser, argv)
    size = SIZES[options.size]
    size = replace(size, layers=options.layers or size.layers)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measured = make_run(folder / "run", size)
        seconds = [copied(folder)]
        cold(folder / "run")
        measured |= {"export": alone("benchmarks/export.py", str(folder / "run"), str(folder / "exported"))}
        shutil.rmtree(folder / "exported")
        seconds.append(copied(folder))
        shutil.rmtree(folder / "run")
        make_run(folder / "small", SIZES["toy"] if options.size == "toy" else READ)
        alone("benchmarks/export.py", str(folder / "small"), str(folder / "read"), "llm")
        reading = in_ranks(RANKS, "benchmarks.export", "bytes_of_ranks", str(folder / "read"))
    measured |= {"cp_s": seconds, "import": reading}
    results.report("export", options, asdict(size), measured, table)


def overrides(size: Size, tokenizer: str) -> list[str]:
    sizes = {key: value for key, value in asdict(size).items() if key != "expert_width"}
    words = [f"model.llm.{key}={value}" for key, value in sizes.items()]
    words += [
        f"model.llm.expert_width={size.expert_width}",
        "model.llm.shared_expert_width=0",
        "model.llm.qk_norm=true",
    ]
    return [*words, f"model.llm.head_width={size.width // size.heads}", f"data.tokenizer={tokenizer}"]


def make_run(run_dir: Path, size: Size) -> dict:
    """A run's directory with one checkpoint of weights; bytes of it, and of its largest tensor."""
    import torch
    from omegaconf import OmegaConf

    from tandem.data.media.text import build_byte_tokenizer
    from tandem.train.checkpoints.checkpoint import TrainState, box_key, file_of
    from tandem.train.checkpoints.saving import publish
    from tandem.train.checkpoints.tensors import write_stream
    from tandem.train.config.settings import composed, read_config
    from tandem.train.families import of_model
    from tandem.train.models.towers.vision_tower import VisionTower

    run_dir.mkdir(parents=True)
    build_byte_tokenizer(run_dir / "tokenizer.json")
    words = ["+recipe=stage1", "scale=toy", *overrides(size, str(run_dir / "tokenizer.json"))]
    config = read_config(composed(words))
    (run_dir / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    model = config.model
    tower = VisionTower(model.encoder, model.connector, model.llm.width, "none")
    shapes = {name: tuple(parameter.shape) for name, parameter in tower.named_parameters()}
    shapes |= {f"llm.{tensor.name}": tensor.shape for tensor in of_model(model.llm).tensors(model.llm)}
    final = run_dir / "checkpoints/step-00000001"
    staging, reports = final.with_name(".written"), []
    staging.mkdir(parents=True)
    noise_N = torch.randn(NOISE)
    for rank in range(RANKS):
        boxes = []
        for name, shape in shapes.items():
            begin, end = (shape[0] * place // RANKS for place in (rank, rank + 1))
            if begin < end:
                rest = tuple(0 for _ in shape[1:])
                boxes.append((name, "param", shape, (begin, *rest), (end - begin, *shape[1:])))
        header = {box_key(name, kind, corner): (torch.float32, extent) for name, kind, _, corner, extent in boxes}
        tensors = (noise_of(noise_N, extent) for *_, extent in boxes)
        facts = write_stream(staging / file_of(rank), header, tensors)
        reports.append((boxes, facts, {}, None))
    publish(staging, final, TrainState(1, {}, {}, "language"), reports)
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    return {"bytes": sum(path.stat().st_size for path in final.iterdir()), "largest_bytes": 4 * largest}


def noise_of(noise_N, shape: tuple[int, ...]):
    """Random numbers, repeated where there are too few."""
    import torch

    count = torch.Size(shape).numel()
    repeats = -(-count // len(noise_N))
    return noise_N.repeat(repeats)[:count].view(shape) if repeats > 1 else noise_N[:count].view(shape)


def copied(folder: Path) -> float:
    """Seconds that `cp -r` takes with the checkpoint, until it is on the disk."""
    cold(folder / "run")
    begin = time.perf_counter()
    subprocess.run(["cp", "-r", str(folder / "run"), str(folder / "copy")], check=True)
    for path in (folder / "copy").rglob("*"):
        if path.is_file():
            flush(path)
    seconds = time.perf_counter() - begin
    shutil.rmtree(folder / "copy")
    return seconds


def flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def cold(folder: Path) -> None:
    """Empties the page cache of a folder's files."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def export(run: str, folder: str, part: str = "all") -> None:
    """Exports in this process; prints seconds and the most memory that was resident."""
    import resource

    from tandem.launch.checkpoint import main as command

    begin = time.perf_counter()
    try:
        command(["export", run, folder, "--format", "hf", "--part", part])
    except SystemExit as end:
        assert not end.code, end.code
    seconds = time.perf_counter() - begin
    print(json.dumps({"s": seconds, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))


def bytes_of_ranks(folder: str) -> dict:
    """One rank: bytes that all ranks read of a folder, of tensors that each rank has whole and of all others."""
    import torch
    import torch.distributed as dist

    from tandem.train.build import build_engines
    from tandem.train.config.checks import check_config
    from tandem.train.config.settings import composed, read_config
    from tandem.train.families import open_folder
    from tandem.train.objectives.language import train_forward, train_loss

    config = read_config(composed(["+recipe=stage1", "scale=toy", f"model.llm.folder={folder}", *LAYOUT]))
    layout = check_config(config, dist.get_world_size())
    engines = build_engines(config, layout, torch.device("cpu"), forward=train_forward, loss=train_loss)
    source = open_folder(config.model.llm)
    read, whole = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)

    def counted(name: str, kind: str, start: tuple[int, ...], size: tuple[int, ...]) -> torch.Tensor:
        values = source.read(name, kind, start, size)
        read[int(shared(name))] += values.nbytes
        return values

    engines.llm.load(counted, optimizer=False)
    dist.all_reduce(read)
    for name, tensor in source.tensors.items():
        whole[int(shared(name))] += 4 * torch.Size(tensor.shape).numel()
    cut, replicated = zip(read.tolist(), whole.tolist(), strict=True)
    return {"cut": cut, "replicated": replicated}


def shared(name: str) -> bool:
    """Whether ranks of a tensor-parallel group all need the whole tensor."""
    return "layernorm" in name or "router" in name


def table(result: dict) -> str:
    """Speed beside that of `cp`, memory beside its limit, and bytes read over bytes there."""
    measured = result["measured"]
    size, out = measured["bytes"], measured["export"]
    copy_s = sum(measured["cp_s"]) / len(measured["cp_s"])
    limit = 1e9 + 3 * measured["largest_bytes"]
    (read, there), (again, small) = measured["import"]["cut"], measured["import"]["replicated"]
    return "\n".join(
        [
            f"export of {size / 1e9:.1f} GB, largest tensor {measured['largest_bytes'] / 1e6:,.0f} MB",
            f"  cp -r {size / 1e9 / copy_s:.2f} GB/s   export {size / 1e9 / out['s']:.2f} GB/s   "
            f"{copy_s / out['s']:.0%} of its speed",
            f"  peak resident memory {out['peak_bytes'] / 1e9:.2f} GB, limit {limit / 1e9:.2f} GB",
            f"import on {RANKS} ranks, tp2.pp2.ep2, {(there + small) / 1e6:.1f} MB",
            f"  bytes read over bytes there: {read / there:.3f} of tensors that ranks divide, "
            f"{again / small:.2f} of norms and routers",
        ]
    )


if __name__ == "__main__":
    if len(sys.argv) > 2 and not sys.argv[1].startswith("-"):
        export(*sys.argv[1:])
    else:
        main()
