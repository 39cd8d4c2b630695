"""The hybrid step on this machine: planning at scale, dispatch, balancing on and off, share of each phase, start-up.

    python benchmarks/hybrid_step.py            four gloo ranks, about a minute on two cores; needs the toy shards

Peers in the same run: the argmin form of the greedy assignment, and the step with images left where they are read.
Floors: for planning, sorting the costs (no assignment can skip it); for the encoder, its FLOPs at the rate of a matrix
product on the cores there are; for dispatch, visual tokens x width elements each way.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import ROOT, InRanks, in_ranks, one_thread, torchrun
from tandem.train.config.checks import check_config

LAYOUT = "parallel.ep=2"  # a replica per rank: all images of the skewed step belong to one of them
TOY_LAYOUT = ("parallel.pp=2", "parallel.ep=2")  # of the start-up


@dataclass(frozen=True)
class Size:
    """ranks, repeats: of the step.  seq: tokens per row.  rows: per step.  side: patches per side of every image.
    width, depth: of the encoder.  planned_images, planned_ranks: of the assignment alone.
    """

    ranks: int = 4
    repeats: int = 7
    seq: int = 512
    rows: int = 8
    side: int = 16
    width: int = 192
    depth: int = 4
    planned_images: int = 30_720
    planned_ranks: int = 256


SIZES = {
    "docs": Size(),
    "toy": Size(2, repeats=1, seq=128, rows=4, side=8, width=64, depth=1, planned_images=300, planned_ranks=8),
}


def main(argv: list[str] | None = None, in_ranks: InRanks = in_ranks) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/toy", help="corpus of launch/make_shards.py, for the start-up time")
    options = results.parse(parser, argv)
    size = SIZES[options.size]
    whole, shards = options.size == "docs", Path(options.shards)
    if whole and not (ROOT / shards / "tokenizer.json").is_file():
        parser.error(f"{shards} is missing; make it with python launch/make_shards.py {shards}")
    measured = {
        "planning": planning(size),
        "step": in_ranks(size.ranks, "benchmarks.hybrid_step", "step_of_ranks", options.size),
        "start_up": start_up(shards) if whole else None,
    }
    results.report("hybrid_step", options, asdict(size), measured, table, ["megatron-core", "deepspeed"])


def best_ms(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def argmin_assign(costs: np.ndarray, ranks: int) -> np.ndarray:
    """The peers' form: the least loaded rank is searched anew for every image."""
    load_R, encoding_rank_I = np.zeros(ranks), np.empty(costs.size, dtype=np.int64)
    for image in np.argsort(-costs, kind="stable"):
        encoding_rank_I[image] = load_R.argmin()
        load_R[encoding_rank_I[image]] += costs[image]
    return encoding_rank_I


def planning(size: Size) -> dict[str, float]:
    """Greedy assignment at the report's group size on a log-uniform mix of 196 to 6,400 patches."""
    from tandem.data.vision import VisionSpec
    from tandem.parallel.plan.balance import assign_images, load_max_over_mean

    draw, ranks = np.random.default_rng(0), size.planned_ranks
    patches = np.exp(draw.uniform(np.log(196), np.log(6400), size.planned_images)).astype(np.int64)
    spec = VisionSpec(width=1280, depth=27, mlp_width=5120)
    costs = spec.cost(np.stack([patches, np.ones_like(patches)], -1))
    return {
        "heap_ms": best_ms(lambda: assign_images(costs, ranks)),
        "argmin_ms": best_ms(lambda: argmin_assign(costs, ranks), repeats=1),
        "floor_ms": best_ms(lambda: np.argsort(-costs, kind="stable")),
        "load_max_over_mean": load_max_over_mean(costs, assign_images(costs, ranks), ranks),
    }


