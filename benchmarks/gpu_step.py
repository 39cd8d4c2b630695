"""Real training steps on one GPU: the full-size encoder and adapter, and as many MoE layers as fit with optimizers.

    python benchmarks/gpu_step.py                          rows of 32,768 tokens with photographs, then of text alone
    python benchmarks/gpu_step.py --layers 4 --rows 2
    python benchmarks/gpu_step.py --device cpu --size toy  every path in a few seconds, figures of no worth

The trainer, reader and schedule of stage 1, on shards made from the photographs of scikit-image: cut, scaled to areas
log-uniform in 196 to 6,400 patches, each with as much text as it has tokens.  The layers are those of a model with 30
billion parameters of which 3 are active.  Memory stands beside the formulas of train/cost/memory.py.
"""

import argparse
import gc
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.workloads import language, tower
from tandem.data.media.text import Tokenizer, build_byte_tokenizer
from tandem.data.shards.indexing import build_index
from tandem.data.synthesis.maker import dialogue, load_sources
from tandem.parallel.engines import llm_shards
from tandem.parallel.grid import destroy_grid
from tandem.parallel.layout import Layout
from tandem.parallel.runtime.phases import PhaseTimer
from tandem.train.build import local_device, start_world
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.config.settings import composed, read_config
from tandem.train.cost import memory
from tandem.train.input.dataset import open_data
from tandem.train.tasks import find

GIB = 2**30
CONTENTS = ("photographs", "text")
WARM = 3  # steps before those that are measured: they compile


@dataclass(frozen=True)
class Size:
    """seq: tokens of a row.  rows: of a step, a micro-batch each.  samples: in the shard.  smallest, largest: patches
    of a photograph."""

    seq: int = 32768
    rows: int = 1
    layers: int = 5
    steps: int = 8
    samples: int = 300
    smallest: int = tower.SMALLEST
    largest: int = tower.LARGEST
    recompute: str = "selective"
    encoder_recompute: str = "selective"


TOY = Size(seq=512, layers=2, steps=2, samples=40, smallest=16, largest=200)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, help="of the LLM")
    parser.add_argument("--rows", type=int, help="of a step")
    parser.add_argument("--steps", type=int, help="that are measured")
    parser.add_argument("--recompute", help="of the LLM: train.recompute")
    parser.add_argument("--encoder-recompute", help="of the encoder: parallel.encoder.recompute")
    options = results.parse(parser, argv)
    if (options.device == "cpu") is not (options.size == "toy"):
        parser.error("full size is for a GPU, and a toy for a CPU: --device cpu --size toy")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --device cpu --size toy runs everything at toy size")
    size = TOY if options.size == "toy" else Size()
    given = {name: getattr(options, name) for name in asdict(size) if getattr(options, name, None)}
    size = Size(**asdict(size) | given)
    device, measured = local_device(), {}
    start_world(device)
    llm_shards.initialize = draw_quickly
    with tempfile.TemporaryDirectory() as folder:
        for content in CONTENTS:
            write_shard(Path(folder), content, size)
        for content in CONTENTS:
            measured[content] = steps_of(content, settings(Path(folder), content, size), device)
            print(f"{content}: {measured[content]}", flush=True)
    dist.destroy_process_group()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    packages = ("megatron-core", "deepspeed", "flash-attn-4", "triton")
    results.report("gpu_step", options, asdict(size), measured, table, packages, name)


# ---- data ------------------------------------------------------------------------------------------------------------


def photographs(size: Size) -> Iterator[tuple[str, bytes]]:
    """(subject, JPEG) of cuts that are scaled to a drawn area and shape."""
    draw, known = np.random.default_rng(0), list(load_sources().photographs.items())
    while True:
        subject, pixels = known[draw.integers(len(known))]
        area = np.exp(draw.uniform(np.log(size.smallest), np.log(size.largest))) * tower.VISION.patch_size**2
        shape = np.exp(draw.uniform(-tower.ASPECT, tower.ASPECT))
        height, width = (max(28, round(float(side))) for side in ((area * shape) ** 0.5, (area / shape) ** 0.5))
        scale = min(1.0, pixels.shape[0] / height, pixels.shape[1] / width) * draw.uniform(0.7, 1)
        tall, wide = int(height * scale), int(width * scale)
        top, left = draw.integers(pixels.shape[0] - tall + 1), draw.integers(pixels.shape[1] - wide + 1)
        file = io.BytesIO()
        cut = Image.fromarray(pixels[top : top + tall, left : left + wide]).resize((width, height))
        cut.save(file, "JPEG", quality=90)
        yield subject, file.getvalue()


