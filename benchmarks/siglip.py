"""SigLIP over ranks: extra memory and time of the loss, ours beside two peers.

    python benchmarks/siglip.py            1, 2, 4 and 8 gloo ranks, about a minute on two cores

Peers, in plain autograd, in the same processes, forward and backward:
    ring    text blocks go round the ranks, every local x local block of logits is kept for the backward;
    gather  all texts are gathered, every rank keeps local x global logits, autograd goes back through the gather:
            open_clip's loss over gathered features.
Extra memory: the highest sum of bytes of live CPU tensors while a loss and its gradients are made, above what lived
before, from the allocations that torch's profiler sees; the rank with the most.  Time: the slowest rank, the median of
repeats in turn; ratios are those of the medians.  Floor: the three products of a tile (logits and two gradients), 6 *
local * global * width FLOPs per rank, at the rate of one matrix product of the same block on as many cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

from benchmarks import results
from benchmarks.processes import InRanks, in_ranks

FORMS = ("ours", "ring", "gather")


@dataclass(frozen=True)
class Size:
    """worlds: numbers of ranks.  local: pairs per rank.  width: of an embedding.  repeats: of every form."""

    worlds: tuple[int, ...]
    local: int
    width: int
    repeats: int


SIZES = {"docs": Size((1, 2, 4, 8), local=1024, width=512, repeats=5), "toy": Size((1, 2), 16, 8, repeats=1)}


def main(argv: list[str] | None = None, in_ranks: InRanks = in_ranks) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = results.parse(parser, argv)
    size = SIZES[options.size]
    measured = in_ranks(size.worlds[-1], "benchmarks.siglip", "losses_of_ranks", options.size)
    results.report("siglip", options, asdict(size), measured, table)


def losses_of_ranks(size_name: str) -> dict:
    """One of the most ranks: takes part where the world is large enough, and waits where it is not."""
    import torch
    import torch.distributed as dist

    size = SIZES[size_name]
    torch.set_num_threads(1)
    rows = []
    for world in size.worlds:
        group = dist.new_group(range(world))
        if dist.get_rank() < world:
            rows.append({"ranks": world, **measure(size, group)})
        dist.barrier()
    return {"worlds": rows}


def measure(size: Size, group) -> dict:
    """Extra bytes and seconds of every form, and seconds of the floor, in one world."""
    import torch
    import torch.distributed as dist

    forms = {"ours": ours, "ring": ring_that_keeps, "gather": gathered}
    draw = torch.Generator().manual_seed(dist.get_rank(group))
    drawn = [torch.randn(size.local, size.width, generator=draw) for _ in range(2)]
    embeddings = [torch.nn.functional.normalize(tensor, dim=-1) for tensor in drawn]
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
    for repeat in range(size.repeats):
        for form in FORMS[repeat % 3 :] + FORMS[: repeat % 3]:
            times[form].append(seconds(lambda form=form: step(form), group))
            take_gradients()
        floors.append(seconds(lambda: floor(inputs, group), group))
    return {"bytes": memory, "seconds": times, "floor_s": floors}


def ours(image, text, scale, bias, group):
    from tandem.train.objectives.siglip import siglip_loss

    return siglip_loss(image, text, scale, bias, counts=[len(image)] * group.size(), group=group)


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
    return total / (len(image) * group.size())


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
    return block_loss(image, texts, scale, bias, len(image) * dist.get_rank(group)) / len(texts)


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


def table(result: dict) -> str:
    """A row per world, and how memory grows with the ranks."""
    worlds, settings = result["measured"]["worlds"], result["settings"]
    lines = [
        f"SigLIP loss, forward and backward, {settings['local']} pairs of width {settings['width']} a rank, fp32, "
        f"gloo on {result['machine']['cores']} cores",
        "         extra MiB of a rank           ms, slowest rank                      time of ours over",
        "  ranks    ours    ring  gather       ours    ring  gather   floor           ring  gather",
    ]
    for row in worlds:
        ms = {form: 1e3 * statistics.median(row["seconds"][form]) for form in FORMS}
        sizes = "".join(f"{row['bytes'][form] / 2**20:8.1f}" for form in FORMS)
        times = "".join(f"{ms[form]:8.0f}" for form in FORMS) + f"{1e3 * statistics.median(row['floor_s']):8.0f}"
        ratios = "".join(f"{ms['ours'] / ms[form]:8.2f}" for form in FORMS[1:])
        lines.append(f"  {row['ranks']:5d}{sizes}   {times}       {ratios}")
    growth = (f"{form} {worlds[-1]['bytes'][form] / worlds[0]['bytes'][form]:.2f}x" for form in FORMS)
    lines.append(f"  memory from {worlds[0]['ranks']} to {worlds[-1]['ranks']} ranks: {', '.join(growth)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
