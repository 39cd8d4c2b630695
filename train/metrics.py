"""What a run writes down, one way: metrics.jsonl (one object a step), history.jsonl (one object an event), summary.json
at the end, wandb, and the console.

Only rank 0 writes.  `StepMetrics` turns a step's results into the numbers; reductions over ranks happen there.
"""

import json
import math
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tandem.data.reading.reader import Failure
from tandem.parallel.engines.balance import ExpertLoad
from tandem.parallel.grid import Grid
from tandem.parallel.hybrid_step import StepOutput
from tandem.train.config.schema import Config
from tandem.train.cost.flops import device_peak_tflops
from tandem.train.input.prefetcher import PreparedStep
from tandem.train.reliability import history
from tandem.train.reliability.health import Slow
from tandem.train.reliability.history import History
from tandem.train.reliability.stopping import launch_id
from tandem.train.start import Position, RunPaths
from tandem.train.tasks.base import StepFacts

PACE_STEPS = 50  # newest steps of which the time left is reckoned


class StepMetrics:
    """The numbers of one step, equal on all ranks."""

    def __init__(self, config: Config, grid: Grid):
        peak = config.logger.peak_tflops or device_peak_tflops(grid.device)
        self._peak_flops = peak * 1e12 * grid.layout.world
        self._skipped = 0
        self._lr_scale = {part: config.optim.lr_scale.of(part) for part in config.trained_parts}

    def numbers(
        self, step: int, lr: float, seconds: float, prepared: PreparedStep, output: StepOutput, facts: StepFacts
    ) -> dict:
        """One line of metrics.jsonl."""
        self._skipped += len(prepared.skipped)
        return {
            "step": step,
            "loss": output.loss,
            "lr": lr,
            **{f"lr_{part}": lr * factor for part, factor in self._lr_scale.items()},
            "grad_norm": output.grad_norm,
            **{f"grad_norm_{part}": norm for part, norm in output.part_norms.items()},
            "applied": output.applied,
            "tokens": facts.tokens,
            "tokens_per_s": facts.tokens / seconds,
            "step_time_s": seconds,
            "mfu": facts.flops / seconds / self._peak_flops,
            "encoder_flops_share": facts.encoder_flops / max(facts.flops, 1),
            "encoder_load_max_over_mean": facts.load_max_over_mean,
            "images": len(prepared.plan.tokens_I),
            "refused": sum(prepared.plan.state_after["refused"].values()),
            "bytes_read": prepared.bytes_read,
            "skipped": self._skipped,
            **(_of_experts(output.experts) if output.experts else {}),
            **({} if output.memory_bytes is None else {"gpu_memory_gib": output.memory_bytes / 2**30}),
            **facts.more,
        }


def _of_experts(load: ExpertLoad) -> dict:
    """Lists are by layer, null where a layer has no experts."""
    return {
        "expert_load_max_over_mean": load.max_over_mean,
        "expert_load_highest": load.highest,
        "dead_experts": load.dead,
        "aux_loss": load.aux_loss,
        "z_loss": load.z_loss,
    }


