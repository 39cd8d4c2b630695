"""The hybrid step on this machine: planning at scale, delivery, balancing on and off, share of each phase, start-up.

    python benchmarks/hybrid_step.py            # four gloo ranks, about a minute on two cores

Peers in the same run: the argmin form of the greedy assignment, and the step with images left where they are read.
Floors: for planning, sorting the costs (no assignment can skip it); for the encoder, its FLOPs at the rate of a matrix
product on the cores there are; for delivery, visual tokens x width elements each way.
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
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # before this folder, whose data.py is not the package
RANKS = 4
REPEATS = 7
SEQ, ROWS, SIDE = 512, 8, 16  # tokens a row, rows a step, patches a side of each image
LAYOUT = ["parallel.ep=2"]  # four replicas of one rank: all images of the skewed step belong to one of them
TOY_LAYOUT = ["parallel.pp=2", "parallel.ep=2"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", default="shards/toy", help="corpus of launch/make_shards.py, for the start-up time")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker()
        return
    planning()
    subprocess.run(torchrun("benchmarks/hybrid_step.py", "--worker"), cwd=ROOT, check=True, env=one_thread())
    start_up(Path(arguments.shards))


def torchrun(*arguments: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return launcher + list(arguments)


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}


def best_ms(function, repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        function()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def argmin_assign(costs: np.ndarray, ranks: int) -> np.ndarray:
    """The peers' form: the least loaded rank is searched anew for every image."""
    load_R, owner_I = np.zeros(ranks), np.empty(costs.size, dtype=np.int64)
    for image in np.argsort(-costs, kind="stable"):
        owner_I[image] = load_R.argmin()
        load_R[owner_I[image]] += costs[image]
    return owner_I


def planning(images: int = 30_720, ranks: int = 256) -> None:
    """Greedy assignment at the report's group size on a log-uniform mix of 196 to 6,400 patches."""
    from parallel.balance import assign_images, image_costs, load_max_over_mean

    draw = np.random.default_rng(0)
    patches = np.exp(draw.uniform(np.log(196), np.log(6400), images)).astype(np.int64)
    costs = image_costs(patches, width=1280, layers=27)
    ours = best_ms(lambda: assign_images(costs, ranks))
    peer = best_ms(lambda: argmin_assign(costs, ranks), repeats=1)
    floor = best_ms(lambda: np.argsort(-costs, kind="stable"))
    load = load_max_over_mean(costs, assign_images(costs, ranks), ranks)
    print(f"planning {images:,} images over {ranks} ranks, one core")
    print(f"  heap {ours:.1f} ms   argmin {peer:.0f} ms   ratio {peer / ours:.0f}x   floor (sort) {floor:.1f} ms")
    print(f"  encoder load max/mean {load:.5f}")


def worker() -> None:
    """One rank of the step: the same skewed steps with and without balancing, in turn."""
    import torch
    import torch.distributed as dist

    from parallel.hybrid_step import hybrid_step
    from parallel.phases import PhaseTimer
    from train.build import build_engines, start_world, train_forward, train_loss
    from train.rows import step_input

    config = settings()
    device = torch.device("cpu")
    start_world(device)
    layout = config.check(dist.get_world_size())
    loss = functools.partial(train_loss, domains=1)
    engines = build_engines(config, layout, device, forward=train_forward, loss=loss)
    timer, times, phases, moved = PhaseTimer(device), {True: [], False: []}, {True: [], False: []}, []
    loads = {}
    for repeat in range(REPEATS + 1):
        for balance in (True, False):
            prepared = skewed_step(config, engines.grid, balance)
            loads[balance] = prepared.share.routes.load_max_over_mean
            batch, before = step_input(prepared, engines.grid), engines.exchange.elements_delivered
            dist.barrier()
            begin = time.perf_counter()
            hybrid_step(engines, batch, report_shape=(2, 1), clip_norm=1.0, replay=False, stop=False, timer=timer)
            dist.barrier()
            seconds = time.perf_counter() - begin
            spent = timer.take()
            if repeat:  # the first pass warms up
                times[balance].append(seconds)
                phases[balance].append(spent)
                moved.append(engines.exchange.elements_delivered - before)
    sent = torch.tensor(moved[0])
    dist.all_reduce(sent)
    if engines.grid.rank == 0:
        print_steps(config, times, phases, loads, int(sent), int(prepared.plan.tokens_I.sum()) * engines.width)
    dist.destroy_process_group()


def settings():
    """Toy settings with an encoder that weighs as much in its step as it does in a picture-heavy batch."""
    from hydra import compose, initialize_config_dir

    from launch.pretrain import read_config

    overrides = [
        "+recipe=stage1",
        "scale=toy",
        f"train.seq_length={SEQ}",
        f"train.global_batch_size={ROWS}",
        "train.micro_batch_size=2",
        "model.encoder.width=192",
        "model.encoder.depth=4",
        "parallel.encoder.chunk_patches=4096",
        *LAYOUT,
    ]
    with initialize_config_dir(str(ROOT / "recipes"), version_base="1.3"):
        return read_config(compose("config", overrides=overrides))