def step_of_ranks(size_name: str) -> dict:
    """One rank: the same skewed steps with and without balancing, in turn."""
    import torch
    import torch.distributed as dist

    from tandem.parallel.hybrid_step import hybrid_step
    from tandem.parallel.runtime.phases import PhaseTimer
    from tandem.train.build import build_engines
    from tandem.train.input.rows import step_input
    from tandem.train.objectives.language import train_forward, train_loss

    size = SIZES[size_name]
    config = settings(size)
    device = torch.device("cpu")
    layout = check_config(config, dist.get_world_size())
    loss = functools.partial(train_loss, domains=1)
    engines = build_engines(config, layout, device, forward=train_forward, loss=loss)
    timer, times, phases, moved = PhaseTimer(device), {True: [], False: []}, {True: [], False: []}, []
    loads = {}
    for repeat in range(size.repeats + 1):
        for balance in (True, False):
            prepared = skewed_step(size, config, engines.grid, balance)
            loads[balance] = prepared.rank_shard.routes.load_max_over_mean
            batch, before = step_input(prepared, engines.grid, config.vision), engines.exchange.elements_dispatched
            dist.barrier()
            begin = time.perf_counter()
            hybrid_step(engines, batch, report_shape=(2, 1), clip_norm=1.0, replay=False, stop=False, timer=timer)
            dist.barrier()
            seconds = time.perf_counter() - begin
            spent = timer.take()
            if repeat:  # the first pass warms up
                times[balance].append(seconds)
                phases[balance].append(spent)
                moved.append(engines.exchange.elements_dispatched - before)
    sent = torch.tensor(moved[0])
    dist.all_reduce(sent)
    steps = [summary(times[on], phases[on], loads[on], balance=on) for on in (True, False)]
    return {
        "dispatched": int(sent),
        "expected": int(prepared.plan.tokens_I.sum()) * engines.width,
        "encoder_floor_s": encoder_floor(size, config, prepared.plan.tokens_I.size) if engines.grid.rank == 0 else None,
        "steps": steps,
    }


def settings(size: Size):
    """Toy settings with an encoder that weighs as much in its step as it does in a picture-heavy batch."""
    from tandem.train.config.settings import composed, read_config

    overrides = [
        "+recipe=stage1",
        "scale=toy",
        f"train.seq_length={size.seq}",
        f"train.global_batch_size={size.rows}",
        "train.micro_batch_size=2",
        f"model.encoder.width={size.width}",
        f"model.encoder.depth={size.depth}",
        "parallel.encoder.chunk_patches=4096",
        LAYOUT,
    ]
    return read_config(composed(overrides))


