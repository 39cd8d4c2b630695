"""How a run is asked to stop, and how it says so.

    SIGTERM, SIGUSR1 or Ctrl-C  ->  wish of one rank  ->  all ranks stop after the same step, save  ->  exit code 85

The wish travels with the gradient norms.  A signal to torchrun reaches the ranks through it; SIGUSR1 only where
torchrun is told to pass it on (--signals-to-handle), but if that kills torchrun, the ranks still stop, as they do when
torchrun dies in any other way: the kernel sends them SIGTERM.  A stop that began at one rank would be a failure to
torchrun, which restarts failed ranks, so the first rank of each node tells it to end.
"""

import contextlib
import ctypes
import os
import signal
import threading

STOPPED = 85  # exit code: stopped on request, with a checkpoint; start it again to go on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


def launch_id() -> str | None:
    """Names the torchrun that started this rank, over its restarts; None without one, and where it has no name."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name == "none" else name


def follow_launcher() -> int | None:
    """Asks the kernel for SIGTERM when torchrun ends; returns torchrun's process id, None without one."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    return os.getppid()


def end_launcher(launcher: int | None) -> None:
    """Tells this node's torchrun, from one rank, that its ranks end on purpose; from now on signals change nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if launcher is not None and os.environ.get("LOCAL_RANK") == "0" and os.getppid() == launcher:
        os.kill(launcher, signal.SIGTERM)


@contextlib.contextmanager
def stop_wish():
    """An event that the first of SIGNALS sets; a second Ctrl-C interrupts at once.

    Before and after, a signal ends the process as it would any other; not so once the wish is there.
    """
    stop = threading.Event()

    def ask(number, frame):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()

    before = {number: signal.signal(number, ask) for number in SIGNALS}
    yield stop
    if not stop.is_set():
        for number, handler in before.items():
            signal.signal(number, handler)
