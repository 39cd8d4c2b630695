"""Our packed encoder beside the padded SigLIP2 tower of Hugging Face, same size, same images, forward and backward.

    taskset -c 0 python benchmarks/encoder.py       two minutes; on one core, where other work does not count
    python benchmarks/encoder.py                    on all cores, on a machine with nothing else to do
    python benchmarks/encoder.py --full             532M parameters in bf16 on one CUDA device

Images of 196 to 6,400 patches, log-uniform.  Ours packs them end to end in chunks of bounded patches; the peer pads a
batch to its longest image (its own processor pads every image to one fixed length, which costs more).  The peer runs in
several settings and every ratio is printed.  The last lines take its fastest row among batches of images in the order
in which they are drawn, as a shuffled data set gives them, and its fastest row of all.  FLOPs are those of real patches
for both; the floor is these FLOPs at the device's peak.

Legend: N patches, P values a patch, D width, H heads, K head width, I images, B images of a batch, L its longest.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from benchmarks import results
from benchmarks.gpu_reference import dense_features
from tandem.data.vision import VisionSpec
from tandem.train.cost.flops import device_peak_tflops, encoder_flops
from tandem.train.models.encoders.vit import PackedImages, SeedViT, ViTConfig
from tandem.train.models.layers.initial import initialize

ASPECT = 0.6
REFERENCE_IMAGES = 3
PADDING_ORDERS = 1000  # over which padding is averaged
FP32_LIMIT, BF16_LIMIT = 1e-4, 5e-2  # relative to the norm of the reference


@dataclass(frozen=True)
class Size:
    """images: of the mix.  span: least and most patches of one.  chunk_patches: of ours.  batches: images of a batch of
    the peer.  rounds: of every row.  more_rounds: of ours and of the peer's rows that the last lines name.
    """

    vit: ViTConfig
    images: int
    span: tuple[int, int]
    chunk_patches: int
    batches: tuple[int, ...]
    dtype: torch.dtype
    rounds: int
    more_rounds: int

    def settings(self) -> dict:
        vit = {"depth": self.vit.depth, "width": self.vit.width, "heads": self.vit.heads}
        own = ("images", "span", "chunk_patches", "batches", "rounds", "more_rounds")
        return {**vit, **{name: getattr(self, name) for name in own}, "dtype": str(self.dtype).removeprefix("torch.")}


SPAN = (196, 6400)
SIZES = {
    "docs": Size(
        ViTConfig(width=192, depth=2, heads=3), 16, SPAN, 8192, (2, 4), torch.float32, rounds=1, more_rounds=2
    ),
    "toy": Size(
        ViTConfig(width=32, depth=1, heads=1), 4, (16, 64), 128, (2, 4), torch.float32, rounds=1, more_rounds=1
    ),
    "full": Size(ViTConfig(), 64, SPAN, 32768, (2, 4, 8), torch.bfloat16, rounds=5, more_rounds=5),
}


@dataclass(frozen=True)
class Images:
    """The mix: grids int [I, 2], patches uint8 of each image, and the gradient of each image's features."""

    grid_I2: np.ndarray
    patches_I: list[np.ndarray]
    gradient_I: list[torch.Tensor]  # fp32 [n, D]

    @property
    def lengths_I(self) -> np.ndarray:
        return self.grid_I2.prod(1)


def draw_images(size: Size) -> Images:
    """Areas log-uniform, one from each of as many equal parts of the range; aspects log-uniform; in random order."""
    draw, count, (smallest, largest) = np.random.default_rng(0), size.images, size.span
    share_I = (draw.permutation(count) + draw.random(count)) / count
    area_I = smallest * (largest / smallest) ** share_I * VisionSpec.patch_size**2
    aspect_I = np.exp(draw.uniform(-ASPECT, ASPECT, count))
    grid_I2 = VisionSpec(smallest, largest).views(np.sqrt(area_I * aspect_I), np.sqrt(area_I / aspect_I))
    patches_I = [draw.integers(0, 256, (n, VisionSpec().patch_values), np.uint8) for n in grid_I2.prod(1)]
    gradient_I = [torch.from_numpy(draw.standard_normal((len(x), size.vit.width), np.float32)) for x in patches_I]
    return Images(grid_I2, patches_I, gradient_I)


