"""Our packed encoder beside the padded SigLIP2 tower of Hugging Face, same size, same images, forward and backward.

    python benchmarks/encoder.py                    under two minutes on two cores with nothing else to do
    taskset -c 0 python benchmarks/encoder.py       on one core, where other work on the machine does not count
    python benchmarks/encoder.py --full             532M parameters in bf16 on one CUDA device

Images of 196 to 6,400 patches, log-uniform.  Ours packs them end to end in chunks of bounded patches; the peer pads a
batch to its longest image (its own processor pads every image to one fixed length, which costs more).  The peer runs in
several settings and every ratio is printed; the last line takes its best batch size with images in the order in which
they are drawn, as a shuffled data set gives them.  FLOPs are those of real patches for both; the floor is these FLOPs
at the device's peak.

Then the two readings of masked image modelling: the trunk over visible patches alone beside the trunk over all.

Legend: N patches, P values a patch, D width, H heads, K head width, I images, B images of a batch, L its longest.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from data.image import grid_hw, patch_positions
from train.flops import device_peak_tflops, encoder_flops, mim_flops
from train.models.initial import initialize
from train.models.masked import MaskedImages, MimConfig, MimTower
from train.models.masking import mask_images
from train.models.vit import PATCH, PATCH_VALUES, PackedImages, SeedViT, ViTConfig

SMALLEST, LARGEST, ASPECT = 196, 6400, 0.6
REFERENCE_IMAGES = 3
MASK_RATIO = 0.75
FP32_LIMIT, BF16_LIMIT = 1e-4, 5e-2  # relative to the norm of the reference


@dataclass(frozen=True)
class Size:
    """What one run compares."""

    vit: ViTConfig
    decoder: tuple[int, int, int]  # width, depth, heads of the mask decoder
    images: int
    chunk_patches: int
    batches: tuple[int, ...]  # the peer's
    dtype: torch.dtype
    rounds: int  # of every setting
    more_rounds: int  # of the two that count


SMALL = Size(ViTConfig(width=192, depth=2, heads=3), (64, 1, 1), 16, 8192, (2, 4), torch.float32, 1, 2)
FULL = Size(ViTConfig(), (512, 4, 8), 64, 32768, (2, 4, 8), torch.bfloat16, 5, 5)


@dataclass(frozen=True)
class Images:
    """The mix: grids int [I, 2], patches uint8 of each image, and the gradient of each image's features."""

    grid_I2: np.ndarray
    patches_I: list[np.ndarray]
    gradient_I: list[torch.Tensor]  # fp32 [n, D]

    @property
    def lengths_I(self) -> np.ndarray:
        return self.grid_I2.prod(1)


def draw_images(count: int, width: int, draw: np.random.Generator) -> Images:
    """Areas log-uniform, one from each of `count` equal parts of the range; aspects log-uniform; in random order."""
    share_I = (draw.permutation(count) + draw.random(count)) / count
    area_I = SMALLEST * (LARGEST / SMALLEST) ** share_I * PATCH**2
    aspect_I = np.exp(draw.uniform(-ASPECT, ASPECT, count))
    grid_I2 = grid_hw(np.sqrt(area_I * aspect_I), np.sqrt(area_I / aspect_I), SMALLEST, LARGEST)
    patches_I = [draw.integers(0, 256, (n, PATCH_VALUES), np.uint8) for n in grid_I2.prod(1)]
    gradient_I = [torch.from_numpy(draw.standard_normal((len(x), width), np.float32)) for x in patches_I]
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
    return PackedImages.of(patches_NP, patch_positions(images.grid_I2[part]), images.lengths_I[part], device)


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
        patch_size=PATCH,
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
        pixels_BLP = torch.zeros(*mask_BL.shape, PATCH_VALUES)
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
# Numerics: a dense reference, one image at a time, every score in memory


