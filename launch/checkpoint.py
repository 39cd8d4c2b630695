"""Looks after checkpoints, on one machine and without a GPU:

    python launch/checkpoint.py list RUN
    python launch/checkpoint.py verify RUN                       every byte of every checkpoint against its checksums
    python launch/checkpoint.py diff RUN/checkpoints/step-00000010 OTHER     tensor by tensor, to the bit
    python launch/checkpoint.py export RUN FOLDER --dtype bf16   the weights alone, whole tensors in safetensors files
    python launch/checkpoint.py export RUN FOLDER --format hf    a folder that transformers opens
    python launch/checkpoint.py prune RUN --keep 2 --keep-every 1000
    python launch/checkpoint.py history RUN                      effective training time, restarts and their causes

RUN is a run directory, its folder of checkpoints, or one checkpoint; where one is needed, the newest is meant.
verify and diff end with status 1 where something is damaged or different.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.train.checkpoints import checkpoint
from tandem.train.checkpoints.checkpoint import Reader, resolve, step_of
from tandem.train.checkpoints.retention import prune, superfluous
from tandem.train.config.saved import saved_settings
from tandem.train.config.settings import read_config
from tandem.train.export.hugging_face import Content, content
from tandem.train.export.weights import new_folder, of_modules, write_weights
from tandem.train.reliability import history

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=(what.__doc__ or "").splitlines()[0])
        command.set_defaults(run_command=what)
        command.add_argument("run", help="run directory, folder of checkpoints, or checkpoint")
        if name == "diff":
            command.add_argument("other", help="what to compare with")
            command.add_argument("--tensors", type=int, default=10, help="different tensors to name (default 10)")
        if name == "export":
            command.add_argument("folder", help="new folder to write into")
            command.add_argument("--format", choices=("tandem", "hf"), default="tandem", help="of names and settings")
            command.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default fp32)")
            command.add_argument("--part", choices=("all", "llm", "encoder"), default="all", help="of the model")
            command.add_argument("--modules", nargs="+", help="of --format tandem, such as encoder adapter llm")
            command.add_argument("--tokenizer", help="of the run, where it is no longer in its place")
            command.add_argument("--file-gb", type=float, default=5.0, help="largest file (default 5)")
        if name == "prune":
            command.add_argument("--keep", type=int, required=True, help="newest undamaged ones to keep, at least 1")
            command.add_argument("--keep-every", type=int, default=0, help="keep multiples of this step too")
            command.add_argument("--dry-run", action="store_true", help="say what would be deleted")
    arguments = parser.parse_args(argv)
    try:
        sys.exit(arguments.run_command(arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def list_them(arguments) -> int:
    """What checkpoints there are."""
    rows = Table("checkpoint", "task", "layout", "files", "tensors", "size", "written")
    for path in _all(arguments.run):
        try:
            said = checkpoint.read_manifest(path)
        except ValueError as error:
            rows.add_row(path.name, f"[red]{error}", "", "", "", "", "")
            continue
        sizes = [facts["bytes"] for facts in said["files"].values()]
        state = said["state"]
        layout = " ".join(f"{key}={size}" for key, size in state.layout.items() if size > 1) or "one rank"
        numbers = f"{len(sizes)}", f"{len(said['tensors'])}", f"{sum(sizes) / 1e6:,.1f} MB"
        rows.add_row(path.name, state.task, layout, *numbers, said["written"])
    _console().print(rows)
    return 0


def verify(arguments) -> int:
    """Reads every byte and compares sizes and checksums."""
    begin, size, wrong = time.perf_counter(), 0, 0
    for path in _all(arguments.run):
        found = damage(path)
        size += sum(file.stat().st_size for file in path.iterdir())
        wrong += bool(found)
        print(f"{path}: {'DAMAGED' if found else 'whole'}")
        for sentence in found:
            print(f"  {sentence}")
    rate = size / 1e9 / (time.perf_counter() - begin)
    print(f"{size / 1e6:,.1f} MB read at {rate:.2f} GB/s, {wrong} damaged" if size else "nothing to read")
    return 1 if wrong else 0


def damage(path: Path) -> list[str]:
    """What is wrong with a checkpoint; a thread a core reads (checksums run outside the interpreter's lock)."""
    threads = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads) as pool:
        shares = pool.map(lambda share: checkpoint.damage(path, share, threads), range(threads))
    return list(dict.fromkeys(sentence for part in shares for sentence in part))


