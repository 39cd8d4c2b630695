"""Our experts beside Megatron-core's SequentialMLP on a CPU: 64 of toy width, forward and backward, same weights.

    taskset -c 0 python benchmarks/experts.py       ten seconds; on one core, where other work does not count
    python benchmarks/experts.py                    on all cores, on a machine with nothing else to do

Three loads: rows spread evenly by a router that has learned nothing, rows in a Zipf distribution over the experts, and
the whole layer with router and dispatch, beside Megatron-core's.  The floor is the larger of two times: the products'
FLOPs at the speed of a large product, and every tensor moved once at the speed of a copy.  It counts the experts alone.

Legend: T rows, E experts, D width, F expert width.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before this folder, whose data.py is not the package

import tandem.parallel  # noqa: F401  (installs the CPU backend before megatron is imported)
from benchmarks import results

# isort: split
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module

from benchmarks.workloads.language import World
from tandem.parallel.kernels.experts import arrange, moe_spec
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_spec import transformer_config

CPU = torch.device("cpu")
LIMIT = 1e-5  # of the norm of the difference, relative: fp32 sums in another order
TOY = LLMConfig(
    layers=1,
    width=64,
    heads=4,
    kv_heads=2,
    head_width=16,
    vocab_size=384,
    ffn_width=0,
    num_experts=64,
    top_k=2,
    expert_width=64,
    shared_expert_width=0,
    aux_loss=1e-3,
    z_loss=1e-4,
    rope_base=1e4,
    norm_eps=1e-6,
    init_std=0.06,
)


@dataclass(frozen=True)
class Size:
    """tokens: of a row, in each part of the table.  rounds: of ours and the peer in turn.  square: side of the matrices
    whose product is the speed of the floor.
    """

    tokens: tuple[int, ...]
    rounds: int
    square: int


SIZES = {"docs": Size(tokens=(512, 1024), rounds=40, square=1024), "toy": Size((32,), rounds=1, square=64)}


@dataclass(frozen=True)
class Load:
    """What both sides compute: `ours` and `peer` run forward and backward and return output and gradients."""

    name: str
    rows: int
    arrangement: str
    ours: Callable[[], list[torch.Tensor]]
    peer: Callable[[], list[torch.Tensor]]


def layers_of(world: World) -> tuple[MoELayer, MoELayer]:
    """Our layer and Megatron-core's, with the same weights."""
    config = transformer_config(TOY, world.layout, dtype=torch.float32, recompute="none", deterministic=False)
    local = get_moe_module_spec_for_backend(LocalSpecProvider(), num_experts=TOY.num_experts)
    ours, peer = (build_module(spec, config=config) for spec in (moe_spec(config), local))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        peer.router.weight.copy_(ours.router.weight.normal_(0, TOY.init_std, generator=generator))
        for name, stacked in ours.experts.named_parameters():
            stacked.normal_(0, TOY.init_std, generator=generator)
            for expert, weight_XY in zip(peer.experts.local_experts, stacked, strict=True):
                getattr(expert, name).weight.copy_(weight_XY)
    for layer in (ours, peer):
        layer.set_layer_number(1)
    return ours, peer


def step_of(module: torch.nn.Module, x_TD: torch.Tensor, *inputs: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
    """Forward and backward of `module`, as training has them: gradients of input and weights."""
    gradient_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(2))

    def step() -> list[torch.Tensor]:
        x = x_TD.detach().requires_grad_()
        module.zero_grad()
        output, _ = module(x, *inputs)
        output.backward(gradient_TD)
        return [output.detach(), x.grad, *(weight.grad for weight in module.parameters() if weight.grad is not None)]

    return step


def loads(world: World, tokens: int) -> list[Load]:
    """The three loads of `tokens` tokens, each of which goes to K experts."""
    ours, peer = layers_of(world)
    draw = torch.Generator().manual_seed(1)
    rows, experts = tokens * TOY.top_k, TOY.num_experts
    found = []
    zipf_E = 1 / torch.arange(1, experts + 1)
    for name, weight_E in (("experts, rows spread evenly", torch.ones(experts)), ("experts, Zipf", zipf_E)):
        chosen_T = torch.multinomial(weight_E, rows, replacement=True, generator=draw)
        counts_E = chosen_T.bincount(minlength=experts)
        x_TD, p_T = torch.randn(rows, TOY.width, generator=draw), torch.rand(rows, generator=draw)
        arrangement = type(arrange(x_TD, ours.experts.linear_fc2, counts_E)).__name__
        steps = (step_of(layer.experts, x_TD, counts_E, p_T) for layer in (ours, peer))
        found.append(Load(name, rows, arrangement, *steps))
    x_T1D = torch.randn(tokens, 1, TOY.width, generator=draw)
    found.append(Load("layer: router, dispatch, experts", rows, "", *(step_of(layer, x_T1D) for layer in (ours, peer))))
    return found