# ---------------------------------------------------------------------------------------------------------------------
# Ours: chunks of whole images


def chunks(lengths_I: np.ndarray, most: int) -> list[list[int]]:
    """Images in order, a new chunk where the next image would make it longer than `most` patches."""
    parts, filled = [], most
    for image, length in enumerate(lengths_I.tolist()):
        if filled + length > most:
            parts.append([])
            filled = 0
        parts[-1].append(image)
        filled += length
    return parts


def packed(images: Images, part, device: torch.device) -> PackedImages:
    patches_NP = np.concatenate([images.patches_I[i] for i in part])
    return PackedImages.of(patches_NP, VisionSpec().positions(images.grid_I2[part]), images.lengths_I[part], device)


def packed_pass(vit: SeedViT, images: Images, size: Size, device: torch.device) -> Callable[[], None]:
    inputs = []
    for part in chunks(images.lengths_I, size.chunk_patches):
        gradient_ND = torch.cat([images.gradient_I[i] for i in part])
        inputs.append((packed(images, part, device), gradient_ND.to(device, size.dtype)))

    def run() -> None:
        vit.zero_grad(set_to_none=True)
        for chunk, gradient_ND in inputs:
            vit(chunk).backward(gradient_ND)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# The peer: batches padded to their longest image


def build_peer(size: Size, device: torch.device) -> torch.nn.Module:
    """Siglip2VisionModel of the same width, depth, heads, MLP and patch, without its pooling head."""
    try:
        from transformers import Siglip2VisionConfig, Siglip2VisionModel
    except ImportError:
        sys.exit("the peer needs transformers, which is not installed: pip install 'tandem[hf]'")
    config = Siglip2VisionConfig(
        hidden_size=size.vit.width,
        intermediate_size=int(size.vit.width * size.vit.mlp_ratio),
        num_hidden_layers=size.vit.depth,
        num_attention_heads=size.vit.heads,
        patch_size=VisionSpec.patch_size,
        layer_norm_eps=size.vit.norm_eps,
        vision_use_head=False,
        attn_implementation="sdpa",  # "eager" keeps B x H x L x L scores of every layer
    )
    return Siglip2VisionModel(config).to(device, size.dtype)


def padded_pass(
    peer: torch.nn.Module, images: Images, batches: list[np.ndarray], size: Size, device: torch.device
) -> Callable[[], None]:
    """Pixels are converted and padded beforehand, as its processor does; ours converts inside the pass."""
    inputs = []
    for batch in batches:
        lengths_B = images.lengths_I[batch]
        mask_BL = torch.arange(int(lengths_B.max()))[None] < torch.from_numpy(lengths_B)[:, None]
        pixels_BLP = torch.zeros(*mask_BL.shape, VisionSpec().patch_values)
        gradient_BLD = torch.zeros(*mask_BL.shape, size.vit.width)
        for row, image in enumerate(batch):
            pixels_BLP[row, : lengths_B[row]] = torch.from_numpy(images.patches_I[image]).float() / 127.5 - 1
            gradient_BLD[row, : lengths_B[row]] = images.gradient_I[image]
        fields = {
            "pixel_values": pixels_BLP.to(device, size.dtype),
            "pixel_attention_mask": mask_BL.to(device, torch.int32),
            "spatial_shapes": torch.from_numpy(images.grid_I2[batch].astype(np.int64)),
        }
        inputs.append((fields, gradient_BLD.to(device, size.dtype)))

    def run() -> None:
        peer.zero_grad(set_to_none=True)
        for fields, gradient_BLD in inputs:
            peer(**fields).last_hidden_state.backward(gradient_BLD)

    return run


# ---------------------------------------------------------------------------------------------------------------------
# Numerics: against a dense reference, one image at a time, every score in memory


