"""Which ranks are slow, and what is about to run out: looked at now and then, over a gloo group, by all ranks at once.

In a synchronous step a slow rank makes the others wait, so step times say nothing; but only the slow one takes long in
a phase of its own work, while the others take long in the phases where they wait.  A phase of a rank is named where it
takes `slow_factor` times the median over the ranks and the difference is worth mentioning.
"""

import os
import shutil
import socket
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

LEAST_SHARE = 0.05  # of a step: shorter delays are not reported
LOW = 0.05  # of a resource
GIB = 2**30


@dataclass(frozen=True)
class Slow:
    """A rank that takes `ratio` times the others' median in a phase."""

    rank: int
    host: str
    phase: str
    ratio: float

    def __str__(self):
        return f"rank {self.rank} on {self.host} is slow: {self.ratio:.1f} times the median in phase {self.phase!r}"


def slow_ranks(seconds: list[dict[str, float]], hosts: list[str], factor: float) -> list[Slow]:
    """The slow ranks among `seconds`, time by phase of every rank, worst first; none where there is no majority."""
    if len(seconds) < 3:
        return []
    step = statistics.median(sum(phases.values()) for phases in seconds)
    found = []
    for phase in sorted(set().union(*seconds)):
        times = [phases.get(phase, 0.0) for phases in seconds]
        usual = statistics.median(times)
        found += [
            Slow(rank, hosts[rank], phase, time / max(usual, 1e-9))
            for rank, time in enumerate(times)
            if time > factor * usual and time - usual > LEAST_SHARE * step
        ]
    few = {phase for phase, count in Counter(slow.phase for slow in found).items() if count <= len(seconds) // 4}
    return sorted((slow for slow in found if slow.phase in few), key=lambda slow: -slow.ratio)


class Health:
    """Collects phase times and, when asked, gathers them and warnings on rank 0 (building one is collective)."""

    def __init__(self, folder: Path, device: torch.device):
        self._group = dist.new_group(backend="gloo")
        self._folder, self._device, self._host = folder, device, socket.gethostname()
        self._retries = 0
        self._seconds: Counter[str] = Counter()

    def add(self, seconds: dict[str, float]) -> None:
        """Phase times of one step."""
        self._seconds.update(seconds)

    def look(self, factor: float) -> tuple[list[Slow], list[str]]:
        """Slow ranks since the last look, and warnings; empty on ranks other than 0 (collective)."""
        mine = (dict(self._seconds), self._host, self._warnings())
        self._seconds.clear()
        everyone = [None] * dist.get_world_size(self._group) if dist.get_rank() == 0 else None
        dist.gather_object(mine, everyone, group=self._group)
        if everyone is None:
            return [], []
        seconds, hosts, warnings = zip(*everyone, strict=True)
        sentences = [sentence for several in warnings for sentence in several]
        return slow_ranks(list(seconds), list(hosts), factor), list(dict.fromkeys(sentences))

    def _warnings(self) -> list[str]:
        sentences = self._device_warnings()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            found = (low_disk(self._folder, self._host), low_memory(self._host))
            sentences += [sentence for sentence in found if sentence]
        return sentences

    def _device_warnings(self) -> list[str]:
        """The caching allocator takes all memory in the end; that it had to give some back is what says it is short."""
        if self._device.type != "cuda":
            return []
        stats = torch.cuda.memory_stats(self._device)
        retries, self._retries = self._retries, stats.get("num_alloc_retries", 0)
        if self._retries == retries:
            return []
        peak, whole = stats["allocated_bytes.all.peak"], torch.cuda.mem_get_info(self._device)[1]
        return [
            f"GPU memory is short on rank {dist.get_rank()}: {self._retries - retries} allocations had to wait for "
            f"cached memory, peak {peak / GIB:.1f} of {whole / GIB:.1f} GiB; lower parallel.encoder.chunk_patches"
        ]


def low_disk(folder: Path, host: str) -> str | None:
    """A warning where the next checkpoint may not fit: less room than the newest one takes, or almost none."""
    usage = shutil.disk_usage(folder if folder.is_dir() else folder.parent)
    saved = sorted(folder.glob("step-*"))
    size = sum(file.stat().st_size for file in saved[-1].glob("*")) if saved else 0
    if usage.free > max(2 * size, min(LOW * usage.total, 10 * GIB)):
        return None
    return (
        f"disk is short at {folder} ({host}): {usage.free / GIB:.1f} GiB free, a checkpoint takes {size / GIB:.1f} GiB"
    )


def low_memory(host: str) -> str | None:
    """A warning where little of the host's memory, or of this job's share of it, is left."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    whole, free = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    group = Path("/sys/fs/cgroup")
    try:
        most = int((group / "memory.max").read_text())
        facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        reclaimable = int(facts["inactive_file"]) + int(facts["active_file"])
        free = min(free, most - int((group / "memory.current").read_text()) + reclaimable)
        whole = min(whole, most)
    except (OSError, ValueError, KeyError):  # no control group, or one without a limit
        pass
    if free > LOW * whole:
        return None
    return f"host memory is short on {host}: {free / GIB:.1f} of {whole / GIB:.1f} GiB left"