class Logger:
    """Files, wandb and progress of one run; does nothing on ranks other than 0."""

    def __init__(self, config: Config, paths: RunPaths, rank: int, position: Position):
        self._active = rank == 0
        if not self._active:
            return
        self._config, self._dir = config, paths.run_dir
        self._begin, self._steps = time.time(), 0
        self._last: dict[str, Any] = {}
        self._unreadable: Counter[tuple[str, str]] = Counter()  # (shard, reason) -> samples
        (self._dir / "summary.json").unlink(missing_ok=True)  # of an attempt before this one
        self._file, lost = self._reopen(position.step)
        self._history = History(self._dir)
        self._happened(
            "start",
            began=history.process_began(),
            attempt=paths.attempt,
            launch=launch_id(),
            world=dist.get_world_size(),
            step=position.step,
            checkpoint=str(position.checkpoint) if position.checkpoint else None,
            cause=paths.cause,
            lost_steps=lost,
        )
        self._wandb = _start_wandb(config, paths.run_dir)
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._bar = self._progress.add_task(config.label, total=config.train.steps, completed=position.step)
        self._seconds: deque[float] = deque(maxlen=PACE_STEPS)

    def log(self, numbers: dict, phases: dict[str, float]) -> None:
        """Writes one step."""
        if not self._active:
            return
        self._useful_s += numbers["step_time_s"] if numbers["applied"] else 0.0
        line = _finite(numbers) | self._book()
        line["phase_s"] = {name: round(value, 6) for name, value in phases.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._last, self._steps = line, self._steps + 1
        self._progress.update(self._bar, advance=1)
        self._seconds.append(numbers["step_time_s"])
        done, steps = numbers["step"] + 1, self._config.train.steps
        if done % self._config.logger.every == 0 or done == steps:
            self.say(console_line(numbers, steps, sum(self._seconds) / len(self._seconds)))
        if self._wandb:
            self._wandb.log(_charts(line), step=numbers["step"])

    def say(self, text: str) -> None:
        """One line for the person who watches."""
        if self._active:
            self._console.print(text, highlight=False, soft_wrap=True)

    def unreadable(self, failures: Sequence[Failure]) -> None:
        """Samples of a step that no rank could use."""
        if self._active:
            self._unreadable.update((failure.shard, failure.reason) for failure in failures)
            for failure in failures:
                self.say(f"skipped: {failure.sentence}")

    def skipped(self, step: int, output: StepOutput, why: str, finding: str | None) -> None:
        """A step that the guards refused."""
        if self._active:
            numbers = _finite({"loss": output.loss, "grad_norm": output.grad_norm})
            self._happened("skipped", step=step, **numbers, why=why, replay=finding)
            self.say(f"step {step + 1} SKIPPED: {why}" + (f"; {finding}" if finding else ""))

    def rolled_back(self, why: str, step: int, position: Position) -> None:
        """The run goes back from `step` to an earlier position; its lines since then are taken again."""
        if not self._active:
            return
        self._file.close()
        self._file, lost = self._reopen(position.step)
        facts = {"from_step": step, "to_step": position.step, "data": position.data, "lost_steps": lost}
        assert position.checkpoint is not None, "what a run goes back to is a checkpoint"
        self._happened("rollback", why=why, **facts)
        self.say(
            f"ROLLED BACK from step {step} to {position.checkpoint.name}, the data goes on after step {step}: {why}"
        )
        self._progress.update(self._bar, completed=position.step)

    def tell_health(self, slow: list[Slow], warnings: list[str]) -> None:
        """Slow ranks, and what is about to run out."""
        for rank in slow:
            self._happened("slow", **asdict(rank))
            self.say(f"SLOW: {rank}")
        for sentence in warnings:
            self._happened("warning", text=sentence)
            self.say(f"WARNING: {sentence}")

    def finish(self, status: str, step: int, checkpoint: Path | None) -> None:
        """Writes summary.json and closes everything."""
        if not self._active:
            return
        self._happened("end", status=status, step=step)
        self._progress.stop()
        self._file.close()
        summary = {
            "status": status,
            "task": self._config.task,
            "label": self._config.label,
            "steps_this_run": self._steps,
            "elapsed_s": time.time() - self._begin,
            "checkpoint": str(checkpoint) if checkpoint else None,
            **self._book(),
            "causes": list(self._totals.causes),
            "unreadable": [{"shard": s, "reason": r, "samples": n} for (s, r), n in sorted(self._unreadable.items())],
            "last": self._last,
        }
        (self._dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        if self._wandb:
            self._wandb.finish()

    def _happened(self, event: str, **fields) -> None:
        self._history.append(event, **fields)
        self._totals, self._counted_at = history.totals(self._history.events, time.time()), time.time()

    def _book(self) -> dict:
        """What the run has cost so far, over all its starts."""
        elapsed = self._totals.elapsed_s + time.time() - self._counted_at
        return {
            "effective_time": self._useful_s / max(elapsed, self._useful_s, 1e-9),
            "restarts": self._totals.restarts,
            "lost_steps": self._totals.lost_steps,
            "skipped_steps": self._totals.skipped_steps,
            "rollbacks": self._totals.rollbacks,
        }

    def _reopen(self, first_step: int):
        """metrics.jsonl for appending, without lines of steps that are taken again, and how many these were."""
        path = self._dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        whole = {line: json.loads(line) for line in lines if line.endswith("\n")}
        kept = {line: said for line, said in whole.items() if said["step"] < first_step}
        self._useful_s = sum(said["step_time_s"] for said in kept.values() if said["applied"])
        staged = path.with_suffix(".partial")
        staged.write_text("".join(kept))
        staged.replace(path)  # whoever dies here leaves the old file or the new one
        return path.open("a"), len(whole) - len(kept)


def console_line(numbers: dict, steps: int, pace_s: float) -> str:
    """One step for the person who watches, of `steps`, which take `pace_s` each."""
    done = numbers["step"] + 1
    load = f"load {numbers['encoder_load_max_over_mean']:.2f} encoder"
    if "expert_load_highest" in numbers:
        load += f", {numbers['expert_load_highest']:.2f} experts"
    parts = [
        f"step {done}/{steps}",
        f"loss {numbers['loss']:.4f}",
        f"grad norm {numbers['grad_norm']:.3f}",
        f"lr {numbers['lr']:.2e}",
        f"{numbers['step_time_s']:.2f} s",
        f"{numbers['tokens_per_s']:,.0f} tokens/s",
        f"MFU {numbers['mfu']:.1%}",
        load,
        *([f"{numbers['gpu_memory_gib']:.1f} GiB"] if "gpu_memory_gib" in numbers else []),
        f"{timedelta(seconds=round(pace_s * (steps - done)))} left",
        *([] if numbers["applied"] else ["skipped"]),
    ]
    return "  ".join(parts)


def _charts(value):
    """What wandb draws: numbers under names, a list's by place, and nothing that is missing."""
    if isinstance(value, list):
        value = {f"layer_{place:03d}": inner for place, inner in enumerate(value)}
    if isinstance(value, dict):
        return {name: _charts(inner) for name, inner in value.items() if inner is not None}
    return value


def _finite(value):
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(config: Config, run_dir: Path):
    if config.logger.wandb == "disabled":
        return None
    import wandb

    return wandb.init(
        mode=cast(Any, config.logger.wandb),  # one of three, checked with the settings
        project=config.logger.project,
        name=run_dir.name,
        id=run_dir.name,
        resume="allow",
        dir=run_dir,
        settings=wandb.Settings(silent=True),
    )
