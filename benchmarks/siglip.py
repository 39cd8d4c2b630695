"""SigLIP over ranks: extra memory and time of the loss, ours beside two peers.

    python benchmarks/siglip.py            # 1, 2, 4 and 8 gloo ranks, about a minute on two cores

Peers, in plain autograd, in the same processes, forward and backward:
    ring    text blocks go round the ranks, every local x local block of logits is kept for the backward;
    gather  all texts are gathered, every rank keeps local x global logits, autograd goes back through the gather:
            open_clip's loss over gathered features.
Extra memory: the highest sum of bytes of live CPU tensors while a loss and its gradients are made, above what lived
before, from the allocations that torch's profiler sees; the rank with the most.  Time: the slowest rank, the median of
repeats in turn.  Floor: the three products of a tile (logits and two gradients), 6 * local * global * width FLOPs a
rank, at the rate of one matrix product of the same block on as many cores.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WORLDS = (1, 2, 4, 8)
LOCAL, WIDTH = 1024, 512  # pairs of a rank, width of an embedding
REPEATS = 5
FORMS = ("ours", "ring", "gather")
FLAT, TIME = 1.05, 1.35  # what is asked of ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().worker:
        worker()
        return
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={WORLDS[-1]}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    environment["KINETO_LOG_LEVEL"] = "99"  # the profiler announces itself otherwise
    subprocess.run([*launcher, __file__, "--worker"], cwd=ROOT, check=True, env=environment)


def worker() -> None:
    """One of the most ranks: takes part where the world is large enough, and waits where it is not."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    groups = {world: dist.new_group(range(world)) for world in WORLDS}
    table = {}
    for world, group in groups.items():
        if dist.get_rank() < world:
            table[world] = measure(group)
        dist.barrier()
    if dist.get_rank() == 0:
        report(table)
    dist.destroy_process_group()


def measure(group) -> dict:
    """Extra bytes and seconds of every form, and the seconds of the floor, in one world."""
    import torch
    import torch.distributed as dist

    forms = {"ours": ours, "ring": ring_that_keeps, "gather": gathered}
    draw = torch.Generator().manual_seed(dist.get_rank(group))
    embeddings = [torch.nn.functional.normalize(torch.randn(LOCAL, WIDTH, generator=draw), dim=-1) for _ in range(2)]
    inputs = [*embeddings, torch.tensor(10.0), torch.tensor(-10.0)]
    inputs = [tensor.requires_grad_() for tensor in inputs]

    def step(form):
        forms[form](*inputs, group).backward()

    def take_gradients():
        gradients = [tensor.grad for tensor in inputs]
        for tensor in inputs:
            tensor.grad = None
        return gradients

    memory, times, floors, expected = {}, {form: [] for form in FORMS}, [], None
    for form in FORMS:
        step(form)  # also warms up
        gradients = take_gradients()
        expected = expected or gradients
        torch.testing.assert_close(gradients, expected, rtol=1e-3, atol=1e-6)  # all three compute the same
        memory[form] = worst(peak_bytes(lambda form=form: step(form)), group)
        take_gradients()
    for repeat in range(REPEATS):
        for form in FORMS[repeat % 3 :] + FORMS[: repeat % 3]:
            times[form].append(seconds(lambda form=form: step(form), group))
            take_gradients()
        floors.append(seconds(lambda: floor(inputs, group), group))
    return {"memory": memory, "times": times, "floor": statistics.median(floors)}


def ours(image, text, scale, bias, group):
    from train.objectives.siglip import siglip_loss

    return siglip_loss(image, text, scale, bias, counts=[LOCAL] * group.size(), group=group)


def block_loss(image, text, scale, bias, matches):
    """Sum over a block of logits as autograd keeps it; matches: the column of the first image's text, or None."""
    import torch
    import torch.nn.functional as F

    logits = scale * image @ text.T + bias
    sign = -torch.ones_like(logits)
    if matches is not None:
        sign[:, matches : matches + len(image)].diagonal().fill_(1)
    return -F.logsigmoid(sign * logits).sum()


