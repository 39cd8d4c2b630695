"""What each setting of `parallel.encoder.recompute` and `train.recompute` costs in time and keeps in memory.

    python benchmarks/recompute.py             # on a CPU, about two minutes

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
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import parallel  # noqa: F401  (installs the CPU backend before megatron is imported)

# isort: split
from data.image import patch_positions
from parallel import compilation
from parallel.layout import Layout
from parallel.recompute import activation_bytes
from train.memory import layer_bytes
from train.models import blocks, llm_recompute
from train.models.initial import initialize
from train.models.vit import PATCH_VALUES, PackedImages, SeedViT, ViTConfig
from train.slices.language import SLICE, World, build_language

CPU = torch.device("cpu")
GRIDS = ((32, 16), (24, 32), (16, 24), (24, 16))
ENCODER = ViTConfig(width=256, depth=6, heads=4)
LLM = dataclasses.replace(
    SLICE, width=256, heads=8, kv_heads=2, head_width=32, num_experts=16, top_k=4, expert_width=96
)
TOKENS, SEQUENCE = 2048, 1024
Run = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of each setting, after one that does not count")
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    compilation.configure("never")
    print(f"encoder, torch {torch.__version__} on {torch.get_num_threads()} cores")
    tower, images = encoder()
    runs = {name: (tower, lambda name=name: tower(images, blocks.kept_for_backward(name))) for name in blocks.RECOMPUTE}
    table(runs, rounds, encoder_bytes)
    print("LLM layers")
    with World(CPU) as world:
        slices = {
            name: build_language(LLM, world, torch.float32, TOKENS, SEQUENCE, name) for name in llm_recompute.RECOMPUTE
        }
        table({name: (part.chunk, part.forward) for name, part in slices.items()}, rounds, language_bytes)


def encoder() -> tuple[SeedViT, PackedImages]:
    tower = SeedViT(ENCODER)
    initialize(tower, seed=0)
    grids = np.array(GRIDS)
    patches_NP = np.random.default_rng(0).integers(0, 256, (grids.prod(1).sum(), PATCH_VALUES), np.uint8)
    return tower, PackedImages.of(patches_NP, patch_positions(grids), grids.prod(1), CPU)


def encoder_bytes(name: str) -> int:
    kept = blocks.kept_for_backward(name)
    return activation_bytes(kept, 32076, layers=27, width=1280, heads=20, mlp=5120, element=2)


def language_bytes(name: str) -> int:
    return SLICE.layers * layer_bytes(SLICE, Layout(world=1), name, row_tokens=32768, element=2)


def table(runs: dict[str, tuple[nn.Module, Run]], rounds: int, full_size: Callable[[str], int]) -> None:
    """Prints a line a setting; raises AssertionError where gradients differ."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    kept = {name: statistics.median(left_behind(run) for _ in range(3)) for name, (_, run) in runs.items()}
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
    print(f"  {'':10} {'ms':>7} {'ratio':>6} {'MiB kept':>9} {'GiB at full size':>17}")
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        note = {"offload": "  MiB: in host memory", "replay": "  of one chunk"}.get(name, "")
        size = f"{kept[name] / 2**20:9.1f} {full_size(name) / 2**30:17.1f}{note}"
        print(f"  {name:10} {1e3 * median:7.0f} {median / medians['none']:6.2f} {size}")


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
