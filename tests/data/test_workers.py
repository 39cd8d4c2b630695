import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest

from tandem.data.reading import workers
from tandem.data.reading.jobs import Areas, Job
from tandem.data.reading.slots import SLOT_STEP, Slots
from tandem.data.reading.workers import ROOT, WorkerPool
from tandem.data.vision import VisionSpec


@pytest.fixture
def settings(tokenizer):
    return {
        "tokenizer": tokenizer.settings,
        "tokenizer_sha256": tokenizer.sha256,
        "train_roles": [["assistant"]],
        "max_pixels": 1 << 20,
        "vision": dataclasses.asdict(VisionSpec()),
    }


@pytest.fixture
def pool(settings):
    pool = WorkerPool(2, settings)
    yield pool
    pool.close()


@pytest.fixture
def slots():
    slots = Slots(4)
    yield slots
    slots.close()


def text_job(lease, path, contents: list[bytes], length: int) -> Job:
    """One row of `length` tokens for each of the samples, which lie in the file at `path` one after another."""
    count = len(contents)
    sizes = np.array([len(content) for content in contents])
    arrays = {
        "path_M": np.zeros(count, np.int64),
        "offset_M": np.cumsum(sizes) - sizes,
        "size_M": sizes,
        "crc_M": np.array([zlib.crc32(content) for content in contents], np.uint32),
        "plain_M": np.zeros(count, np.uint16),
        "source_M": np.zeros(count, np.int64),
        "out_M": np.arange(count) * length,
        "length_M": np.full(count, length),
        "first_kind_M1": np.zeros(count + 1, np.int64),
        "kind": np.zeros(0, np.uint8),
        "first_M1": np.zeros(count + 1, np.int64),
        **{name: np.zeros(0, np.int64) for name in ("media_I", "time_I", "tokens_I", "start_I")},
    }
    words = {"kind": "texts", "slot": lease.address, "patches": 0, "positions": count * length}
    words |= {"paths": [str(path)], "formats": [["turns", None]]}
    return Job(words, arrays)


@pytest.fixture
def texts(tmp_path, tokenizer):
    """texts(lease, first, count): a job over samples that say a number, and what it should write."""
    width = 8  # <user> <eos> <assistant> 0 0 0 0 <eos>

    def make(lease, first=0, count=3):
        turns = [[{"role": "user", "text": ""}, {"role": "assistant", "text": f"{first + n:04}"}] for n in range(count)]
        contents = [json.dumps({"turns": turn}).encode() for turn in turns]
        path = tmp_path / f"texts-{first}"
        path.write_bytes(b"".join(contents))
        expected = [tokenizer.encode_sample(turn, ("assistant",), (), "it").tokens_T for turn in turns]
        assert all(len(tokens) == width for tokens in expected)
        return text_job(lease, path, contents, width), np.concatenate(expected)

    make.width = width
    return make


def areas(texts, count=3):
    return Areas(0, count * texts.width, VisionSpec().patch_values)


def test_messages_keep_words_and_arrays():
    arrays = {"a": np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::-1], "b": np.zeros(0, bool), "c": np.uint64([2**63])}
    job = Job.unpack(Job({"kind": "ä", "n": [1, None]}, arrays).pack())
    assert job.words == {"kind": "ä", "n": [1, None]}
    for name, array in arrays.items():
        assert np.array_equal(job.arrays[name], array) and job.arrays[name].dtype == array.dtype


def test_workers_write_into_the_slot(pool, slots, texts):
    leases = [slots.take(areas(texts).size) for _ in range(3)]
    jobs = [texts(lease, 10 * n) for n, lease in enumerate(leases)]
    futures = [pool.submit(job, "texts", lease) for (job, _), lease in zip(jobs, leases, strict=True)]
    for (_, expected), lease, future in zip(jobs, leases, futures, strict=True):
        done = future.result(30)
        assert np.array_equal(areas(texts).tokens(lease.array_B), expected) and not done.failures


def test_a_slot_that_grew_is_opened_again(pool, slots, texts):
    for count in (3, 300_000, 3):
        lease = slots.take(areas(texts, count).size)
        job, expected = texts(lease, 7)
        pool.submit(job, "texts", lease).result(30)
        assert np.array_equal(areas(texts).tokens(lease.array_B)[: len(expected)], expected)
        lease.release()


def test_workers_import_neither_torch_nor_the_trainer(pool, slots, texts):
    lease = slots.take(areas(texts).size)
    pool.submit(texts(lease)[0], "texts", lease).result(30)
    for pid in pool.pids:
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert "site-packages/numpy" in maps and "libtorch" not in maps


def test_what_the_worker_itself_gets_wrong_is_an_error(pool, slots, texts):
    lease = slots.take(64)
    job = texts(lease)[0]
    del job.arrays["length_M"]
    with pytest.raises(RuntimeError, match="a data worker failed over texts of x: KeyError: 'length_M'"):
        pool.submit(job, "texts of x", lease).result(30)
    again = slots.take(areas(texts).size)
    pool.submit(texts(again)[0], "texts", again).result(30)  # and it goes on


def test_a_worker_that_dies_is_replaced_and_its_work_done_again(pool, slots, texts):
    lease = slots.take(areas(texts).size)
    pool.submit(texts(lease)[0], "texts", lease).result(30)
    before = pool.pids
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    leases = [slots.take(areas(texts).size) for _ in range(3)]
    jobs = [texts(lease, 100 * n) for n, lease in enumerate(leases)]
    futures = [pool.submit(job, "texts", lease) for (job, _), lease in zip(jobs, leases, strict=True)]
    for (_, expected), lease, future in zip(jobs, leases, futures, strict=True):
        future.result(30)
        assert np.array_equal(areas(texts).tokens(lease.array_B), expected)
    assert set(pool.pids) != set(before)


