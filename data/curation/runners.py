"""Two ways to map a task over shards: processes of this machine, or actors of a Ray cluster. Both yield the results in
the order of the items, as they become due, and both raise what a task raises as ValueError.
"""

import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

_task, _number = None, 0


def worker_number() -> int:
    """Which process of in_processes this is, from 0, and 0 anywhere else: chooses among several GPUs."""
    return _number


def in_processes(task: Callable, items: Sequence, workers: int) -> Iterator:
    """`task` over items in `workers` processes, each with its own copy of the task; in this process if it is 1."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(task, items)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start, (task, context.Value("i", 0))) as pool:
        try:
            yield from pool.map(_run, items)
        except BrokenProcessPool as error:
            raise ValueError("a worker process died, most likely for want of memory; try fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _start(task: Callable, counter) -> None:
    global _task, _number
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    with counter.get_lock():
        _task, _number = task, counter.value
        counter.value += 1


def _end_with(parent: int) -> None:
    """End this process within a second of its parent's end, so that nobody writes behind a killed command."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _run(item):
    assert _task is not None, "_start comes first"
    return _task(item)


def on_ray(task: Callable, items: Sequence, workers: int, gpus: float = 0) -> Iterator:
    """`task` over items on Ray Data with `workers` actors, `gpus` GPUs each.

    Joins the cluster that RAY_ADDRESS names, else starts one on this machine. Shards must lie on a file system that
    all nodes see. Values travel as JSON. Raises ValueError where Ray is not installed.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(
            f"--ray needs Ray Data, which is not installed ({error}): pip install 'tandem[ray]'"
        ) from error
    if not items:
        return
    ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False, configure_logging=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    rows = [{"number": number, "item": json.dumps(item)} for number, item in enumerate(items)]
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(items)))
    results = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        RayWorker, fn_constructor_args=(task,), compute=pool, num_gpus=gpus
    )
    waiting, due = {}, 0
    for row in results.iter_rows():
        waiting[row["number"]] = row
        while due in waiting:
            row = waiting.pop(due)
            if row["error"]:
                raise ValueError(row["error"])
            yield json.loads(row["result"])
            due += 1


class RayWorker:
    """Holds one copy of the task. A user's mistake comes back as a value: Ray would wrap it in its own error."""

    def __init__(self, task: Callable):
        self._task = task

    def __call__(self, row: dict) -> dict:
        try:
            result, error = json.dumps(self._task(json.loads(row["item"]))), ""
        except ValueError as raised:
            result, error = "", str(raised) or type(raised).__name__
        return {"number": row["number"], "result": result, "error": error}