def check_numerics(vit: SeedViT, images: Images, device: torch.device) -> tuple[float, float]:
    """Relative errors of the smallest images' features and of all gradients, packed against dense in fp32."""
    few = np.argsort(images.lengths_I)[:REFERENCE_IMAGES]
    dense, dtype = copy.deepcopy(vit).float(), vit.patch_embedding.weight.dtype
    features, gradient_ND = [], torch.cat([images.gradient_I[i] for i in few]).to(device)
    for i in few:
        pixels_NP = torch.from_numpy(images.patches_I[i]).to(device).float() / 127.5 - 1
        positions_N2 = torch.from_numpy(VisionSpec().positions(images.grid_I2[i])).to(device)
        features.append(dense_features(dense, pixels_NP, positions_N2))
    wanted_ND = torch.cat(features)
    wanted_ND.backward(gradient_ND)

    vit.zero_grad(set_to_none=True)
    found_ND = vit(packed(images, few, device))
    found_ND.backward(gradient_ND.to(dtype))
    gradients = [torch.cat([p.grad.float().flatten() for p in model.parameters()]) for model in (vit, dense)]
    return relative(found_ND.float(), wanted_ND), relative(*gradients)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


# ---------------------------------------------------------------------------------------------------------------------
# Timing and printing


@dataclass
class Row:
    """One setting and the milliseconds of its passes."""

    name: str
    run: Callable[[], None]
    computed: int  # patches computed, padding included
    drawn_batches: bool = False  # batches of several images in drawn order
    times: list[float] = field(default_factory=list)

    def measured(self) -> dict:
        return {"name": self.name, "computed": self.computed, "drawn_batches": self.drawn_batches, "ms": self.times}


def time_in_turns(rows: list[Row], rounds: int, device: torch.device) -> None:
    """Every row once a round, one round to warm up on a CUDA device, where kernels load at first use.

    One core is timed by the processor time that it gave this process, whatever else the machine does.
    """
    warm = int(device.type == "cuda")
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    for repeat in range(rounds + warm):
        for row in rows:
            begin = clock()
            row.run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat >= warm:
                row.times.append(1e3 * (clock() - begin))


def rows_of(size: Size, vit: SeedViT, peer: torch.nn.Module, images: Images, device: torch.device) -> list[Row]:
    """Ours first, then the peer in batches as drawn, in batches sorted by length, and image by image."""
    lengths_I, drawn, by_length = images.lengths_I, np.arange(size.images), np.argsort(images.lengths_I)
    rows = [
        Row(f"ours, chunks of {size.chunk_patches:,}", packed_pass(vit, images, size, device), int(lengths_I.sum()))
    ]
    settings = [(drawn, batch, f"padded, {batch} a batch") for batch in size.batches]
    settings += [(by_length, batch, f"padded, {batch} a batch, all images sorted by length") for batch in (2, 4)]
    settings += [(drawn, 1, "one image at a time, unpadded")]
    for order, batch, name in settings:
        batches = np.split(order, range(batch, size.images, batch))
        run = padded_pass(peer, images, batches, size, device)
        rows.append(Row(name, run, computed_patches(lengths_I, batches), order is drawn and batch > 1))
    return rows


def computed_patches(lengths_I: np.ndarray, batches: list[np.ndarray]) -> int:
    """Patches of all batches, each padded to its longest image."""
    return sum(int(lengths_I[part].max()) * len(part) for part in batches)


def mean_padding(lengths_I: np.ndarray, batch: int) -> float:
    """Padded patches over real ones in batches of random order, on average over orders."""
    draw, count = np.random.default_rng(1), len(lengths_I)
    split = [np.split(draw.permutation(count), range(batch, count, batch)) for _ in range(PADDING_ORDERS)]
    return float(np.mean([computed_patches(lengths_I, batches) for batches in split]) / lengths_I.sum() - 1)


