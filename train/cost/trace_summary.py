"""Where the time of a step goes, from a torch profiler's trace: time by kind of work, beside the least it could take.

A kernel's kind follows from its name alone (`kind_of`): a trace from another machine is as good as one made here.
With kernels in the trace their times count, and what lies between the first and the last of them without any kernel is
idle; without, those of the CPU's operations, each without the operations that it calls.
"""

import gzip
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

GZIP = b"\x1f\x8b"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")

# In this order; the first that is found anywhere in the name.
KINDS = {
    "communication": r"nccl|gloo:|c10d::|deep_ep|all_?reduce|cross_device_reduce",
    "copy": r"^Mem(cpy|set)|direct_copy_kernel|CatArrayBatchedCopy|aten::(copy_|_to_copy|clone|cat)$",
    "optimizer": r"multi_tensor_apply|multi_tensor_(adam|l2norm|scale)|Fused(Adam|Optimizer)|adamw?_|[Ll]amb(_|Stage)",
    "attention backward": (
        r"flash_?bwd|Flash\w*(Backward|Bwd)|flash_bprop|fmha_cutlassB|compute_dot_do_o|dot_do_o|convert_dq"
        r"|attention\w*_backward|packed_attention_backward|attn\w*_backward"
    ),
    "attention forward": (
        r"flash_?fwd|Flash\w*(Forward|Fwd)|flash_fprop|fmha|packed_attention|varlen_attn"
        r"|_(scaled_dot_product|flash|efficient|cudnn)\w*_attention"
    ),
    "grouped GEMM": r"GroupProblemShape|[Gg]rouped_?[Gg]emm|grouped_mm|moe_gemm",
    "GEMM": (
        r"gemm|nvjet|cublas|cutlass::Kernel2|xmma|splitKreduce|aten::(add|b|baddb)?mm$|aten::(linear|matmul|einsum)$"
    ),
    "permutation": (
        r"permute_kernel|permute_bwd|row_id_map|sort_chunks|chunk_sort|[Rr]adix|DeviceScan|scatter|gather"
        r"|index_?[Ss]elect|index_\w*kernel|indexFunc|[Ss]earchsorted|top_?k|TopK|bitonic|cumsum|kernel_scan|::(sort|argsort|index\w*)$"
    ),
    "elementwise": (
        r"elementwise|triton_(poi|red|per)_|[Nn]orm|GammaBeta|reduce_kernel|softmax|gelu|silu|swiglu|[Rr]o(pe|tary)"
        r"|FillFunctor|aten::"
    ),
}
PATTERNS = {kind: re.compile(pattern) for kind, pattern in KINDS.items()}
ORDER = (
    "GEMM", "grouped GEMM", "attention forward", "attention backward", "elementwise", "permutation", "optimizer",
    "communication", "copy", "other",
)  # fmt: skip


def kind_of(name: str) -> str:
    """Kind of work of a CUDA kernel, a copy or an operation of torch, "other" if the name says nothing."""
    return next((kind for kind, pattern in PATTERNS.items() if pattern.search(name)), "other")


@dataclass(frozen=True)
class Summary:
    """Seconds and launches by kind, of all steps in the trace together; idle and span in seconds.  names: seconds of
    every kernel."""

    seconds: dict[str, float]
    launches: dict[str, int]
    names: dict[str, float]
    idle: float
    span: float


def summarise(events: Iterable[Mapping]) -> Summary:
    """Of a trace's events.  Raises ValueError for a trace without kernels and without operations."""
    timed = [event for event in events if event.get("ph") == "X" and event.get("dur") is not None]
    kernels = [event for event in timed if event.get("cat") in KERNELS]
    calls = [event for event in timed if event.get("cat") == "cpu_op"]
    if not kernels and not calls:
        raise ValueError("the trace has neither kernels nor operations; was it written by torch.profiler?")
    own = [(event["name"], event["dur"]) for event in kernels] if kernels else _own_times(calls)
    seconds: dict[str, float] = defaultdict(float)
    launches: dict[str, int] = defaultdict(int)
    names: dict[str, float] = defaultdict(float)
    for name, microseconds in own:
        kind = kind_of(name)
        seconds[kind] += microseconds / 1e6
        launches[kind] += 1
        names[name] += microseconds / 1e6
    span, busy = _span_and_busy(kernels or calls)
    return Summary(dict(seconds), dict(launches), dict(names), idle=(span - busy) / 1e6, span=span / 1e6)


