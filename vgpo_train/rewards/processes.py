"""Calls of the operating system that the processes of rewards need."""

import contextlib
import ctypes
import os
import signal
import sys
from multiprocessing.context import ForkContext, ForkProcess

_PR_SET_PDEATHSIG = 1
_MOST_WORKERS = 8
_CODES = 256  # of a process that ends by itself
_worker = False


class _Worker(ForkProcess):
    def terminate(self) -> None:
        """Kills the process and what it started; C code does not handle SIGTERM before it returns."""
        kill_group(self.pid)

    @property
    def exitcode(self) -> int | None:
        """The exit status, but 256 for 0: pebble fails the call of an ended process only if the status is not 0."""
        return _CODES if super().exitcode == 0 else super().exitcode


class WorkerContext(ForkContext):
    """Forks the workers of a pebble pool."""

    Process = _Worker


def is_worker() -> bool:
    """Whether this process runs rewards for another, which ends it if a call takes too long."""
    return _worker


def share_of_cores() -> int:
    """Returns the number of cores that belong to this rank, between 1 and 8."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return max(1, min(_MOST_WORKERS, cores // ranks))


def isolate(parent: int) -> None:
    """Makes this process the leader of a group of its own that ends with `parent`, and the first to lose its memory."""
    global _worker
    _worker = True
    os.setpgid(0, 0)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")  # short of memory, the kernel kills this process rather than the training
    if os.getppid() != parent:  # it died before the line above
        os._exit(1)


def kill_group(pid: int) -> None:
    """Kills a process and those of its group."""
    for send in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(pid, signal.SIGKILL)


def describe_end(code: int) -> str:
    """Returns in words how a worker with this exit code ended."""
    if code < 0:
        return f"the process that ran the reward was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"the reward ended its process with status {code % _CODES}"
