"""The end of benchmarks/gpu.py: the table, the targets that it is held to, and a picture."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_measure import Result


@dataclass(frozen=True)
class Line:
    """A figure that is wanted of a case: `of` takes its results and gives the value, None where it was not measured."""

    case: str
    text: str
    of: Callable[[list[Result]], float | None]
    least: float | None = None
    most: float | None = None

    def judge(self, value: float) -> str:
        held = value >= self.least if self.least is not None else value <= self.most
        wanted = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        return f"{'held' if held else 'MISSED'}: {value:.4g}, {wanted}"


def measured(results: list[Result], ours: bool, word: str = "") -> list[Result]:
    return [r for r in results if r.status == "ok" and r.ours is ours and word in r.name]


def best(word: str = "", recompute: str = "none") -> Callable[[list[Result]], float | None]:
    """TFLOP/s of our fastest row with these words in its name."""

    def of(results):
        rows = [r for r in measured(results, True, word) if f"recompute {recompute}" in r.name]
        return max((r.tflops for r in rows), default=None)

    return of


def memory(recompute: str = "none") -> Callable[[list[Result]], float | None]:
    """GiB at the peak of our fastest row with this recomputation."""

    def of(results):
        rows = [r for r in measured(results, True) if f"recompute {recompute}" in r.name]
        return max(rows, key=lambda r: r.tflops).peak_gib if rows else None

    return of


def against(peer: str) -> Callable[[list[Result]], float | None]:
    """Our best TFLOP/s over those of the best peer with this word in its name."""

    def of(results):
        ours, theirs = measured(results, True), measured(results, False, peer)
        if not ours or not theirs:
            return None
        return max(r.tflops for r in ours) / max(r.tflops for r in theirs)

    return of


def extra(results: list[Result]) -> float | None:
    """GiB that our row needs beyond its input and their gradients."""
    return min((r.extra_gib for r in measured(results, True) if r.extra_gib is not None), default=None)


def over_proportional(results: list[Result]) -> float | None:
    """Time a FLOP of the long row over that of the short ones."""
    rates = {r.name: r.tflops for r in measured(results, True)}
    long = [rate for name, rate in rates.items() if name.startswith("131,072")]
    short = [rate for name, rate in rates.items() if name.startswith("32,768")]
    return max(short) / max(long) if long and short else None


LINES = (
    Line("tower 32k", "TFLOP/s", best(), least=500),
    Line("tower 32k", "GiB at the peak", memory(), most=40),
    Line("tower 32k", "times the Hugging Face tower", against("Hugging Face"), least=1.9),
    Line("tower 32k", "TFLOP/s, recompute selective", best(recompute="selective"), least=440),
    Line("tower 32k", "GiB at the peak, recompute selective", memory("selective"), most=16),
    Line("moe 32k", "TFLOP/s", best(), least=510),
    Line("moe 32k", "times Megatron-core + Transformer Engine", against("Transformer Engine"), least=1.5),
    Line("moe 8k", "TFLOP/s", best(), least=440),
    Line("moe 8k", "times Megatron-core + Transformer Engine", against("Transformer Engine"), least=2.5),
    Line("cross-entropy", "GiB beyond input and gradients", extra, most=1.5),
    Line("long row", "time a FLOP, times that of 32,768 tokens", over_proportional, most=1.1),
)


def by_case(results: list[Result]) -> dict[str, list[Result]]:
    cases: dict[str, list[Result]] = {}
    for result in results:
        cases.setdefault(result.case, []).append(result)
    return cases


WIDTH = 62  # of a row's name
COLUMNS = (  # heading, field, how it is written
    ("ms", "ms", ".2f"),
    ("spread", "spread", ".0%"),
    ("first s", "first_s", ".1f"),
    ("TFLOP/s", "tflops", ".1f"),
    ("MFU", "mfu", ".1%"),
    ("/floor", "over_floor", ".2f"),
    ("us/token", "us_per_token", ".2f"),
    ("GiB", "peak_gib", ".1f"),
    ("extra", "extra_gib", ".2f"),
    ("formula", "formula_gib", ".1f"),
    ("error", "error", ".0e"),
)


def rows_table(results: list[Result]) -> str:
    """Every case, with each row's time a FLOP over that of our fastest row."""
    lines = []
    for case, rows in by_case(results).items():
        lines.append(f"{case:{WIDTH + 2}}" + "".join(f"{heading:>9}" for heading, _, _ in COLUMNS) + f"{'x time':>9}")
        fastest = min((r.ms / (r.tflop or 1) for r in measured(rows, True)), default=None)
        for r in rows:
            if r.status != "ok":
                lines.append(f"  {r.name:{WIDTH}}  {r.status}")
                continue
            cells = [_cell(getattr(r, field), form) for _, field, form in COLUMNS]
            cells.append(_cell(r.ms / (r.tflop or 1) / fastest if fastest else None, ".2f"))
            lines.append(f"  {r.name:{WIDTH}}" + "".join(cells))
        lines.append("")
    return "\n".join(lines[:-1])


def _cell(value: float | None, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>9}"


def targets_table(results: list[Result]) -> str:
    """Which of the targets are held, "not run" where their rows are missing."""
    cases = by_case(results)
    judged = [(line, line.of(cases.get(line.case, []))) for line in LINES]
    lines = [
        f"  {line.case}, {line.text}: {'not run' if value is None else line.judge(value)}" for line, value in judged
    ]
    return "\n".join(["held to:", *lines])


def shown(case: str) -> list[tuple[str, str]]:
    """Fields and units of a case's bars, the first that all its rows have."""
    speed = [("tflops", "TFLOP/s"), ("ms", "ms")]
    return [("peak_gib", "GiB at the peak"), *speed] if case.startswith("memory") else speed


def draw(results: list[Result], out: Path) -> None:
    """Bars of TFLOP/s, or of milliseconds where a case counts no FLOPs; of memory, GiB; ours dark, peers light."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed: pip install matplotlib")
        return
    cases = {case: [r for r in rows if r.status == "ok"] for case, rows in by_case(results).items()}
    cases = {case: rows for case, rows in cases.items() if rows}
    if not cases:
        return
    heights = [len(rows) + 1 for rows in cases.values()]
    figure = Figure(figsize=(9, 0.6 + 0.3 * sum(heights)))
    axes = figure.subplots(len(cases), 1, squeeze=False, height_ratios=heights)
    for axis, (case, rows) in zip(axes[:, 0], cases.items(), strict=True):
        field, unit = next((f, u) for f, u in shown(case) if all(getattr(r, f) for r in rows))
        values = [getattr(r, field) for r in rows]
        bars = axis.barh([r.name for r in rows], values, color=["#2a6f97" if r.ours else "#bbbbbb" for r in rows])
        axis.bar_label(bars, fmt="%.3g", fontsize=7, padding=2)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.tick_params(labelsize=7)
        axis.set_title(f"{case}, {unit}", fontsize=8, loc="left")
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    print(f"picture written to {out}")