def skewed_step(config, grid, balance: bool):
    """A step whose images all belong to one replica's rows: the worst case for encoding where data is read."""
    import numpy as np

    from data.plan import StepPlan
    from data.reader import ImageBatch
    from parallel.routes import assign_owners, build_routes
    from train.batch import RowText, rows_of_replica, visual_plan
    from train.feed import PreparedStep
    from train.rows import RowShare

    tokens = SIDE * SIDE // 4
    rows_RMB = [
        rows_of_replica(grid.layout, replica, config.micro_batches(grid.layout), config.train.micro_batch_size)
        for replica in range(grid.layout.dp)
    ]
    rows = rows_RMB[0].ravel()
    per_row = SEQ // tokens - 1
    row_I = np.repeat(np.sort(rows), per_row).astype(np.int32)
    start_I = np.tile(np.arange(per_row) * tokens, rows.size).astype(np.int32)
    all_rows = np.arange(ROWS, dtype=np.int32)
    plan = StepPlan(
        step=0,
        seq_length=SEQ,
        shard_S=0 * all_rows,
        index_S=all_rows,
        row_S=all_rows,
        start_S=0 * all_rows,
        length_S=np.full(ROWS, SEQ, np.int32),
        domain_S=np.zeros(ROWS, np.int16),
        image_sample_I=row_I,
        cut_S=np.zeros(ROWS, bool),
        image_media_I=0 * row_I,
        time_I=np.full(row_I.size, -1, np.int32),
        grid_hw_I2=np.full((row_I.size, 2), SIDE, np.int32),
        tokens_I=np.full(row_I.size, tokens, np.int32),
        row_I=row_I,
        start_I=start_I,
        state_after={},
    )
    chunk_patches = config.parallel.encoder.chunk_patches
    visual = visual_plan(plan, grid.layout, config.train.micro_batch_size, config.model.encoder, chunk_patches)
    owner_I = assign_owners(visual, grid.layout, balance)
    routes = build_routes(
        visual,
        owner_I,
        grid.layout,
        grid.rank,
        config.micro_batches(grid.layout),
        chunk_patches,
    )
    mine = int(visual.patches_I[owner_I == grid.rank].sum())
    draw = np.random.default_rng(grid.rank)
    grids = np.full((mine // (SIDE * SIDE), 2), SIDE, np.int32)
    images = ImageBatch(draw.integers(0, 256, (mine, 588), dtype=np.uint8), grids, 0, [])
    shape = (config.train.micro_batch_size, SEQ)
    text = RowText(
        tokens=draw.integers(0, 200, shape),
        labels=draw.integers(0, 200, shape),
        loss_mask=np.ones(shape, bool),
        domain=np.zeros(shape, np.int16),
    )
    share = RowShare(
        image_ids=np.concatenate(routes.chunks), rows=rows[:0], digest=0, routes=routes, rows_MB=rows_RMB[grid.place.dp]
    )
    return PreparedStep(plan, share, images, [text] * config.micro_batches(grid.layout), ROWS * SEQ)


def print_steps(config, times, phases, loads, sent, expected) -> None:
    import torch

    from train.flops import device_peak_tflops, encoder_flops

    patches = np.full(expected // config.model.llm.width * 4 // (SIDE * SIDE), SIDE * SIDE)
    work = 3 * encoder_flops(config.model.encoder, patches)
    cores = min(RANKS, len(os.sched_getaffinity(0)))
    rate = device_peak_tflops(torch.device("cpu")) * 1e12
    print(f"hybrid step, {RANKS} gloo ranks on {cores} cores, {' '.join(LAYOUT)}, all images in one replica's rows")
    print(f"  delivered {sent:,} elements each way, visual tokens x width = {expected:,}")
    for balance in (True, False):
        step = statistics.median(times[balance])
        spent = {name: statistics.median(p[name] for p in phases[balance]) for name in phases[balance][0]}
        shares = "  ".join(f"{name} {value / sum(spent.values()):.0%}" for name, value in spent.items())
        encoder = spent["encode"] + spent["encoder_backward"]
        floor = work / rate / cores
        print(
            f"  balance {'on ' if balance else 'off'}: step {step * 1e3:.0f} ms   load max/mean {loads[balance]:.2f}   "
            f"rank 0 encodes {encoder * 1e3:.0f} ms, floor {floor * 1e3:.0f} ms   {shares}"
        )
    ratio = statistics.median(off / on for on, off in zip(times[True], times[False], strict=True))
    print(f"  balancing makes the step {ratio:.2f}x as fast")


def start_up(shards: Path) -> None:
    """Seconds from calling torchrun to the end of the first step of the toy world."""
    if not (ROOT / shards / "tokenizer.json").is_file():
        print(f"start-up: {shards} is missing; make it with python launch/make_shards.py {shards}")
        return
    with tempfile.TemporaryDirectory() as folder:
        settings = ["+recipe=stage2", "scale=toy", *TOY_LAYOUT, f"run.dir={folder}/run", "train.steps=1"]
        settings += [
            f"data.sources.main.shards=['{ROOT / shards}/train/*.tar']",
            f"data.tokenizer={ROOT / shards}/tokenizer.json",
        ]
        begin = time.perf_counter()
        subprocess.run(
            torchrun("launch/pretrain.py", *settings),
            cwd=ROOT,
            check=True,
            env=one_thread(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        whole = time.perf_counter() - begin
        first = json.loads((Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()[0])
        print(f"start-up, {RANKS} toy ranks: a run of one step {whole:.1f} s, the step {first['step_time_s']:.1f} s")


if __name__ == "__main__":
    main()
