"""Kills ranks at random moments, again and again, and proves that nothing was lost:

    python -m tests.faults.soak                  200 kills of forked ranks, 10 under torchrun, 12 minutes of endurance
    python -m tests.faults.soak --kills 20 --torchrun-kills 0 --endurance-minutes 0

Each round trains the same few steps on four ranks.  SIGKILL hits one random rank, or all, at a random moment: while the
ranks start, while they train, or while a checkpoint is being written.  The ranks start again and go on, until the round
is through.  Then its samples, step by step, its losses and its final state must be those of a run without faults, to
the bit.  The endurance part is one long job under torchrun with a kill every few minutes; it measures the effective
training time.  The exit status is 0 only if every count of harm is 0.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tandem.train.checkpoints import checkpoint
from tandem.train.input.dataset import open_data
from tandem.train.reliability import history
from tests.faults import harm
from tests.faults.ranks import WORLD, Ranks, Torchrun, steps_done, tiny, until
from tests.support import ROOT, make_corpus, read_metrics, settings

STEPS = 24  # of a round
EVERY = 2
NEVER_HARMS = ("unloadable", "hung", "samples", "weights")
START_S = 120.0


@dataclass
class Result:
    """kills: by moment.  recovery_s: from SIGKILL to the next step.  The rest counts harm, and must be 0."""

    kills: Counter = field(default_factory=Counter)
    starts: int = 0
    rounds: int = 0
    recovery_s: list[float] = field(default_factory=list)
    unloadable: int = 0
    hung: int = 0
    samples: int = 0
    weights: int = 0
    effective_time: float | None = None
    endurance: dict = field(default_factory=dict)

    @property
    def harmless(self) -> bool:
        return not any(getattr(self, name) for name in NEVER_HARMS)


@dataclass(frozen=True)
class Round:
    """One run directory and what its ranks wrote down."""

    folder: Path
    steps: int = STEPS

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def notes(self) -> Path:
        return self.folder / "samples.jsonl"

    def ranks(self, corpus: Path) -> Ranks:
        overrides = [f"train.steps={self.steps}", f"checkpoint.every={EVERY}", "logger.every=1000"]
        noting = (harm.note_samples, str(self.notes))
        return Ranks(tiny(corpus, self.run_dir, *overrides), noting, self.folder / "output.txt")

    def writing(self) -> bool:
        return any((self.run_dir / "checkpoints").glob(".step-*.partial"))

    def notes_of_steps(self) -> dict[int, set[str]]:
        """All that was noted of each step: samples and loss."""
        found: dict[int, set[str]] = {}
        for line in self.notes.read_text().splitlines():
            said = json.loads(line)
            found.setdefault(said.pop("step"), set()).add(json.dumps(said, sort_keys=True))
        return found

    def final_state(self) -> dict[str, torch.Tensor]:
        reader = checkpoint.Reader(self.run_dir / f"checkpoints/step-{self.steps:08d}")
        return {
            f"{name} {kind}": reader.whole(name, kind)
            for name, tensor in reader.tensors.items()
            for kind in tensor["kinds"]
        }


def forked(corpus: Path, folder: Path, kills: int, seed: int, result: Result, steps: int = STEPS) -> None:
    """Rounds of forked ranks until `kills` have happened and the last round is through."""
    dice = random.Random(seed)
    whole = Round(folder / "whole", steps)
    whole.folder.mkdir(parents=True)
    begin = time.monotonic()
    codes = whole.ranks(corpus).wait(10 * START_S)
    assert codes == [0] * WORLD, (codes, (whole.folder / "output.txt").read_text()[-3000:])
    usual_s = time.monotonic() - begin
    while result.kills.total() < kills:
        mine = Round(folder / f"round-{result.rounds}", steps)
        mine.folder.mkdir()
        _one_round(corpus, mine, kills, dice, usual_s, result)
        result.samples += _differences(mine.notes_of_steps(), whole.notes_of_steps())
        states = mine.final_state(), whole.final_state()
        result.weights += sum(not torch.equal(states[0][key], states[1][key]) for key in states[1])
        result.rounds += 1
        if result.harmless:
            shutil.rmtree(mine.folder)
        _say(result)


def _one_round(corpus: Path, mine: Round, kills: int, dice: random.Random, usual_s: float, result: Result) -> None:
    while True:
        ranks = mine.ranks(corpus)
        result.starts += 1
        last = result.kills.total() >= kills
        moment = None if last else _wait_for_moment(dice, mine, ranks, usual_s)
        if moment and ranks.running:
            victims = [dice.randrange(WORLD)] if dice.random() < 0.75 else list(range(WORLD))
            for rank in victims:
                ranks.send(rank, signal.SIGKILL)
            result.kills[f"{'one' if len(victims) == 1 else 'all'}, {moment}"] += 1
            ranks.wait(START_S)
            result.hung += len(ranks.hung)
            continue
        codes = ranks.wait(START_S + 2 * usual_s)
        result.hung += len(ranks.hung)
        if codes == [0] * WORLD:
            return
        result.unloadable += 1
        print(f"a start nobody killed ended with {codes}: {mine.folder}/output.txt", flush=True)
        if result.unloadable > 3:
            raise SystemExit(1)


def _wait_for_moment(dice: random.Random, mine: Round, ranks: Ranks, usual_s: float) -> str:
    """Returns at a random moment of one of three kinds, or when a rank has ended."""
    kind = dice.choices(["any time", "in a step", "in a write"], [2, 2, 3])[0]
    before, deadline = steps_done(mine.run_dir), time.monotonic() + START_S
    wait_s = dice.uniform(0, usual_s if kind == "any time" else 1.0 if kind == "in a step" else 0.02)
    ready = {
        "any time": lambda: True,
        "in a step": lambda: steps_done(mine.run_dir) not in (0, before),
        "in a write": mine.writing,
    }[kind]
    while not ready() and len(ranks.running) == WORLD and time.monotonic() < deadline:
        time.sleep(0.002)
    deadline = time.monotonic() + wait_s
    while time.monotonic() < deadline and len(ranks.running) == WORLD:
        time.sleep(0.001)
    return kind


def _differences(mine: dict[int, set[str]], whole: dict[int, set[str]]) -> int:
    """Steps that were missing, or that at any time took other samples or gave another loss than in the whole run."""
    return sum(mine.get(step) != said for step, said in whole.items()) + len(set(mine) - set(whole))


def _differences_from_plan(run_dir: Path, arguments: list[str]) -> int:
    """Steps of metrics.jsonl that are missing or did not take what the stream, a pure function, has for them."""
    lines = read_metrics(run_dir)
    data = open_data(settings("stage1", *arguments[2:]))
    wrong = sum(line["step"] != step for step, line in enumerate(lines))
    for line in lines:
        plan = data.stream.next_step()
        seen = (line["images"], line["visual_tokens"], round(line["fill"] * line["tokens"]))
        wrong += seen != (len(plan.tokens_I), int(plan.tokens_I.sum()), int(plan.length_S.sum()))
    data.reader.close()
    return wrong


def under_torchrun(
    corpus: Path, folder: Path, kills: int, pause_s: tuple[float, float], seed: int, result: Result
) -> None:
    """One job under torchrun that is killed `kills` times, each after some steps and a pause; then asked to stop."""
    dice = random.Random(seed)
    folder.mkdir(parents=True)
    run_dir = folder / "run"
    arguments = tiny(corpus, run_dir, "train.steps=1000000", "checkpoint.every=20", "logger.every=1000")
    arguments += ["optim.schedule=constant", "watchdog.timeout_s=20"]
    recovery_s, killed = [], 0.0
    job = Torchrun(arguments, f"--max-restarts={kills + 1}", log=folder / "output.txt")
    try:
        for done in range(kills + 1):
            _until_steps_after(run_dir, done, job)
            if done:
                recovery_s.append(time.monotonic() - killed)
            time.sleep(dice.uniform(*pause_s))
            if done == kills:
                break
            everyone = job.ranks()
            for pid in everyone if dice.random() < 0.25 else [dice.choice(everyone)]:
                os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            result.kills["torchrun"] += 1
        os.kill(job.ranks()[dice.randrange(WORLD)], signal.SIGUSR1)
        job.wait(START_S)
    except (AssertionError, TimeoutError) as error:
        print(f"torchrun: {error}: {folder}/output.txt", flush=True)
        result.hung += 1
    finally:
        job.close()
    result.recovery_s += recovery_s
    result.samples += _differences_from_plan(run_dir, arguments)
    summary = json.loads((run_dir / "summary.json").read_text())
    result.unloadable += summary["status"] != "stopped"
    result.hung += summary["restarts"] != kills
    result.effective_time = summary["effective_time"]
    totals = history.totals(history.read(run_dir), time.time())
    result.endurance = {"kills": kills, "elapsed_s": totals.elapsed_s, "lost_steps": totals.lost_steps}
    result.endurance["steps"] = steps_done(run_dir)
    _say(result)


def _until_steps_after(run_dir: Path, restarts: int, job: Torchrun) -> None:
    """Waits until the start after so many restarts has done a step."""

    def starts() -> list[dict]:
        return [event for event in history.read(run_dir) if event["event"] == "start"]

    until(lambda: len(starts()) > restarts, START_S, "the start", alive=lambda: job.running)
    resumed = starts()[restarts]["step"]
    until(lambda: steps_done(run_dir) > resumed, START_S, "the first step", alive=lambda: job.running)


def _say(result: Result) -> None:
    recovery = statistics.median(result.recovery_s) if result.recovery_s else float("nan")
    print(
        f"{result.kills.total()} kills, {result.starts} starts, {result.rounds} rounds; harm: "
        f"unloadable {result.unloadable}, hung {result.hung}, steps with other samples or losses {result.samples}, "
        f"tensors that differ {result.weights}; under torchrun: recovery {recovery:.1f} s, "
        f"effective time {result.effective_time}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of forked ranks")
    parser.add_argument("--torchrun-kills", type=int, default=10)
    parser.add_argument("--endurance-minutes", type=float, default=12.0)
    parser.add_argument("--minutes-between-kills", type=float, default=4.0, help="in the endurance part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "runs/soak", help="folder for logs and result.json")
    options = parser.parse_args(argv)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    begin, result = time.monotonic(), Result()
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder) / "corpus")
        if options.kills:
            forked(corpus, options.out / "forked", options.kills, options.seed, result)
        if options.torchrun_kills:
            under_torchrun(corpus, options.out / "torchrun", options.torchrun_kills, (0.0, 3.0), options.seed, result)
        if options.endurance_minutes:
            pause_s = 60 * options.minutes_between_kills
            kills = max(1, round(options.endurance_minutes / options.minutes_between_kills) - 1)
            under_torchrun(corpus, options.out / "endurance", kills, (pause_s - 15, pause_s), options.seed + 1, result)
    said = {**vars(result), "minutes": (time.monotonic() - begin) / 60, "harmless": result.harmless}
    (options.out / "result.json").write_text(json.dumps(said, indent=2) + "\n")
    print(json.dumps(said, indent=2))
    return 0 if result.harmless else 1


if __name__ == "__main__":
    sys.exit(main())