def dense_features(vit: SeedViT, pixels_NP: torch.Tensor, positions_N2: torch.Tensor) -> torch.Tensor:
    """What SeedViT says of one image, written plainly: rotation as complex numbers, softmax over all scores."""
    config, (weight, bias) = vit.config, (vit.patch_embedding.weight, vit.patch_embedding.bias)
    quarter = config.width // config.heads // 4
    frequency = config.rope_base ** (-torch.arange(quarter, device=pixels_NP.device) / quarter)
    angle_NJ = (positions_N2[:, :, None] * frequency).flatten(1)
    turn_N1J = torch.polar(torch.ones_like(angle_NJ), angle_NJ)[:, None]

    def turned(x_NHK):
        first, second = x_NHK.unflatten(-1, (2, -1)).unbind(-2)
        turned_NHJ = torch.complex(first, second) * turn_N1J
        return torch.cat((turned_NHJ.real, turned_NHJ.imag), dim=-1)

    def linear(layer, x_NC):
        return F.linear(x_NC, layer.weight, layer.bias)

    x_ND = F.linear(pixels_NP, weight, bias)
    for block in vit.blocks:
        qkv_NY = linear(block.qkv, block.attention_norm(x_ND))
        q_NHK, k_NHK, v_NHK = qkv_NY.unflatten(-1, (3, config.heads, -1)).unbind(1)
        scores_HNN = torch.einsum("nhk,mhk->hnm", turned(q_NHK), turned(k_NHK)) * (4 * quarter) ** -0.5
        mixed_NHK = torch.einsum("hnm,mhk->nhk", scores_HNN.softmax(-1), v_NHK)
        x_ND = x_ND + linear(block.projection, mixed_NHK.flatten(1))
        h_NF = F.gelu(linear(block.mlp_up, block.mlp_norm(x_ND)), approximate="tanh")
        x_ND = x_ND + linear(block.mlp_down, h_NF)
    return vit.final_norm(x_ND)


def check_numerics(vit: SeedViT, images: Images, device: torch.device) -> tuple[float, float]:
    """Relative errors of the smallest images' features and of all gradients, packed against dense in fp32."""
    few = np.argsort(images.lengths_I)[:REFERENCE_IMAGES]
    dense, dtype = copy.deepcopy(vit).float(), vit.patch_embedding.weight.dtype
    features, gradient_ND = [], torch.cat([images.gradient_I[i] for i in few]).to(device)
    for i in few:
        pixels_NP = torch.from_numpy(images.patches_I[i]).to(device).float() / 127.5 - 1
        positions_N2 = torch.from_numpy(patch_positions(images.grid_I2[i])).to(device)
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
    drawn_order: bool = False
    times: list[float] | None = None

    @property
    def ms(self) -> float:
        return statistics.median(self.times)


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
                row.times = [*(row.times or ()), 1e3 * (clock() - begin)]


def ratio(peer: Row, ours: Row) -> float:
    """Median over the rounds that both ran in; the two passes of a round saw the same machine."""
    return statistics.median(theirs / mine for theirs, mine in zip(peer.times, ours.times, strict=False))


def towers(size: Size, device: torch.device) -> None:
    images = draw_images(size.images, size.vit.width, np.random.default_rng(0))
    lengths_I, total = images.lengths_I, int(images.lengths_I.sum())
    vit = SeedViT(size.vit)
    initialize(vit, seed=0)
    vit, peer = vit.to(device, size.dtype), build_peer(size, device)
    work, peak = 3 * encoder_flops(size.vit, lengths_I), device_peak_tflops(device) * 1e12

    span = f"{lengths_I.min():,} to {lengths_I.max():,} patches"
    print(f"{size.images} images of {span}, {total:,} in all, {size.dtype} on {place(device)}")
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in (vit, peer))
    table = peer.config.num_patches * size.vit.width
    print(
        f"  {size.vit.depth} x {size.vit.width}, {size.vit.heads} heads: ours {ours:,} parameters, the peer {theirs:,}"
    )
    print(f"  (the peer has a table of {table:,} for positions, where ours rotates)")
    limit = FP32_LIMIT if size.dtype is torch.float32 else BF16_LIMIT
    of_features, of_gradients = check_numerics(vit, images, device)
    print(
        f"  packed against a dense fp32 reference: features {of_features:.0e}, gradients {of_gradients:.0e} (relative)"
    )
    if not (of_features < limit and of_gradients < limit):
        sys.exit(f"the packed encoder is off by more than {limit:.0e}")

    rows = [Row(f"ours, chunks of {size.chunk_patches:,}", packed_pass(vit, images, size, device), total)]
    drawn, by_length = np.arange(size.images), np.argsort(lengths_I)
    settings = [(drawn, batch, f"padded, {batch} a batch") for batch in size.batches]
    settings += [(by_length, batch, f"padded, {batch} a batch, all images sorted by length") for batch in (2, 4)]
    settings += [(drawn, 1, "one image at a time, unpadded")]
    for order, batch, name in settings:
        batches = np.split(order, range(batch, size.images, batch))
        computed = sum(int(lengths_I[part].max()) * len(part) for part in batches)
        run = padded_pass(peer, images, batches, size, device)
        rows.append(Row(name, run, computed, drawn_order=order is drawn and batch > 1))
    time_in_turns(rows, size.rounds, device)
    best = min((row for row in rows if row.drawn_order), key=lambda row: row.ms)
    time_in_turns([rows[0], best], size.more_rounds, device)
    print_rows(rows, size.images, total, work, peak)
    print(f"  {ratio(best, rows[0]):.2f}x as many images a second as the peer in drawn order at its best ({best.name})")