def diff(arguments) -> int:
    """What differs between two checkpoints, to the bit."""
    one, other = Reader(resolve(arguments.run)), Reader(resolve(arguments.other))
    state = [
        f"  {key}: {mine} / {theirs}"
        for (key, mine), theirs in zip(vars(one.state).items(), vars(other.state).values(), strict=True)
        if mine != theirs
    ]
    kept = [reader.task_tensors() for reader in (one, other)]
    for name in sorted(kept[0].keys() | kept[1].keys()):
        if not (name in kept[0] and name in kept[1] and torch.equal(kept[0][name], kept[1][name])):
            state.append(f"  {name}: other values")
    print("\n".join(["state:", *state]) if state else "state: equal")
    rows, named = Table("module", "kind", "tensors", "equal", "largest difference", "only in one"), []
    totals: dict[tuple[str, str], list] = {}
    kinds_of = [{(n, kind) for n, t in reader.tensors.items() for kind in t["kinds"]} for reader in (one, other)]
    for name, kind in sorted(kinds_of[0] | kinds_of[1]):
        total = totals.setdefault((name.partition(".")[0], kind), [0, 0, 0.0, 0])
        total[0] += 1
        if (name, kind) not in kinds_of[0] & kinds_of[1] or one.tensors[name]["shape"] != other.tensors[name]["shape"]:
            total[3] += 1
            named.append(f"  {kind} of {name}: only in one, or of another shape")
            continue
        mine, theirs = one.whole(name, kind), other.whole(name, kind)
        if torch.equal(mine.view(torch.int32), theirs.view(torch.int32)):
            total[1] += 1
            continue
        largest = float((mine - theirs).abs().max())
        total[2] = max(total[2], largest)
        named.append(f"  {kind} of {name}: {largest:.3e}")
    for key, (count, equal, largest, alone) in totals.items():
        rows.add_row(*key, f"{count}", f"{equal}", f"{largest:.3e}", f"{alone}")
    _console().print(rows)
    print("\n".join(named[: arguments.tensors]))
    return 1 if named or state else 0