def difference(load: Load) -> float:
    """Largest relative difference of output and input gradient."""
    pairs = zip(load.ours()[:2], load.peer()[:2], strict=True)
    return max(((mine - other).norm() / other.norm()).item() for mine, other in pairs)


def seconds(load: Load, rounds: int) -> tuple[float, float]:
    """Medians of ours and the peer, which take turns; of the processor's time on one core, of the clock's on more."""
    clock = clock_of_cores()
    times = ([], [])
    for _ in range(rounds):
        for step, mine in zip((load.ours, load.peer), times, strict=True):
            begin = clock()
            step()
            mine.append(clock() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def clock_of_cores() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def least_seconds(action: Callable[[], object], repeats: int = 15) -> float:
    best, clock = float("inf"), clock_of_cores()
    for _ in range(repeats):
        begin = clock()
        action()
        best = min(best, clock() - begin)
    return best


def speeds(size: int) -> dict[str, float]:
    """FLOP/s of a product of square matrices, and bytes/s that a copy reads and writes."""
    x, large = torch.randn(size, size), torch.ones(16 * size**2)
    target = torch.empty_like(large)
    return {
        "flop_per_s": 2 * size**3 / least_seconds(lambda: x @ x),
        "bytes_per_s": 2 * large.nbytes / least_seconds(lambda: target.copy_(large)),
    }


def floor(rows: int, speed: dict[str, float]) -> dict[str, float]:
    """Least seconds of the experts' forward and backward in fp32, with the FLOPs and bytes that it is made of."""
    width, inner = TOY.width, TOY.expert_width
    work = 3 * rows * 6 * width * inner
    weights = 3 * TOY.num_experts * 3 * width * inner  # read forward, read backward, gradient written
    moved = 4 * (weights + rows * (5 * width + 4 * inner))  # x, h, y; gradient, h, x, gradient of x
    least = max(work / speed["flop_per_s"], moved / speed["bytes_per_s"])
    return {"floor_s": least, "flop": work, "bytes": moved}


def measure(size: Size) -> dict:
    """Seconds of every load, ours and the peer's.  Exits where the outputs differ by more than the order of sums."""
    speed, parts = speeds(size.square), []
    with World(CPU) as world:
        for tokens in size.tokens:
            rows = []
            for load in loads(world, tokens):
                error = difference(load)
                if error > LIMIT:
                    raise SystemExit(f"error: {load.name}: differs by {error:.0e}, more than {LIMIT:.0e}")
                mine, other = seconds(load, size.rounds)
                part = {"name": load.name, "arrangement": load.arrangement, "difference": error}
                rows.append(part | {"ours_s": mine, "megatron_s": other})
            parts.append({"tokens": tokens, **floor(tokens * TOY.top_k, speed), "rows": rows})
    return {**speed, "parts": parts}


def table(result: dict) -> str:
    """A row per load: milliseconds of ours and the peer, and how many times as long the peer takes."""
    measured, settings = result["measured"], result["settings"]
    lines = [
        f"{settings['experts']} experts of {settings['width']} x {settings['expert_width']}, {settings['top_k']} a "
        f"token, forward and backward in fp32, cores: {result['machine']['cores']}",
        f"speeds: {measured['flop_per_s'] / 1e9:,.0f} GFLOP/s, {measured['bytes_per_s'] / 1e9:.1f} GB/s",
    ]
    for part in measured["parts"]:
        floor_ms = 1e3 * part["floor_s"]
        work = f"{part['flop'] / 1e9:.3f} GFLOP, {part['bytes'] / 1e6:.1f} MB"
        title = f"{part['tokens']:,} tokens"
        lines.append(f"{title:34}{'ours, ms':>9}{'of floor':>9}{'Megatron':>10}{'ratio':>7}{'difference':>12}")
        for row in part["rows"]:
            mine, other = 1e3 * row["ours_s"], 1e3 * row["megatron_s"]
            lines.append(
                f"  {row['name']:32}{mine:>9.2f}{floor_ms / mine:>9.0%}{other:>10.2f}{other / mine:>7.2f}"
                f"{row['difference']:>12.0e}  {row['arrangement']}".rstrip()
            )
        lines.append(f"  {'floor':32}{floor_ms:>9.2f}  {work}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options = results.parse(parser, argv)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    size = SIZES[options.size]
    shape = {"experts": TOY.num_experts, "width": TOY.width, "expert_width": TOY.expert_width, "top_k": TOY.top_k}
    results.report("experts", options, {**vars(size), **shape}, measure(size), table, ["megatron-core"])


if __name__ == "__main__":
    main()
