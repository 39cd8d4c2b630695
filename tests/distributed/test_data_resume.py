"""The stream goes on where it was killed, on any world, layout and number of workers: same samples, bytes, order.

Real gloo worlds run the prefetcher alone, without a model. A world is killed at a random moment after step k was used;
the next one starts from the position that step k left.
"""

import json
import os
import random
import signal
import threading
import time
import zlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tandem.parallel.grid import build_grid
from tandem.train.config.checks import check_config
from tandem.train.input.dataset import open_data
from tandem.train.input.rows import row_prefetcher
from tests.distributed.world import run_world
from tests.support import corpus_overrides, settings

STEPS = 9
BATCH = ["train.global_batch_size=24", "train.seq_length=256", "data.max_patches=64", "data.block_samples=128"]
WIDE = {  # world: layout
    1: [],
    2: ["parallel.pp=2"],
    3: [],
    4: ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"],
    8: ["parallel.pp=2", "parallel.cp=2", "parallel.ep=2"],
}
LIVES = [  # (steps until the kill, world, workers) of each life of a run
    [(3, 1, 0), (2, 2, 1), (4, 4, 0)],
    [(1, 4, 1), (5, 3, 0), (3, 2, 3)],
    [(4, 8, 0), (1, 1, 3), (4, 3, 1)],
    [(2, 2, 0), (2, 2, 0), (5, 2, 1)],
]


def contents(prepared, grid) -> torch.Tensor:
    """Two sums of checksums over the world: of every image's patches, and of every row's tokens and targets."""
    sums = torch.zeros(2, dtype=torch.int64)
    patches_I, first = prepared.images.grid_hw_I2.prod(axis=1), 0
    for count in patches_I.tolist():
        sums[0] += zlib.crc32(prepared.images.patches_NP[first : first + count].tobytes())
        first += count
    if grid.is_first_stage and not grid.place.tp and not grid.place.cp:
        for rows, text in zip(prepared.rank_shard.rows_MB, prepared.text, strict=True):
            for place, row in enumerate(rows.tolist()):
                line = (text.tokens, text.labels, text.loss_mask, text.domain)
                sums[1] += row * zlib.crc32(b"".join(array[place].tobytes() for array in line))
    dist.all_reduce(sums)
    return sums


def live(overrides: list[str], steps: int, position: str, log: str, deadly: bool) -> None:
    """Runs the prefetcher from `position` and logs what each step holds; `deadly` kills one rank after the last one."""
    config = settings("stage1", *BATCH, *overrides)
    data = open_data(config)
    grid = build_grid(check_config(config, dist.get_world_size()), torch.device("cpu"), 0)
    if Path(position).exists():
        data.stream.load_state(json.loads(Path(position).read_text()))
    for done, prepared in enumerate(row_prefetcher(data, config, grid, steps=STEPS), 1):
        plan, sums = prepared.plan, contents(prepared, grid).tolist()
        prepared.release()
        assert not prepared.skipped
        if grid.rank == 0:
            samples = [plan.shard_S.tolist(), plan.index_S.tolist(), plan.row_S.tolist(), plan.start_S.tolist()]
            with open(log, "a") as file:
                file.write(json.dumps([plan.step, samples, sums, prepared.trained_tokens]) + "\n")
            Path(position + ".new").write_text(json.dumps(plan.state_after))
            os.replace(position + ".new", position)
        if done == steps:
            break
    dist.barrier()
    if deadly and grid.rank == dist.get_world_size() - 1:
        time.sleep(random.random() * 0.2)  # the prefetchers are a few steps ahead, somewhere in a read or a collective
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait(30 if deadly else 0)


def lives(folder: Path, overrides: list[str], plan: list[tuple[int, int, int]]) -> list:
    """What all lives of one run logged, in order."""
    position, log = str(folder / "position.json"), str(folder / "log")
    for place, (steps, world, workers) in enumerate(plan):
        arguments = [*overrides, *WIDE[world], f"data.workers={workers}"], steps, position, log
        deadly = place + 1 < len(plan)
        if deadly:
            with pytest.raises(RuntimeError, match=r"died|failed"):
                run_world(live, world, *arguments, True)
        else:
            run_world(live_to_the_end, world, *arguments)
    return [json.loads(line) for line in Path(log).read_text().splitlines()]


def live_to_the_end(overrides: list[str], steps: int, position: str, log: str) -> None:
    """As `live`, for the last life: nothing is left unread."""
    global STEPS
    whole, STEPS = STEPS, steps
    try:
        live(overrides, steps, position, log, False)
    finally:
        STEPS = whole


@pytest.fixture(scope="module")
def uninterrupted(corpus, tmp_path_factory):
    return lives(tmp_path_factory.mktemp("whole"), corpus_overrides(corpus), [(STEPS, 1, 0)])


@pytest.mark.parametrize("plan", LIVES, ids=lambda plan: " then ".join(f"{s} on {w}x{n}" for s, w, n in plan))
def test_killed_runs_read_what_the_uninterrupted_run_reads(plan, corpus, uninterrupted, tmp_path):
    """Same samples at the same places, same pixels, same text, same trained tokens: none lost, none repeated."""
    assert sum(steps for steps, _, _ in plan) == STEPS
    assert lives(tmp_path, corpus_overrides(corpus), plan) == uninterrupted


def read_an_epoch(overrides: list[str]) -> tuple[int, int]:
    """(bytes read by all ranks, bytes of the samples used) over one epoch; a sample that its end and the next one's
    beginning bring into one step is used once there."""
    config = settings("stage1", *BATCH, *overrides)
    data = open_data(config)
    grid = build_grid(check_config(config, dist.get_world_size()), torch.device("cpu"), 0)
    seen, read, used = 0, 0, 0
    start, steps = data.stream.state(), 0
    while seen < data.stream.samples_per_epoch:
        seen, steps = seen + data.stream.next_step().shard_S.size, steps + 1
    data.stream.load_state(start)
    for prepared in row_prefetcher(data, config, grid, steps=steps):
        plan = prepared.plan
        read += prepared.bytes_read
        for shard, sample in sorted(set(zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True))):
            index = data.stream.corpus.index(shard)
            record = index.samples[sample]
            first = int(record["first_media"])
            used += int(record["text_size"]) + int(index.media["size"][first : first + int(record["media"])].sum())
        prepared.release()
    return read, used


@pytest.mark.parametrize("world", [1, 4, 8])
def test_no_byte_is_read_twice(world, corpus):
    """All ranks of any layout together read each sample once; 2% are allowed for clips that share a video's bytes."""
    read, used = run_world(read_an_epoch, world, [*corpus_overrides(corpus), *WIDE[world]])[0]
    assert used <= read <= 1.02 * used