def place(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} cores"


def print_rows(rows: list[Row], images: int, patches: int, work: int, peak: float) -> None:
    """The table; the last column is how many times as long as ours a setting takes."""
    ours = rows[0]
    print(f"  floor {1e3 * work / peak:,.0f} ms: {work / 1e9:,.0f} GFLOP of real patches at {peak / 1e9:,.0f} GFLOP/s")
    print(f"  {'':46}{'ms':>8}{'images/s':>10}{'patches/s':>11}{'GFLOP/s':>10}{'of peak':>9}{'padding':>9}{'ratio':>7}")
    for row in rows:
        seconds = row.ms / 1e3
        print(
            f"  {row.name:46}{row.ms:>8,.0f}{images / seconds:>10.2f}{patches / seconds:>11,.0f}"
            f"{work / seconds / 1e9:>10,.0f}{work / seconds / peak:>9.1%}{row.computed / patches - 1:>9.0%}"
            f"{ratio(row, ours):>7.2f}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The two readings of masked image modelling


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


def readings(size: Size, device: torch.device) -> None:
    """Time of the reading that drops masked patches against the one that keeps their places, beside the FLOPs."""
    images = draw_images(size.images, size.vit.width, np.random.default_rng(0))
    lengths_I, keys_I1 = images.lengths_I, np.arange(size.images)[:, None]
    mask_I = np.split(mask_images(lengths_I, MASK_RATIO, keys_I1), lengths_I.cumsum()[:-1])
    visible_I = np.array([int((~mask).sum()) for mask in mask_I])
    rows, work = [], []
    for reading, name in (("drop", "visible patches alone, decoder {1} x {0}"), ("token", "mask tokens in the trunk")):
        mim = MimConfig(MASK_RATIO, reading, *size.decoder)
        tower = MimTower(size.vit, mim, size.vit.width)
        initialize(tower, seed=0)
        run = masked_pass(tower.to(device, size.dtype), images, mask_I, size, device)
        rows.append(Row(name.format(*size.decoder), run, 0))
        work.append(3 * sum(mim_flops(size.vit, mim, lengths_I, visible_I, size.vit.width)))
    time_in_turns(rows, size.rounds + size.more_rounds, device)
    print(f"masked image modelling, {MASK_RATIO:.0%} of each image masked, forward and backward, teacher not counted")
    for row, flops in zip(rows, work, strict=True):
        print(f"  {row.name:46}{row.ms:>8,.0f} ms{flops / 1e9:>10,.0f} GFLOP")
    print(f"  dropping is {ratio(rows[1], rows[0]):.1f}x as fast, with {work[1] / work[0]:.1f}x less to compute")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="27 x 1280 in bf16; needs a CUDA device")
    arguments = parser.parse_args()
    if arguments.full and not torch.cuda.is_available():
        parser.error("--full needs a CUDA device, and torch sees none")
    device = torch.device("cuda" if arguments.full else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    size = FULL if arguments.full else SMALL
    towers(size, device)
    readings(size, device)


if __name__ == "__main__":
    main()