def measure(size: Size, device: torch.device) -> dict:
    """Numerics first, then the times of all rows.  Exits where the packed encoder is off by more than rounding."""
    images = draw_images(size)
    vit = SeedViT(size.vit)
    initialize(vit, seed=0)
    vit, peer = vit.to(device, size.dtype), build_peer(size, device)
    limit = FP32_LIMIT if size.dtype is torch.float32 else BF16_LIMIT
    errors = dict(zip(("features", "gradients"), check_numerics(vit, images, device), strict=True))
    if not all(error < limit for error in errors.values()):
        sys.exit(f"error: the packed encoder is off by {errors}, more than {limit:.0e}")
    rows = rows_of(size, vit, peer, images, device)
    time_in_turns(rows, size.rounds, device)
    median = lambda row: statistics.median(row.times)  # noqa: E731
    batched = min((row for row in rows if row.drawn_batches), key=median)
    best = min(rows[1:], key=median)
    time_in_turns([rows[0], batched, *([] if best is batched else [best])], size.more_rounds, device)
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (vit, peer))
    return {
        "patches": images.lengths_I.tolist(),
        "flop": 3 * encoder_flops(size.vit, images.grid_I2),
        "peak_flop_per_s": device_peak_tflops(device) * 1e12,
        "parameters": {"ours": ours, "peer": theirs, "peer_positions": peer.config.num_patches * size.vit.width},
        "errors": errors,
        "mean_padding": [{"batch": batch, "share": mean_padding(images.lengths_I, batch)} for batch in (2, 4, 8)],
        "rows": [row.measured() for row in rows],
    }


def table(result: dict) -> str:
    """A row per setting; `ratio` is its time over ours."""
    measured, settings = result["measured"], result["settings"]
    patches, work, peak = measured["patches"], measured["flop"], measured["peak_flop_per_s"]
    total, count, errors = sum(patches), measured["parameters"], measured["errors"]
    ours, *peers = measured["rows"]

    def ratio(row: dict) -> float:
        return statistics.median(row["ms"]) / statistics.median(ours["ms"])

    place = result["machine"]["gpu"] or f"cores: {result['machine']['cores']}"
    padding = ", ".join(f"{each['batch']} a batch {each['share']:.0%}" for each in measured["mean_padding"])
    lines = [
        f"{len(patches)} images of {min(patches):,} to {max(patches):,} patches, {total:,} in all, "
        f"{settings['dtype']}, {place}",
        f"  {settings['depth']} x {settings['width']}, {settings['heads']} heads: ours {count['ours']:,} parameters, "
        f"the peer {count['peer']:,}",
        f"  (the peer has a table of {count['peer_positions']:,} for positions, where ours rotates)",
        f"  packed against a dense fp32 reference: features {errors['features']:.0e}, gradients "
        f"{errors['gradients']:.0e} (relative)",
        f"  padding in random order, on average: {padding}",
        f"  floor {1e3 * work / peak:,.0f} ms: {work / 1e9:,.0f} GFLOP of real patches at {peak / 1e9:,.0f} GFLOP/s",
        f"  {'':46}{'ms':>8}{'images/s':>10}{'patches/s':>11}{'GFLOP/s':>10}{'of peak':>9}{'padding':>9}{'ratio':>7}",
    ]
    for row in measured["rows"]:
        seconds = statistics.median(row["ms"]) / 1e3
        lines.append(
            f"  {row['name']:46}{1e3 * seconds:>8,.0f}{len(patches) / seconds:>10.2f}{total / seconds:>11,.0f}"
            f"{work / seconds / 1e9:>10,.0f}{work / seconds / peak:>9.1%}{row['computed'] / total - 1:>9.0%}"
            f"{ratio(row):>7.2f}"
        )
    batched, best = min((row for row in peers if row["drawn_batches"]), key=ratio), min(peers, key=ratio)
    more = "x as many images a second as the peer's fastest"
    lines += [
        f"  {ratio(batched):.2f}{more} batches in drawn order ({batched['name']})",
        f"  {ratio(best):.2f}{more} row of all ({best['name']})",
    ]
    return "\n".join(lines)


def device_of(options: argparse.Namespace, parser: argparse.ArgumentParser) -> torch.device:
    """The CUDA device with --full, else the CPU, with as many threads as this process has cores."""
    if options.full and (options.size == "toy" or not torch.cuda.is_available()):
        parser.error("--full needs a CUDA device and is a size of its own")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    return torch.device("cuda" if options.full else "cpu")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="27 x 1280 in bf16; needs a CUDA device")
    options = results.parse(parser, argv)
    device = device_of(options, parser)
    size, name = SIZES["full" if options.full else options.size], "encoder-full" if options.full else "encoder"
    gpu = torch.cuda.get_device_name(device) if options.full else None
    results.report(name, options, size.settings(), measure(size, device), table, ["transformers"], gpu)


if __name__ == "__main__":
    main()
