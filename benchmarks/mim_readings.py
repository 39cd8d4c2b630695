"""The two readings of masked image modelling: the trunk over visible patches alone beside the trunk over all patches.

    taskset -c 0 python benchmarks/mim_readings.py       half a minute; on one core, where other work does not count
    python benchmarks/mim_readings.py                    on all cores, on a machine with nothing else to do
    python benchmarks/mim_readings.py --full             532M parameters in bf16 on one CUDA device

The images and sizes are those of benchmarks/encoder.py; forward and backward, the teacher not counted.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.encoder import SIZES, Images, Row, Size, chunks, device_of, draw_images, packed, time_in_turns
from tandem.train.cost.flops import mim_flops
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import mask_images
from tandem.train.models.towers.masked import MaskedImages, MimConfig, MimTower

MASK_RATIO = 0.75
DECODERS = {"docs": (64, 1, 1), "toy": (32, 1, 1), "full": (512, 4, 8)}  # width, depth, heads
READINGS = {"drop": "visible patches alone", "token": "mask tokens in the trunk"}


def masked_pass(tower: MimTower, images: Images, mask_I: list[np.ndarray], size: Size, device) -> Callable[[], None]:
    inputs = []
    for part in chunks(images.lengths_I, size.chunk_patches):
        mask_N = np.concatenate([mask_I[i] for i in part])
        masked = MaskedImages.of(packed(images, part, device), mask_N)
        inputs.append((masked, torch.randn(int(mask_N.sum()), size.vit.width, device=device, dtype=size.dtype)))

    def run() -> None:
        tower.zero_grad(set_to_none=True)
        for masked, target_MC in inputs:
            tower(masked, target_MC)[0].sum().backward()

    return run


def measure(size: Size, decoder: tuple[int, int, int], device: torch.device) -> dict:
    """Milliseconds and FLOPs of both readings."""
    images = draw_images(size)
    lengths_I, keys_I1 = images.lengths_I, np.arange(size.images)[:, None]
    mask_I = np.split(mask_images(lengths_I, MASK_RATIO, keys_I1), lengths_I.cumsum()[:-1])
    visible_I = np.array([int((~mask).sum()) for mask in mask_I])
    rows, work = [], []
    for reading, name in READINGS.items():
        mim = MimConfig(MASK_RATIO, reading, *decoder)
        tower = MimTower(size.vit, mim, size.vit.width)
        initialize(tower, seed=0)
        run = masked_pass(tower.to(device, size.dtype), images, mask_I, size, device)
        rows.append(Row(name, run, 0))
        work.append(3 * sum(mim_flops(size.vit, mim, lengths_I, visible_I, size.vit.width)))
    time_in_turns(rows, size.rounds + size.more_rounds, device)
    return {"rows": [{"name": row.name, "ms": row.times, "flop": flop} for row, flop in zip(rows, work, strict=True)]}


def table(result: dict) -> str:
    """A row per reading, and how much is gained by dropping."""
    settings, rows = result["settings"], result["measured"]["rows"]
    place = result["machine"]["gpu"] or f"cores: {result['machine']['cores']}"
    width, depth, _ = settings["decoder"]
    lines = [
        f"masked image modelling, {MASK_RATIO:.0%} of each image masked, forward and backward, {settings['dtype']}, "
        f"{place}",
        f"  trunk {settings['depth']} x {settings['width']}; where patches are dropped, decoder {depth} x {width}",
    ]
    ms = [statistics.median(row["ms"]) for row in rows]
    for row, median in zip(rows, ms, strict=True):
        lines.append(f"  {row['name']:30}{median:>8,.0f} ms{row['flop'] / 1e9:>10,.0f} GFLOP")
    less = rows[1]["flop"] / rows[0]["flop"]
    lines.append(f"  dropping is {ms[1] / ms[0]:.1f}x as fast, with {less:.1f}x less to compute")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="27 x 1280 in bf16; needs a CUDA device")
    options = results.parse(parser, argv)
    device = device_of(options, parser)
    size = "full" if options.full else options.size
    gpu = torch.cuda.get_device_name(device) if options.full else None
    settings = {**SIZES[size].settings(), "decoder": DECODERS[size]}
    measured = measure(SIZES[size], DECODERS[size], device)
    results.report("mim_readings-full" if options.full else "mim_readings", options, settings, measured, table, gpu=gpu)


if __name__ == "__main__":
    main()