def ring_that_keeps(image, text, scale, bias, group):
    total = block_loss(image, text, scale, bias, 0)
    for _ in range(group.size() - 1):
        text = shifted(text, group)
        total = total + block_loss(image, text, scale, bias, None)
    return total / (LOCAL * group.size())


def shifted(tensor, group):
    """The left neighbour's tensor; its gradient goes back to the left."""
    import torch
    import torch.distributed as dist

    def swap(tensor, to):
        received = torch.empty_like(tensor)
        to, origin = (dist.get_rank(group) + to) % group.size(), (dist.get_rank(group) - to) % group.size()
        sends = dist.P2POp(dist.isend, tensor.contiguous(), group=group, group_peer=to)
        gets = dist.P2POp(dist.irecv, received, group=group, group_peer=origin)
        for work in dist.batch_isend_irecv([sends, gets]):
            work.wait()
        return received

    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return swap(tensor, 1)

        @staticmethod
        def backward(ctx, grad):
            return swap(grad, -1)

    return Shift.apply(tensor)


def gathered(image, text, scale, bias, group):
    import torch
    import torch.distributed as dist
    from torch.distributed.nn.functional import all_gather

    texts = torch.cat(all_gather(text, group=group))
    return block_loss(image, texts, scale, bias, LOCAL * dist.get_rank(group)) / (LOCAL * group.size())


def floor(inputs, group):
    """The products alone, as large as they come."""
    import torch

    image, text = (tensor.detach() for tensor in inputs[:2])
    for _ in range(group.size()):
        logits = image @ text.T
        torch.mm(logits, text)
        torch.mm(logits.T, image)


def peak_bytes(function) -> int:
    """The most bytes in CPU tensors while `function` runs, above what there was before."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event["name"] == "[memory]"]
    first = min(events, key=lambda event: event["ts"])["args"]
    before = first["Total Allocated"] - first["Bytes"]
    return max(event["args"]["Total Allocated"] for event in events) - before


def seconds(function, group) -> float:
    """Seconds until the slowest rank is done."""
    import torch.distributed as dist

    dist.barrier(group)
    begin = time.perf_counter()
    function()
    return worst(time.perf_counter() - begin, group)


def worst(value: float, group) -> float:
    import torch
    import torch.distributed as dist

    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest.item()


def report(table) -> None:
    cores = len(os.sched_getaffinity(0))
    print(f"SigLIP loss, forward and backward, {LOCAL} pairs of width {WIDTH} a rank, fp32, gloo on {cores} cores")
    print("         extra MiB of a rank           ms, slowest rank                        ours / ring")
    print("  ranks    ours    ring  gather       ours    ring  gather   floor")
    ratios = {}
    for world, row in table.items():
        mib = "".join(f"{row['memory'][form] / 2**20:8.1f}" for form in FORMS)
        ms = "".join(f"{1e3 * statistics.median(row['times'][form]):8.0f}" for form in FORMS)
        pairs = zip(row["times"]["ours"], row["times"]["ring"], strict=True)
        ratios[world] = statistics.median(mine / theirs for mine, theirs in pairs)
        print(f"  {world:5d}{mib}   {ms}{1e3 * row['floor']:8.0f}     {ratios[world]:.2f}x")
    first, last = table[WORLDS[0]]["memory"], table[WORLDS[-1]]["memory"]
    growth = {form: last[form] / first[form] for form in FORMS}
    others = ", ".join(f"{form} {growth[form]:.2f}x" for form in FORMS[1:])
    print(f"memory from {WORLDS[0]} to {WORLDS[-1]} ranks: ours {growth['ours']:.3f}x (asked: <= {FLAT}x); {others}")
    print(f"time against the ring that keeps its blocks: at most {max(ratios.values()):.2f}x (asked: <= {TIME}x)")


if __name__ == "__main__":
    main()
