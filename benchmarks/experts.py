"""Our experts beside Megatron-core's SequentialMLP on a CPU: 64 of toy width, forward and backward, same weights.

    python benchmarks/experts.py                    half a minute on two cores with nothing else to do
    taskset -c 0 python benchmarks/experts.py       on one core, where other work on the machine does not count

Three loads: rows spread evenly by a router that has learned nothing, rows in a Zipf distribution over the experts, and
the whole layer with router and dispatch, beside Megatron-core's.  The floor is the larger of two times: the products'
FLOPs at the speed of a large product, and every tensor moved once at the speed of a copy.

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

import parallel  # noqa: F401  (installs the CPU backend before megatron is imported)

# isort: split
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import build_module

from parallel.experts import arrange, moe_spec
from train.models.llm import LLMConfig
from train.models.llm_spec import transformer_config
from train.slices.language import World

CPU = torch.device("cpu")
LIMIT = 1e-5  # of the norm of the difference, relative: fp32 sums in another order
LINE = 3.0  # times as fast, the least that is asked for
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


def speeds(size: int = 1024) -> tuple[float, float]:
    """FLOP/s of a product of square matrices, and bytes/s that a copy reads and writes."""
    x, large = torch.randn(size, size), torch.ones(16 * size**2)
    target = torch.empty_like(large)
    return 2 * size**3 / least_seconds(lambda: x @ x), 2 * large.nbytes / least_seconds(lambda: target.copy_(large))


def floor(rows: int) -> float:
    """Least seconds of the experts' forward and backward in fp32, printed as it is put together."""
    width, inner = TOY.width, TOY.expert_width
    work = 3 * rows * 6 * width * inner
    weights = 3 * TOY.num_experts * 3 * width * inner  # read forward, read backward, gradient written
    moved = 4 * (weights + rows * (5 * width + 4 * inner))  # x, h, y; gradient, h, x, gradient of x
    peak, speed = speeds()
    least = max(work / peak, moved / speed)
    print(
        f"  floor {1e3 * least:.2f} ms: {work / 1e9:.3f} GFLOP at {peak / 1e9:,.0f} GFLOP/s, "
        f"{moved / 1e6:.1f} MB at {speed / 1e9:.1f} GB/s"
    )
    return least


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="a toy run's row")
    parser.add_argument("--rounds", type=int, default=40, help="of ours and the peer in turn")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with World(CPU) as world:
        cases = loads(world, options.tokens)
        rows = options.tokens * TOY.top_k
        print(
            f"{TOY.num_experts} experts of {TOY.width} x {TOY.expert_width}, {rows:,} rows of {options.tokens:,} tokens"
        )
        print(f"  forward and backward in fp32 on {torch.get_num_threads()} cores")
        least = floor(rows)
        print(f"  {'':34}{'ours, ms':>9}{'of floor':>9}{'Megatron':>10}{'ratio':>7}{'difference':>12}")
        for load in cases:
            error = difference(load)
            mine, other = seconds(load, options.rounds)
            print(
                f"  {load.name:34}{1e3 * mine:>9.2f}{least / mine:>9.0%}{1e3 * other:>10.2f}{other / mine:>7.2f}"
                f"{error:>12.0e}  {load.arrangement}"
            )
            if error > LIMIT:
                raise SystemExit(f"error: {load.name}: differs by {error:.0e}, more than {LIMIT:.0e}")
            if load is cases[0]:
                ratio = other / mine
    print(f"  {ratio:.1f} times as fast as SequentialMLP, rows spread evenly (at least {LINE:.0f} asked for)")


if __name__ == "__main__":
    main()
