"""What an import has done so far, in files that appear whole or not at all, and what it left out.

OUT/.import/settings.json      what decides the result; another import may not go on here
OUT/.import/00012-000.json     one part: the shard, how many samples, what was left out, where the next part begins
OUT/.import/00012.progress     how much of its unit a worker has read
OUT/import.json                the sum of all parts, once there is nothing left to do; .import is gone then
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

EXAMPLES = 3  # kept for a reason
FOLDER = ".import"


@dataclass
class Tally:
    """Samples and media that were written, and records left out by reason, with examples."""

    samples: int = 0
    images: int = 0
    videos: int = 0
    bytes: int = 0
    left_out: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def leave_out(self, reason: str, sentence: str) -> None:
        self.left_out[reason] += 1
        if len(kept := self.examples.setdefault(reason, [])) < EXAMPLES:
            kept.append(sentence)

    def add(self, other: "Tally") -> None:
        for name in ("samples", "images", "videos", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.left_out.update(other.left_out)
        for reason, sentences in other.examples.items():
            kept = self.examples.setdefault(reason, [])
            kept += sentences[: EXAMPLES - len(kept)]

    def as_json(self) -> dict:
        reasons = sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))
        counts = {name: getattr(self, name) for name in ("samples", "images", "videos", "bytes")}
        left_out = {reason: {"records": n, "examples": self.examples[reason]} for reason, n in reasons}
        return counts | {"left_out": left_out}

    @classmethod
    def of(cls, held: dict) -> "Tally":
        left_out = Counter({reason: each["records"] for reason, each in held["left_out"].items()})
        examples = {reason: list(each["examples"]) for reason, each in held["left_out"].items()}
        return cls(held["samples"], held["images"], held["videos"], held["bytes"], left_out, examples)


@dataclass(frozen=True)
class Part:
    """A journal entry. shard: the tar's name, None where no sample was left.  next: ordinal of the first record that
    is not in this part or an earlier one.  last: whether the unit is done.
    """

    shard: str | None
    next: int
    last: bool
    tally: Tally


class Journal:
    """The files of one output folder; several processes write entries of different units."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.folder = self.out / FOLDER

    def begin(self, settings: dict) -> dict | None:
        """Start, or go on with what these settings began; the summary where that is complete. Raises ValueError."""
        found = self._read("settings.json")
        done = self._load(self.out / "import.json")
        if done is not None and done.get("settings") == settings:
            shutil.rmtree(self.folder, ignore_errors=True)
            return done
        if found is None and self.out.exists() and not self._may_begin():
            raise ValueError(f"--out {self.out} is not empty; choose another folder")
        if found not in (None, settings) and any(self.folder.glob("*-*.json")):
            raise ValueError(
                f"--out {self.out} holds an unfinished import with other {_changed(found, settings)}; "
                f"give them again, or choose another folder"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        if found != settings:
            self._write(self.folder / "settings.json", settings)
        return None

    def _may_begin(self) -> bool:
        """Whether the output folder holds nothing, or no more than an import that was killed at once."""
        return self.out.is_dir() and {path.name for path in self.out.iterdir()} <= {FOLDER}

    def parts(self, unit: int) -> list[Part]:
        """The entries of a unit, in order."""
        found: list[Part] = []
        while (held := self._read(f"{unit:05}-{len(found):03}.json")) is not None:
            found.append(Part(held["shard"], held["next"], held["last"], Tally.of(held["tally"])))
        return found

    def record(self, unit: int, number: int, part: Part) -> None:
        held = {"shard": part.shard, "next": part.next, "last": part.last, "tally": part.tally.as_json()}
        self._write(self.folder / f"{unit:05}-{number:03}.json", held)

    def progress(self, unit: int, share: float) -> None:
        """Note how much of a unit was read, 0 to 1; for whoever watches."""
        (self.folder / f"{unit:05}.progress").write_text(f"{share:.4f}")

    def seen_progress(self, unit: int) -> float:
        try:
            return float((self.folder / f"{unit:05}.progress").read_text())
        except (OSError, ValueError):
            return 0.0

    def finish(self, settings: dict, units: int) -> dict:
        """Write the summary of all units and remove the entries."""
        tally, shards = Tally(), []
        for unit in range(units):
            for part in self.parts(unit):
                tally.add(part.tally)
                shards += [part.shard] if part.shard else []
        summary = {"settings": settings, **tally.as_json(), "shards": shards}
        self._write(self.out / "import.json", summary)
        for stray in self.out.glob("*.tmp"):  # of processes that were killed
            stray.unlink()
        shutil.rmtree(self.folder)
        return summary

    def _read(self, name: str) -> dict | None:
        return self._load(self.folder / name)

    @staticmethod
    def _load(path: Path) -> dict | None:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}; choose another folder for --out") from error

    @staticmethod
    def _write(path: Path, held: dict) -> None:
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(held, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(temporary, path)


def _changed(before: dict, now: dict) -> str:
    return ", ".join(sorted(key for key in before | now if before.get(key) != now.get(key)))