def skewed_step(size: Size, config, grid, balance: bool):
    """A step whose images all belong to one replica's rows: the worst case for encoding where data is read."""
    from tandem.data.planning.plan import StepPlan
    from tandem.data.reading.reader import ImageBatch
    from tandem.parallel.plan.routes import assign_encoding_ranks, build_routes
    from tandem.train.input.batch import RowText, rows_of_replica, visual_plan
    from tandem.train.input.prefetcher import PreparedStep
    from tandem.train.input.rows import RowRankShard

    tokens = size.side * size.side // 4
    rows_RMB = [
        rows_of_replica(grid.layout, replica, config.micro_batches(grid.layout), config.train.micro_batch_size)
        for replica in range(grid.layout.dp)
    ]
    rows = rows_RMB[0].ravel()
    per_row = size.seq // tokens - 1
    row_I = np.repeat(np.sort(rows), per_row).astype(np.int32)
    start_I = np.tile(np.arange(per_row) * tokens, rows.size).astype(np.int32)
    all_rows = np.arange(size.rows, dtype=np.int32)
    plan = StepPlan(
        step=0,
        seq_length=size.seq,
        shard_S=0 * all_rows,
        index_S=all_rows,
        row_S=all_rows,
        start_S=0 * all_rows,
        length_S=np.full(size.rows, size.seq, np.int32),
        domain_S=np.zeros(size.rows, np.int16),
        image_sample_I=row_I,
        cut_S=np.zeros(size.rows, bool),
        image_media_I=0 * row_I,
        time_I=np.full(row_I.size, -1, np.int32),
        grid_hw_I2=np.full((row_I.size, 2), size.side, np.int32),
        tokens_I=np.full(row_I.size, tokens, np.int32),
        row_I=row_I,
        start_I=start_I,
        state_after={},
    )
    chunk_patches = config.parallel.encoder.chunk_patches
    visual = visual_plan(plan, grid.layout, config.train.micro_batch_size, config.vision, chunk_patches)
    encoding_rank_I = assign_encoding_ranks(visual, grid.layout, balance)
    routes = build_routes(
        visual,
        encoding_rank_I,
        grid.layout,
        grid.rank,
        config.micro_batches(grid.layout),
        chunk_patches,
    )
    mine = int(visual.patches_I[encoding_rank_I == grid.rank].sum())
    draw = np.random.default_rng(grid.rank)
    grids = np.full((mine // (size.side * size.side), 2), size.side, np.int32)
    images = ImageBatch(draw.integers(0, 256, (mine, 588), dtype=np.uint8), grids, 0, [])
    shape = (config.train.micro_batch_size, size.seq)
    text = RowText(
        tokens=draw.integers(0, 200, shape),
        labels=draw.integers(0, 200, shape),
        loss_mask=np.ones(shape, bool),
        domain=np.zeros(shape, np.int16),
    )
    rank_shard = RowRankShard(
        image_ids=np.concatenate(routes.chunks), rows=rows[:0], digest=0, routes=routes, rows_MB=rows_RMB[grid.place.dp]
    )
    return PreparedStep(plan, rank_shard, images, [text] * config.micro_batches(grid.layout), size.rows * size.seq)


def summary(times: list[float], phases: list[dict[str, float]], load: float, balance: bool) -> dict:
    """Seconds of every step and medians of rank 0's phases."""
    spent = {name: statistics.median(phase[name] for phase in phases) for name in phases[0]}
    return {"balance": balance, "step_s": times, "load_max_over_mean": load, "phase_s": spent}


def encoder_floor(size: Size, config, images: int) -> float:
    """Seconds that the encoder's FLOPs take at the rate of a matrix product on the cores there are."""
    import torch

    from tandem.train.cost.flops import device_peak_tflops, encoder_flops

    work = 3 * encoder_flops(config.model.encoder, np.full((images, 2), size.side))
    cores = min(size.ranks, len(os.sched_getaffinity(0)))
    return work / (device_peak_tflops(torch.device("cpu")) * 1e12) / cores


def start_up(shards: Path) -> dict[str, float]:
    """Seconds from calling torchrun to the end of a run of one step of the toy world, and of that step."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["+recipe=stage2", "scale=toy", *TOY_LAYOUT, f"run.dir={folder}/run", "train.steps=1"]
        settings += [
            f"data.sources.main.shards=['{ROOT / shards}/train/*.tar']",
            f"data.tokenizer={ROOT / shards}/tokenizer.json",
        ]
        begin = time.perf_counter()
        subprocess.run(
            torchrun(4, "launch/pretrain.py", *settings),
            cwd=ROOT,
            check=True,
            env=one_thread(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        whole = time.perf_counter() - begin
        first = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[0])
        return {"run_s": whole, "step_s": first["step_time_s"]}


def table(result: dict) -> str:
    """Planning, the skewed step with balancing on and off, and the start-up."""
    settings, plan, step = result["settings"], result["measured"]["planning"], result["measured"]["step"]
    ratio = plan["argmin_ms"] / plan["heap_ms"]
    lines = [
        f"planning {settings['planned_images']:,} images over {settings['planned_ranks']} ranks, one core",
        f"  heap {plan['heap_ms']:.1f} ms   argmin {plan['argmin_ms']:.0f} ms   ratio {ratio:.1f}x   "
        f"floor (sort) {plan['floor_ms']:.1f} ms",
        f"  encoder load max/mean {plan['load_max_over_mean']:.5f}",
        f"hybrid step, {settings['ranks']} gloo ranks on {result['machine']['cores']} cores, {LAYOUT}, all images in "
        "one replica's rows",
        f"  dispatched {step['dispatched']:,} elements each way, visual tokens x width = {step['expected']:,}",
    ]
    for one in step["steps"]:
        spent = one["phase_s"]
        shares = "  ".join(f"{name} {value / sum(spent.values()):.0%}" for name, value in spent.items())
        encoder = spent["encode"] + spent["encoder_backward"]
        lines.append(
            f"  balance {'on ' if one['balance'] else 'off'}: step {1e3 * statistics.median(one['step_s']):.0f} ms   "
            f"load max/mean {one['load_max_over_mean']:.2f}   rank 0 encodes, "
            f"forward and backward, {1e3 * encoder:.0f} ms, "
            f"floor {1e3 * step['encoder_floor_s']:.0f} ms"
        )
        lines.append(f"    {shares}")
    on, off = (statistics.median(one["step_s"]) for one in step["steps"])
    lines.append(f"  balancing makes the step {off / on:.2f}x as fast")
    if start := result["measured"]["start_up"]:
        lines.append(
            f"start-up, 4 toy ranks: a run of one step {start['run_s']:.1f} s, the step {start['step_s']:.1f} s"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
