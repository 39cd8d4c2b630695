"""Applies one mutation at a time to a copy of the tree and runs the tests that are meant to catch it:

    python -m tests.mutants                          all mutations, two at a time
    python -m tests.mutants --name clip_norm_is_0    those named
    python -m tests.mutants --tenth today            the tenth that the date draws, as `make soak` does

A mutation is caught if a test fails with it and passes without it.  The exit status is 0 only if every survivor has a
stated reason, every mutation was run, and of the whole list at least 95% were caught.

mutmut and cosmic-ray were looked at first.  Both change operators blindly, by the thousand, and judge each change by
a test command for all; with tests that start worlds of ranks that takes weeks, and most survivors mean nothing.  Here
the list is written by hand, each mutation with its own tests, so all that is left to do is to copy, change and run.
"""

import argparse
import datetime
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import cache_from_source
from pathlib import Path
from queue import SimpleQueue

from tests.mutants.mutations import MUTATIONS
from tests.mutants.source import FLOORS, Mutation, NotFoundError, apply

ROOT = Path(__file__).resolve().parents[2]
AT_LEAST = 0.95  # of the whole list must be caught
TIMEOUT_S = 400.0  # for the tests of one mutation
MEMORY = 12 * 2**30  # address space of one process: a mutation may make a loop that never ends and allocates
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", re.MULTILINE)
CAUGHT, SURVIVED, TIMEOUT, NO_TEST, BROKEN, NOT_RUN = (
    "caught",
    "SURVIVED",
    "TIMEOUT",
    "NO TEST",  # pytest did not run: a name of a test is wrong, or a module cannot be imported
    "BROKEN TEST",  # the test that failed fails without the mutation too
    "not run",
)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutation; failed: node id of the test that failed, or the end of pytest's output."""

    mutation: Mutation
    verdict: str
    seconds: float = 0.0
    failed: str = ""


