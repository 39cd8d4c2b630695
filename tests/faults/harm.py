"""Faults that a rank brings upon itself, for `tests.faults.ranks.Ranks`: product code knows nothing of them."""

import json
import os
import threading
import time
from pathlib import Path

RANK = "RANK"


def several(*harms: tuple) -> None:
    for harm, *arguments in harms:
        harm(*arguments)


def nan_gradient(rank: int, where: str, calls: list[int]) -> None:
    """Makes the encoder's or the LLM's gradient not a number in these calls of the hybrid step, counted from 0."""
    from tandem.parallel.engines.encoder_engine import EncoderEngine
    from tandem.parallel.engines.llm_engine import LLMEngine

    if int(os.environ[RANK]) != rank:
        return
    forward_backward, backward, seen = LLMEngine.forward_backward, EncoderEngine.backward, [-1]

    def spoiled_schedule(self, micro_batches, leaves, scale):
        seen[0] += 1
        spoil = where == "llm" and seen[0] in calls
        return forward_backward(self, micro_batches, leaves, float("nan") if spoil else scale)

    def spoiled_backward(self, rows, gradient):
        spoil = where == "encoder" and seen[0] in calls
        return backward(self, rows, gradient * float("nan") if spoil else gradient)

    LLMEngine.forward_backward, EncoderEngine.backward = spoiled_schedule, spoiled_backward


def fail(rank: int, call: int) -> None:
    """Raises in one step of one rank."""
    _in_step(rank, call, _raise)


def slow(rank: int, seconds: float) -> None:
    """Encodes every chunk late."""
    from tandem.parallel.engines.encoder_engine import EncoderEngine

    if int(os.environ[RANK]) != rank:
        return
    encode = EncoderEngine.encode

    def late(self, *inputs):
        time.sleep(seconds)
        return encode(self, *inputs)

    EncoderEngine.encode = late


def hang(rank: int, call: int) -> None:
    """Never enters the collectives of a step."""
    _in_step(rank, call, threading.Event().wait)


def hang_prefetcher(rank: int, call: int) -> None:
    """The thread that makes steps ready stands still."""
    from tandem.data.planning.stream import Stream

    _in_call(Stream, "next_step", rank, call, threading.Event().wait)


def signal_worker(rank: int, call: int, number: int) -> None:
    """One of the processes that read and decode for a rank gets a signal while it has work."""
    from tandem.data.reading.reader import ShardReader

    if int(os.environ[RANK]) != rank:
        return
    begin, seen = ShardReader.begin, [-1]

    def harmed(self, *arguments, **options):
        pending = begin(self, *arguments, **options)
        seen[0] += 1
        if seen[0] == call:
            os.kill(self.worker_pids[0], number)
        return pending

    ShardReader.begin = harmed


def note_samples(path: str) -> None:
    """Rank 0 writes down which samples every step took."""
    from tandem.train.metrics import StepMetrics

    if int(os.environ[RANK]) != 0:
        return
    numbers = StepMetrics.numbers

    def noted(self, step, lr, seconds, prepared, output, facts):
        plan = prepared.plan
        line = {"step": step, "samples": [plan.shard_S.tolist(), plan.index_S.tolist()], "loss": output.loss.hex()}
        with Path(path).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return numbers(self, step, lr, seconds, prepared, output, facts)

    StepMetrics.numbers = noted


def _raise():
    raise RuntimeError("injected")


def _in_step(rank: int, call: int, what) -> None:
    from tandem.parallel.comm.exchange import Exchange

    _in_call(Exchange, "dispatch", rank, call, what)


def _in_call(owner, name: str, rank: int, call: int, what) -> None:
    if int(os.environ[RANK]) != rank:
        return
    method, seen = getattr(owner, name), [-1]

    def harmed(self, *arguments, **options):
        seen[0] += 1
        if seen[0] == call:
            what()
        return method(self, *arguments, **options)

    setattr(owner, name, harmed)