def write_shard(folder: Path, content: str, size: Size) -> None:
    """A tar of samples with its index, and the tokenizer."""
    from webdataset import TarWriter

    build_byte_tokenizer(folder / "tokenizer.json")
    draw, path = np.random.default_rng(1), folder / f"{content}.tar"
    source = photographs(size)
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for number in range(size.samples):
            key = f"{content}-{number:06d}"
            pictured = content == "photographs"
            subject, image = next(source) if pictured else ("nothing", b"")
            length = int(size.seq / 80 * draw.uniform(0.5, 1.5) * (1 if pictured else 2))
            answer = f"{subject}: " + "".join(chr(letter) for letter in draw.integers(97, 123, length))
            turns = dialogue("<image>What is this?" if pictured else "What is this?", answer)
            sample = {"__key__": key, "json": json.dumps({"key": key, "domain": content, "turns": turns}).encode()}
            writer.write(sample | ({"0.jpg": image} if pictured else {}))
    build_index(path, Tokenizer(folder / "tokenizer.json"))


def settings(folder: Path, content: str, size: Size) -> Config:
    """Those of stage 1, with these layers."""
    keys = [
        "+recipe=stage1",
        f"data.sources.main.shards=['{folder}/{content}.tar']",
        f"data.tokenizer={folder}/tokenizer.json",
        f"train.seq_length={size.seq}",
        f"train.global_batch_size={size.rows}",
        f"train.steps={WARM + size.steps}",
        f"train.recompute={size.recompute}",
        f"parallel.encoder.recompute={size.encoder_recompute}",
        f"model.llm.layers={size.layers}",
        "logger.wandb=disabled",
        "data.sources.main.repeat=1000",
    ]
    if size.seq < 4096:
        return read_config(composed(["scale=toy", *keys]))
    model = language.SLICE
    for name in ("width", "heads", "kv_heads", "head_width", "vocab_size", "num_experts", "top_k", "expert_width"):
        keys.append(f"model.llm.{name}={getattr(model, name)}")
    return read_config(composed([*keys, "data.max_patches=6400"]))