def _own_times(calls: list[Mapping]) -> list[tuple[str, float]]:
    """Name and microseconds of every call, without those of the calls inside it."""
    own = [call["dur"] for call in calls]
    by_thread: dict = {}
    for place in sorted(range(len(calls)), key=lambda i: (calls[i]["ts"], -calls[i]["dur"])):
        call = calls[place]
        open_calls = by_thread.setdefault((call["pid"], call["tid"]), [])
        while open_calls and calls[open_calls[-1]]["ts"] + calls[open_calls[-1]]["dur"] <= call["ts"]:
            open_calls.pop()
        if open_calls:
            own[open_calls[-1]] -= call["dur"]
        open_calls.append(place)
    return [(call["name"], max(microseconds, 0.0)) for call, microseconds in zip(calls, own, strict=True)]


def _span_and_busy(events: list[Mapping]) -> tuple[float, float]:
    """Microseconds from the first begin to the last end, and those of them in which anything ran, on any stream."""
    intervals = sorted((event["ts"], event["ts"] + event["dur"]) for event in events)
    busy, reached = 0.0, intervals[0][0]
    for begin, end in intervals:
        busy += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return reached - intervals[0][0], busy


def table(summary: Summary, floors: Mapping[str, float], steps: int) -> str:
    """Markdown: milliseconds of one step by kind, their share, and the floor (seconds by kind) where one is given."""
    lines = ["| kind | ms a step | share | launches | floor, ms | over floor |", "|---|---|---|---|---|---|"]
    for kind in ORDER:
        if kind not in summary.seconds and kind not in floors:
            continue
        spent, floor = summary.seconds.get(kind, 0.0) / steps, floors.get(kind)
        launches = summary.launches.get(kind, 0) / steps
        lines.append(_row(kind, spent, spent * steps / summary.span, f"{launches:.0f}", floor))
    lines.append(_row("idle", summary.idle / steps, summary.idle / summary.span, "", None))
    whole = sum(summary.seconds.values()) / steps
    lines.append(_row("sum of all but idle", whole, whole * steps / summary.span, "", sum(floors.values()) or None))
    lines.append(_row("first to last", summary.span / steps, 1.0, "", None))
    return "\n".join(lines)


def _row(kind: str, spent: float, share: float, launches: str, floor: float | None) -> str:
    over = f"{spent / floor:.2f}" if floor and spent else ""
    beside = "| | |" if floor is None else f"| {1e3 * floor:.2f} | {over} |"
    return f"| {kind} | {1e3 * spent:.2f} | {share:.1%} | {launches} {beside}"


def longest(summary: Summary, steps: int, count: int = 15) -> str:
    """Markdown: the kernels that take most, with their kinds."""
    lines = ["| kernel | kind | ms a step |", "|---|---|---|"]
    for name, seconds in sorted(summary.names.items(), key=lambda item: -item[1])[:count]:
        short = name if len(name) <= 80 else f"{name[:77]}..."
        lines.append(f"| `{short.replace('|', '/')}` | {kind_of(name)} | {1e3 * seconds / steps:.2f} |")
    return "\n".join(lines)


def read_trace(path: Path) -> list[dict]:
    """Events of a Chrome trace, packed by gzip or not.  Raises ValueError for a file that is none."""
    content = path.read_bytes()
    try:
        found = json.loads(gzip.decompress(content) if content.startswith(GZIP) else content)
        return found["traceEvents"] if isinstance(found, dict) else found
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is no Chrome trace: {error}") from error