class Copy:
    """A copy of the tree at `root` in `folder`, in which tests run.

    The interpreter, and so its environment, is that of the caller.  PYTHONPATH puts the copy before everything else
    that is installed, an editable installation of the tree itself among it.
    """

    def __init__(self, root: Path, folder: Path):
        self.folder = folder
        listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        names = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
        for name in filter(None, names.split("\0")):
            if (root / name).is_file():  # neither deleted nor a repository of its own
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, folder / name)
        self.environment = os.environ | {"PYTHONPATH": str(folder)}
        self.environment.setdefault("OMP_NUM_THREADS", "1")
        self.check_imports()

    def check_imports(self) -> None:
        """Raises RuntimeError where a package would be imported from elsewhere."""
        prefix = "tandem." if (self.folder / "tandem.py").is_file() else ""
        floors = [prefix + floor for floor in FLOORS if (self.folder / floor).is_dir()]
        code = "import sys; from importlib.util import find_spec as f; print(*(f(n).origin for n in sys.argv[1:]))"
        command = [sys.executable, "-P", "-c", code, *floors]
        out = subprocess.run(command, cwd="/", env=self.environment, check=True, capture_output=True, text=True)
        for origin in out.stdout.split():
            if not Path(origin).resolve().is_relative_to(self.folder.resolve()):
                raise RuntimeError(f"tests would import {origin} and not the copy in {self.folder}")

    def test(self, tests: Sequence[str], select: str, timeout_s: float, *options: str) -> tuple[int | None, str]:
        """(pytest's exit status, None where it took too long; its output)."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rfE", "--tb=short", *options]
        command += ["-k", select] if select else []
        with tempfile.TemporaryFile("w+") as out:
            process = subprocess.Popen(
                [*command, *tests],
                cwd=self.folder,
                env=self.environment,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            resource.prlimit(process.pid, resource.RLIMIT_AS, (MEMORY, MEMORY))  # inherited by what it starts
            try:
                status = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)  # its own session: pytest and the ranks of its worlds
                    process.wait()
            out.seek(0)
            return status, out.read()

    def write(self, path: Path, text: str) -> None:
        """Compiled code is told apart by seconds and size, which two mutations of a file may share: it goes."""
        path.write_text(text)
        Path(cache_from_source(str(path))).unlink(missing_ok=True)

    def try_mutation(self, mutation: Mutation, timeout_s: float) -> Outcome:
        """Raises NotFoundError where the mutation does not fit the tree."""
        path, changed = apply(mutation, self.folder)
        original, begin = path.read_text(), time.monotonic()
        self.write(path, changed)
        try:
            status, output = self.test(mutation.tests, mutation.select, timeout_s, "-x")
        finally:
            self.write(path, original)
        seconds = time.monotonic() - begin
        failed = FAILED.findall(output)
        if status is None:
            return Outcome(mutation, TIMEOUT, seconds)
        if status == 0:
            return Outcome(mutation, SURVIVED, seconds)
        if status != 1 or not failed:
            return Outcome(mutation, NO_TEST, seconds, " ".join(output.split())[-200:])
        return Outcome(mutation, CAUGHT, seconds, failed[0])


def tenth(mutations: Sequence[Mutation], day: datetime.date) -> list[Mutation]:
    """Those that this day draws; any ten consecutive days draw each mutation once."""
    return [mutation for place, mutation in enumerate(mutations) if place % 10 == day.toordinal() % 10]


def run(
    root: Path, mutations: Sequence[Mutation], jobs: int, minutes: float, timeout_s: float = TIMEOUT_S
) -> list[Outcome]:
    """What became of each, in their order; mutations that `minutes` leave no time for are not run."""
    for mutation in mutations:
        apply(mutation, root)  # before anything takes time
    deadline = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: SimpleQueue[Copy] = SimpleQueue()
        for job in range(jobs):
            copies.put(Copy(root, Path(folder) / f"tree-{job}"))

        def one(mutation: Mutation) -> Outcome:
            if time.monotonic() > deadline:
                return Outcome(mutation, NOT_RUN)
            copy = copies.get()
            try:
                outcome = copy.try_mutation(mutation, timeout_s)
            finally:
                copies.put(copy)
            print(_line(outcome), flush=True)
            return outcome

        def fails(tests: list[str]) -> list[str]:
            copy = copies.get()
            try:
                status, output = copy.test(tests, "", 3 * timeout_s) if tests else (0, "")
            finally:
                copies.put(copy)
            return tests if status not in (0, 1) else FAILED.findall(output)

        with ThreadPoolExecutor(jobs) as pool:
            outcomes = list(pool.map(one, mutations))
            print("the tests that failed, without a mutation:", flush=True)
            parts = _shared({outcome.failed for outcome in outcomes if outcome.verdict == CAUGHT}, jobs)
            broken = {test for part in pool.map(fails, parts) for test in part}
    return [
        replace(outcome, verdict=BROKEN) if outcome.verdict == CAUGHT and outcome.failed in broken else outcome
        for outcome in outcomes
    ]


def _shared(tests: set[str], jobs: int) -> list[list[str]]:
    """Tests over jobs, those of a file together: they share what is slow to make."""
    files = sorted({test.partition("::")[0] for test in tests})
    return [sorted(test for test in tests if files.index(test.partition("::")[0]) % jobs == job) for job in range(jobs)]


def good_enough(outcomes: Sequence[Outcome], whole: bool) -> bool:
    """whole: whether these are all mutations of the list, of which a share must be caught."""
    excused = all(o.verdict == CAUGHT or (o.verdict == SURVIVED and o.mutation.survives) for o in outcomes)
    caught = sum(outcome.verdict == CAUGHT for outcome in outcomes)
    return excused and (not whole or caught >= AT_LEAST * len(outcomes))


def _line(outcome: Outcome) -> str:
    reason = f"reason: {outcome.mutation.survives}" if outcome.verdict == SURVIVED else outcome.failed
    return f"{outcome.mutation.name:44} {outcome.verdict:12} {outcome.seconds:6.1f} s  {reason}"


def _table(outcomes: Sequence[Outcome], minutes: float) -> str:
    caught = sum(outcome.verdict == CAUGHT for outcome in outcomes)
    rest = [_line(outcome) for outcome in outcomes if outcome.verdict != CAUGHT]
    share = f"{caught} of {len(outcomes)} caught ({caught / max(len(outcomes), 1):.1%}) in {minutes:.1f} minutes"
    return "\n".join([share, *(["not caught:", *rest] if rest else [])])


def _date(text: str) -> datetime.date:
    return datetime.date.today() if text == "today" else datetime.date.fromisoformat(text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", action="append", default=[], help="of a mutation; may be given again")
    parser.add_argument("--tenth", type=_date, metavar="DATE", help="only those drawn by a date, or by today")
    parser.add_argument("--jobs", type=int, default=2, help="mutations that are tried at once")
    parser.add_argument("--minutes", type=float, default=40.0, help="after which no further mutation is begun")
    options = parser.parse_args(argv)
    chosen = [m for m in MUTATIONS if m.name in options.name] if options.name else list(MUTATIONS)
    if unknown := set(options.name) - {mutation.name for mutation in chosen}:
        parser.error(f"no mutation is named {', '.join(sorted(unknown))}")
    if options.tenth:
        chosen = tenth(chosen, options.tenth)
    begin = time.monotonic()
    try:
        outcomes = run(ROOT, chosen, options.jobs, options.minutes)
    except NotFoundError as error:
        print(error)
        return 1
    print(_table(outcomes, (time.monotonic() - begin) / 60))
    return 0 if good_enough(outcomes, len(chosen) == len(MUTATIONS)) else 1