@torch.no_grad()
def draw_quickly(chunk: torch.nn.Module, seed: int, std: float, layers: int) -> None:
    """Matrices normal(0, std) of a few million numbers again and again, vectors one: a run's draws take a minute."""
    pool = torch.randn(4_194_301, generator=torch.Generator().manual_seed(seed)) * std
    for parameter in chunk.parameters():
        numel = parameter.numel()
        repeated = pool.repeat(-(-numel // len(pool)))[:numel] if parameter.dim() > 1 else torch.ones(numel)
        parameter.copy_(repeated.view_as(parameter))


# ---- steps -----------------------------------------------------------------------------------------------------------


def steps_of(content: str, config: Config, device: torch.device) -> dict:
    """Times, model FLOPs and memory of the measured steps."""
    layout, data = check_config(config, 1), open_data(config)
    before = allocated(device)
    trainer = find(config.task).trainer(config, layout, device, data)
    held = allocated(device) - before
    timer, measured = PhaseTimer(device), []
    batches = trainer.steps(config.train.steps)
    for step in range(config.train.steps):
        if step == WARM:
            reset_peak(device)
        begin = time.perf_counter()
        with timer.phase("wait"):
            prepared, batch = next(batches)
        output = trainer.step(batch, timer=timer, stop=False, accept=lambda loss, norm: True)
        prepared.release()
        facts = trainer.facts(prepared, output)
        seconds = time.perf_counter() - begin
        phases = timer.take()
        patches = int(prepared.plan.patches_I.sum())
        print(f"  {content}, step {step + 1}: {1e3 * seconds:,.0f} ms, {patches:,} patches", flush=True)
        if step >= WARM:
            measured.append((seconds, facts, prepared.plan, phases))
    peak, chunks = peak_of(device) - before, largest_chunks(measured, config)
    data.reader.close()
    del trainer, batches, prepared, batch, output
    destroy_grid()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return summary(measured) | {
        "held_gib": held / GIB,
        "peak_gib": peak / GIB,
        "formula_gib": {name: part / GIB for name, part in formula(config, layout, chunks).items()},
    }


def summary(measured: list[tuple]) -> dict:
    seconds = [one for one, *_ in measured]
    total = sum(seconds)
    names = measured[-1][3]
    return {
        "seconds": statistics.median(seconds),
        "spread": (max(seconds) - min(seconds)) / statistics.median(seconds),
        "tokens_per_s": sum(facts.tokens for _, facts, *_ in measured) / total,
        "tflops": sum(facts.flops for _, facts, *_ in measured) / total / 1e12,
        "tflop": statistics.mean(facts.flops for _, facts, *_ in measured) / 1e12,
        "encoder_tflop": statistics.mean(facts.encoder_flops for _, facts, *_ in measured) / 1e12,
        "patches": statistics.mean(int(plan.patches_I.sum()) for *_, plan, _ in measured),
        "images": statistics.mean(len(plan.patches_I) for *_, plan, _ in measured),
        "fill": statistics.mean(facts.more["fill"] for _, facts, *_ in measured),
        "phases_ms": {name: 1e3 * statistics.median(p.get(name, 0.0) for *_, p in measured) for name in names},
    }


def largest_chunks(measured: list[tuple], config: Config) -> int:
    """Chunks of the encoder in the step with the most patches."""
    patches = max(int(plan.patches_I.sum()) for *_, plan, _ in measured)
    return max(1, -(-patches // config.parallel.encoder.chunk_patches))


def formula(config: Config, layout: Layout, chunks: int) -> dict[str, int]:
    """Bytes by the formulas: what stays between steps, and the peak, of encoder and LLM together."""
    element = config.train.dtype.itemsize
    encoder = memory.encoder_memory(
        config.model.encoder,
        config.model.connector,
        config.model.llm.width,
        chunk_patches=config.parallel.encoder.chunk_patches,
        chunks=chunks,
        recompute=config.parallel.encoder.recompute,
        zero_stage=config.parallel.encoder.zero_stage,
        world=1,
        element=element,
    )
    stage = memory.stage_memory(
        config.model.llm,
        layout,
        stage=0,
        row_tokens=config.train.seq_length,
        micro_batches=config.train.global_batch_size,
        recompute=config.train.recompute,
        element=element,
    )
    parts = {name: getattr(encoder, name) + getattr(stage, name) for name in asdict(encoder)}
    return parts | {"at_hand": max(encoder.at_hand, stage.at_hand)}


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_of(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


# ---- table -----------------------------------------------------------------------------------------------------------


def table(result: dict) -> str:
    size, measured, gpu = result["settings"], result["measured"], result["machine"]["gpu"]
    lines = [
        f"{gpu or 'CPU'}: encoder, adapter and {size['layers']} MoE layers, {size['rows']} rows of {size['seq']:,} "
        f"tokens, recompute {size['recompute']}, encoder {size['encoder_recompute']}",
        f"{'':14}{'ms':>9}{'spread':>8}{'tokens/s':>11}{'TFLOP':>8}{'encoder':>9}{'TFLOP/s':>9}{'images':>8}{'fill':>7}"
        f"{'GiB held':>10}{'formula':>9}{'GiB peak':>10}{'formula':>9}",
    ]
    for content in CONTENTS:
        of = measured[content]
        whole = sum(of["formula_gib"].values())
        held = sum(of["formula_gib"][name] for name in ("weights", "gradients", "optimizer"))
        lines.append(
            f"{content:14}{1e3 * of['seconds']:>9,.1f}{of['spread']:>8.0%}{of['tokens_per_s']:>11,.0f}"
            f"{of['tflop']:>8.1f}{of['encoder_tflop']:>9.1f}{of['tflops']:>9.1f}{of['images']:>8.0f}{of['fill']:>7.0%}"
            f"{of['held_gib']:>10.1f}{held:>9.1f}{of['peak_gib']:>10.1f}{whole:>9.1f}"
        )
    for content in CONTENTS:
        phases = measured[content]["phases_ms"].items()
        lines.append(f"{content}, ms: " + ", ".join(f"{name} {value:,.1f}" for name, value in phases))
    mixed, text = measured["photographs"], measured["text"]
    extra = mixed["seconds"] - text["seconds"]
    if extra > 0:
        rate = mixed["encoder_tflop"] / extra
        lines.append(f"photographs cost {1e3 * extra:,.1f} ms more, {rate:,.0f} TFLOP/s of the encoder's FLOPs")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