def test_work_that_kills_two_workers_is_an_error_and_the_pool_lives_on(settings, slots, texts, tmp_path):
    """The job reads from a pipe without a writer, so that its worker waits there to be killed."""
    pool = WorkerPool(1, settings)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    lease = slots.take(areas(texts).size)
    job = texts(lease)[0]
    job.words["paths"] = [str(pipe)]
    stuck = pool.submit(job, "texts of pipe", lease)
    other = slots.take(areas(texts).size)
    good, expected = texts(other, 50)
    behind = pool.submit(good, "texts", other)
    for _ in range(2):
        pid = pool.pids[0]
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: pool.pids[0] != pid)
    with pytest.raises(
        RuntimeError, match=r"two data workers died over texts of pipe \(the last one: killed by SIGKILL"
    ):
        stuck.result(30)
    behind.result(30)
    assert np.array_equal(areas(texts).tokens(other.array_B), expected)
    pool.close()


def wait_until(true, seconds=30):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "waited too long"
        time.sleep(0.01)


def test_a_worker_that_hangs_counts_as_dead(settings, slots, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "JOB_SECONDS", 0)
    os.mkfifo(tmp_path / "pipe")
    lease = slots.take(areas(texts).size)
    job = texts(lease)[0]
    job.words["paths"] = [str(tmp_path / "pipe")]
    pool = WorkerPool(1, settings)
    with pytest.raises(RuntimeError, match="two data workers died over texts .the last one: no answer in 0 s"):
        pool.submit(job, "texts", lease).result(30)
    pool.close()


def test_closing_ends_processes_and_work(settings, slots, texts, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    pool = WorkerPool(2, settings)
    lease = slots.take(areas(texts).size)
    job = texts(lease)[0]
    job.words["paths"] = [str(tmp_path / "pipe")]
    futures = [pool.submit(job, "texts", lease) for _ in range(5)]
    pids = pool.pids
    pool.close()
    pool.close()
    for future in futures:
        with pytest.raises(RuntimeError, match="closed"):
            future.result(0)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(RuntimeError, match="the reader is closed"):
        pool.submit(job, "texts", lease)


def test_a_tokenizer_that_changed_is_told(settings, slots, texts, capfd):
    pool = WorkerPool(1, settings | {"tokenizer_sha256": "0" * 64})
    lease = slots.take(areas(texts).size)
    with pytest.raises(RuntimeError, match="two data workers died over texts .the last one: ended with exit code 1"):
        pool.submit(texts(lease)[0], "texts", lease).result(60)
    pool.close()
    assert "has changed since the run began" in capfd.readouterr().err


# The reader in a process of its own, as a script, with a fork that outlives it and holds every descriptor open.
PARENT = """
import os, sys, time
sys.path.insert(0, {root!r})
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.reading.reader import ShardReader
from tandem.data.planning.stream import Stream
from tests.data.synthetic import stream_config
from tandem.data.media.text import Tokenizer
from tandem.data.vision import VisionSpec

tokenizer = Tokenizer({folder!r} + "/tokenizer.json")
corpus = Corpus.open([SourceSettings(name="main", shards=({folder!r} + "/train/*.tar",))], tokenizer.sha256)
config = stream_config(seq_length=1024, rows_per_step=4, seed=0, vision=VisionSpec(4, 64))
stream = Stream(corpus, config, tokenizer.stamp_lengths)
reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, workers=3)
print("imported once", flush=True)
fork = os.fork()
if fork == 0:
    time.sleep(60)
    os._exit(0)
print("pids", *reader.worker_pids, fork, flush=True)
while True:
    plan = stream.next_step()
    images, rows = reader.read(plan, range(len(plan.tokens_I)), range(4))
    images.release()
    {then}
"""


def run_parent(corpus, tmp_path, then):
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(root=str(ROOT), folder=str(corpus), then=then))
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    lines = [parent.stdout.readline() for _ in range(2)]
    assert lines[0] == "imported once\n"
    *pids, fork = [int(pid) for pid in re.findall(r"\d+", lines[1])]
    return parent, [psutil.Process(pid) for pid in pids], fork


@pytest.mark.parametrize("end", ["killed", "returned", "raised"])
def test_no_worker_outlives_its_parent(corpus, tmp_path, end):
    then = {"killed": "pass", "returned": "sys.exit()", "raised": "raise ValueError('stop')"}[end]
    parent, processes, fork = run_parent(corpus, tmp_path, then)
    try:
        if end == "killed":
            parent.send_signal(signal.SIGKILL)
        assert parent.wait(60) == {"killed": -signal.SIGKILL, "returned": 0, "raised": 1}[end]
        gone, alive = psutil.wait_procs(processes, timeout=10)
        assert len(gone) == 3 and not alive
    finally:
        os.kill(fork, signal.SIGKILL)


def test_slots_are_used_again_last_in_first_out():
    slots = Slots(3)
    one, two = slots.take(10), slots.take(10)
    numbers = [one.address[0], two.address[0]]
    assert len(set(numbers)) == 2
    one.release()
    assert slots.take(10).address[0] == numbers[0]  # and given back at once, nobody holding it
    assert slots.take(SLOT_STEP * 3).address[:2] == [numbers[0], 2]  # larger: its second memory
    leases = [slots.take(1) for _ in range(2)]
    with pytest.raises(RuntimeError, match="all 3 batches"):
        slots.take(1)
    del leases
    slots.take(1)


def test_leases_may_go_back_from_any_thread_at_any_time():
    slots, errors = Slots(8), []

    def work():
        try:
            for _ in range(300):
                lease = slots.take(100)
                lease.array_B[:] = 1
                del lease
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