def export(arguments) -> int:
    """Writes the weights alone: as whole tensors under our names, or a model in Hugging Face's format."""
    reader, folder = Reader(_finished(arguments.run)), Path(arguments.folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name a new folder")
    out = _content(reader, arguments)
    with new_folder(folder) as staging, ThreadPoolExecutor(1) as checking:
        found = checking.submit(damage, reader.path)
        for name, text in out.texts.items():
            (staging / name).write_text(text)
        metadata = {"task": reader.state.task, "step": f"{reader.state.step}"}
        dtype, file_bytes = DTYPES[arguments.dtype], arguments.file_gb * 1e9
        files, total = write_weights(staging, out.weights, dtype, file_bytes, metadata)
        if wrong := found.result():
            raise ValueError("; ".join(wrong))
    count = len(out.weights.shapes)
    print(f"{count} tensors of {reader.path}, {total / 1e6:,.1f} MB in {files} file(s) under {folder}, {out.what}")
    return 0


def _finished(run: str) -> Path:
    """The checkpoint to export.  Raises ValueError where a newer one is being written."""
    path = Path(run)
    for folder in (path, path / "checkpoints"):
        if saving := sorted(folder.glob(".step-*.partial")):
            step, done = saving[-1].name.removeprefix(".").removesuffix(".partial"), checkpoint.checkpoints(folder)
            if not done or step > done[-1].name:
                hint = f", or name {done[-1]}" if done else ""
                raise ValueError(f"{folder}: {step} is being saved, or was when its run ended: wait for it{hint}")
    return resolve(path)


def _content(reader: Reader, arguments) -> Content:
    if arguments.format == "hf":
        if arguments.modules:
            raise ValueError(
                f"--modules {' '.join(arguments.modules)}: with --format hf name all, llm or encoder as --part"
            )
        settings = saved_settings(reader.path)
        if arguments.tokenizer:
            settings.data.tokenizer = arguments.tokenizer
        return content(reader, read_config(settings), arguments.part, arguments.dtype)
    modules = set(arguments.modules or (reader.modules if arguments.part == "all" else {arguments.part}))
    if unknown := modules - reader.modules:
        raise ValueError(
            f"there is no {' '.join(sorted(unknown))}: the checkpoint has {' '.join(sorted(reader.modules))}"
        )
    return Content(of_modules(reader, modules), {}, "under tandem's names")


def prune_them(arguments) -> int:
    """Deletes old checkpoints; the newest undamaged ones stay."""
    paths = _all(arguments.run)
    if arguments.keep < 1:
        raise ValueError(f"--keep {arguments.keep}: must be at least 1")
    folder, good, damaged = paths[0].parent, 0, set()
    for path in reversed(paths):  # until there are enough good ones: the older need not be read
        if good < arguments.keep:
            wrong = damage(path)
            good += not wrong
            if wrong:
                damaged.add(step_of(path))
                print("\n".join(wrong))
    if arguments.dry_run:
        steps = superfluous([step_of(path) for path in paths], arguments.keep, arguments.keep_every, damaged)
        gone = [path for path in paths if step_of(path) in steps]
    else:
        gone = prune(folder, arguments.keep, arguments.keep_every, damaged)
    would = "would be deleted" if arguments.dry_run else "deleted"
    print(f"{', '.join(path.name for path in gone) or 'nothing'} {would}, {len(paths) - len(gone)} left")
    return 0


def show_history(arguments) -> int:
    """How well a run got on: effective training time, restarts and their causes, lost steps."""
    run_dir = Path(arguments.run)
    events = history.read(run_dir)
    if not events:
        raise ValueError(f"{run_dir / history.FILE} is missing or empty: give the directory of a run")
    metrics = run_dir / "metrics.jsonl"
    lines = [line for line in metrics.read_text().splitlines(keepends=True) if line.endswith("\n")]
    steps = [json.loads(line) for line in lines]
    ended = events[-1]["event"] == "end"
    totals = history.totals(events, events[-1]["time"] if ended else max(events[-1]["time"], metrics.stat().st_mtime))
    console, rows = _console(), Table("time", "event", "step", "lost steps", "what")
    for event in events:
        step = event.get("step", event.get("to_step"))
        what = event.get("cause") or event.get("why") or event.get("text") or event.get("status") or ""
        if event["event"] == "slow":
            what = f"rank {event['rank']} on {event['host']}, {event['ratio']:.2f}x in {event['phase']}"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        said = ("" if value is None else f"{value}" for value in (step, event.get("lost_steps"), what))
        rows.add_row(when, event["event"], *said)
    console.print(rows)
    useful = sum(line["step_time_s"] for line in steps if line["applied"])
    sums = Table(show_header=False)
    sums.add_row("steps kept", f"{len(steps)}")
    sums.add_row("effective training time", f"{useful / max(totals.elapsed_s, 1e-9):.1%}")
    sums.add_row("  useful / elapsed", f"{useful:,.1f} s / {totals.elapsed_s:,.1f} s")
    sums.add_row("restarts", f"{totals.restarts}")
    for cause in dict.fromkeys(totals.causes):
        sums.add_row(f"  {totals.causes.count(cause)} x", cause)
    sums.add_row("steps done again", f"{totals.lost_steps}")
    sums.add_row("rollbacks, skipped steps", f"{totals.rollbacks}, {totals.skipped_steps}")
    console.print(sums)
    return 0


def _console() -> Console:
    """A pipe or file has no width: give tables room."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _all(run: str) -> list[Path]:
    """Checkpoints that a path means, damaged ones too."""
    path = Path(run)
    if checkpoint.NAME.fullmatch(path.name) and path.is_dir():
        return [path]
    for folder in (path / "checkpoints", path):
        if found := checkpoint.named(folder):
            return found
    raise ValueError(f"there is no checkpoint at {path}: give a run directory or a step-* folder")


COMMANDS = {
    "list": list_them,
    "verify": verify,
    "diff": diff,
    "export": export,
    "prune": prune_them,
    "history": show_history,
}

if __name__ == "__main__":
    main()
