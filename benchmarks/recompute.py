"""What each setting of `parallel.encoder.recompute` and `train.recompute` costs in time and keeps in memory.

    taskset -c 0 python benchmarks/recompute.py       a minute and a half; on one core, where other work does not count

Forward and backward of an encoder of 6 x 256 over 2,048 patches and of 4 LLM layers of 256 with 16 experts over 2,048
tokens, fp32: processor time, median of rounds in which all settings take turns; all gradients must be equal to the bit.
What is kept is the memory that a forward leaves behind, by torch's profiler, median of three.  Beside it stands what
formulas in the code say of larger ones in bf16: the report's encoder over 32,076 patches, and four layers of 2,048 with
128 experts over 32,768 tokens.
"""

import argparse
import dataclasses
import gc
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself otherwise

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)

# isort: split
from benchmarks import results
from benchmarks.workloads.language import SLICE, World, build_language
from tandem.data.vision import VisionSpec
from tandem.parallel.kernels import compilation
from tandem.parallel.layout import Layout
from tandem.train.cost.memory import activation_bytes, layer_bytes
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.language import llm_recompute
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.layers import blocks
from tandem.train.models.layers.initial import initialize

CPU = torch.device("cpu")
NOTES = {"offload": "MiB: in host memory", "replay": "of one chunk"}
Run = Callable[[], torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Size:
    """grids: patches down and across of each image.  tokens: of the LLM's rows, in sequences of `sequence`.
    rounds: of each setting, after one that does not count.
    """

    encoder: ViTConfig
    grids: tuple[tuple[int, int], ...]
    llm: LLMConfig
    tokens: int
    sequence: int
    rounds: int


LLM = dataclasses.replace(
    SLICE, width=256, heads=8, kv_heads=2, head_width=32, num_experts=16, top_k=4, expert_width=96
)
SIZES = {
    "docs": Size(
        encoder=ViTConfig(width=256, depth=6, heads=4),
        grids=((32, 16), (24, 32), (16, 24), (24, 16)),
        llm=LLM,
        tokens=2048,
        sequence=1024,
        rounds=5,
    ),
    "toy": Size(
        encoder=ViTConfig(width=32, depth=1, heads=1),
        grids=((4, 4),),
        llm=dataclasses.replace(LLM, layers=1, width=32, heads=2, head_width=16, expert_width=16, num_experts=4),
        tokens=16,
        sequence=16,
        rounds=1,
    ),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = results.parse(parser, argv)
    size = SIZES[options.size]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    compilation.configure("never")
    tower, images = encoder(size)
    runs = {name: (tower, lambda name=name: tower(images, blocks.kept_for_backward(name))) for name in blocks.RECOMPUTE}
    measured = {"encoder": measure(runs, size.rounds, encoder_bytes)}
    with World(CPU) as world:
        slices = {
            name: build_language(size.llm, world, torch.float32, size.tokens, size.sequence, name)
            for name in llm_recompute.RECOMPUTE
        }
        runs = {name: (part.chunk, part.forward) for name, part in slices.items()}
        measured["llm"] = measure(runs, size.rounds, language_bytes)
    results.report("recompute", options, dataclasses.asdict(size), measured, table, ["megatron-core"])


def encoder(size: Size) -> tuple[SeedViT, PackedImages]:
    tower = SeedViT(size.encoder)
    initialize(tower, seed=0)
    grids = np.array(size.grids)
    patches_NP = np.random.default_rng(0).integers(0, 256, (grids.prod(1).sum(), VisionSpec().patch_values), np.uint8)
    return tower, PackedImages.of(patches_NP, VisionSpec().positions(grids), grids.prod(1), CPU)


def encoder_bytes(name: str) -> int:
    kept = blocks.kept_for_backward(name)
    return activation_bytes(kept, 32076, layers=27, width=1280, heads=20, mlp=5120, element=2)


def language_bytes(name: str) -> int:
    return SLICE.layers * layer_bytes(SLICE, Layout(world=1), name, row_tokens=32768, element=2, sparse=SLICE.sparse[0])


def measure(runs: dict[str, tuple[nn.Module, Run]], rounds: int, full_size: Callable[[str], int]) -> list[dict]:
    """Seconds and bytes of every setting.  Raises AssertionError where gradients differ."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    kept = {name: [left_behind(run) for _ in range(3)] for name, (_, run) in runs.items()}
    gradients = {}
    for _ in range(rounds + 1):
        for name, (module, run) in runs.items():
            module.zero_grad()
            begin = time.process_time()
            if name == "replay":
                with torch.no_grad():
                    run()
            output = run()
            output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
            seconds[name].append(time.process_time() - begin)
            gradients[name] = torch.cat([parameter.grad.flatten() for parameter in module.parameters()])
    assert all(torch.equal(gradients[name], gradients["none"]) for name in runs), "gradients differ"
    return [
        {"name": name, "s": seconds[name][1:], "bytes_kept": kept[name], "full_size_bytes": full_size(name)}
        for name in runs
    ]


def table(result: dict) -> str:
    """A row per setting of encoder and LLM."""
    settings = result["settings"]
    vit, llm, patches = settings["encoder"], settings["llm"], sum(down * across for down, across in settings["grids"])
    titles = {
        "encoder": f"encoder, {vit['depth']} x {vit['width']}, {patches:,} patches",
        "llm": f"LLM, {llm['layers']} layers of {llm['width']}, {llm['num_experts']} experts, "
        f"{settings['tokens']:,} tokens",
    }
    lines = [f"forward and backward in fp32, processor time, cores: {result['machine']['cores']}"]
    for part, title in titles.items():
        lines.append(f"{title:45} {'ms':>7} {'ratio':>6} {'MiB kept':>9} {'GiB at full size':>17}")
        rows = result["measured"][part]
        medians = {row["name"]: statistics.median(row["s"]) for row in rows}
        for row in rows:
            time_of, kept = medians[row["name"]], statistics.median(row["bytes_kept"]) / 2**20
            lines.append(
                f"  {row['name']:43} {1e3 * time_of:7.0f} {time_of / medians['none']:6.2f} {kept:9.1f} "
                f"{row['full_size_bytes'] / 2**30:17.1f}  {NOTES.get(row['name'], '')}".rstrip()
            )
    return "\n".join(lines)


def left_behind(run: Run) -> int:
    """Bytes that a forward has allocated and not freed."""
    run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        output = run()
    del output
    return sum(event.self_cpu_memory_usage for event in profiled.key_averages())


if __name__ == "__main__":
    main()
