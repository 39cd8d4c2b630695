"""What curation kept and dropped, and why: counts and examples, as a table for a console, as JSON and as markdown."""

from collections import Counter
from dataclasses import dataclass, field

from rich.table import Table
from rich.text import Text

from tandem.data.shards.tars import printable

EXAMPLES = 3  # keys shown for a reason


@dataclass
class Report:
    """Filled in shard order, so equal inputs give equal reports. Reasons stand in the order of their counts."""

    shards: list[dict] = field(default_factory=list)  # shard, bytes, samples, kept, broken
    dropped: Counter = field(default_factory=Counter)
    examples: dict[str, list[dict]] = field(default_factory=dict)  # reason -> first samples, with sentences
    bytes_out: int = 0

    def open_shard(self, shard: str, size: int, broken: str | None) -> None:
        self.shards.append({"shard": shard, "bytes": size, "samples": 0, "kept": 0, "broken": broken})

    def count(self, key: str, reason: str | None, why: str) -> None:
        """One sample of the shard opened last; reason None is kept."""
        shard = self.shards[-1]
        shard["samples"] += 1
        if reason is None:
            shard["kept"] += 1
            return
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append({"shard": shard["shard"], "key": key, "why": why})

    @property
    def samples(self) -> int:
        return sum(shard["samples"] for shard in self.shards)

    @property
    def kept(self) -> int:
        return sum(shard["kept"] for shard in self.shards)

    def as_json(self) -> dict:
        """Everything, for curation.json."""
        reasons = {reason: {"samples": n, "examples": self.examples[reason]} for reason, n in self._by_count()}
        totals = {"samples": self.samples, "kept": self.kept, "bytes_out": self.bytes_out}
        return totals | {"dropped": reasons, "shards": self.shards}

    def rows(self) -> list[tuple[str, int, str, str]]:
        """(outcome, samples, share, examples) of the table: kept, each reason, all."""
        rows = [("kept", self.kept, "")]
        for reason, n in self._by_count():
            keys = ", ".join(printable(example["key"]) for example in self.examples[reason])
            rows.append((f"dropped: {reason}", n, keys))
        rows.append(("all", self.samples, ""))
        return [(what, n, f"{100 * n / max(self.samples, 1):.1f}%", keys) for what, n, keys in rows]

    def broken(self) -> list[str]:
        """A line for each damaged shard."""
        return [f"{printable(s['shard'])}: {printable(s['broken'])}" for s in self.shards if s["broken"]]

    def table(self) -> Table:
        """For a console."""
        table = Table(title=f"{len(self.shards)} shards")
        table.add_column("outcome", no_wrap=True)
        table.add_column("samples", justify="right")
        table.add_column("share", justify="right")
        table.add_column("for example")
        for what, n, share, keys in self.rows():
            table.add_row(what, f"{n:,}", share, Text(keys))
        return table

    def markdown(self) -> str:
        """For curation.md."""
        lines = ["| outcome | samples | share | for example |", "|---|---:|---:|---|"]
        for what, n, share, keys in self.rows():
            lines.append(f"| {what} | {n:,} | {share} | {keys.replace('|', '&#124;')} |")
        lines += [f"\nDamaged: {line}" for line in self.broken()]
        names = sum(shard["kept"] > 0 for shard in self.shards)
        volume = f"{sum(shard['bytes'] for shard in self.shards):,} bytes read, {self.bytes_out:,} written"
        return "\n".join([*lines, "", f"{len(self.shards)} shards in, {names} out; {volume}."]) + "\n"

    def _by_count(self) -> list[tuple[str, int]]:
        return sorted(self.dropped.items(), key=lambda item: (-item[1], item[0]))
