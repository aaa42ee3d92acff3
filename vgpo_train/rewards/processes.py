"""What the processes of rewards ask of the operating system."""

import contextlib
import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_MOST_WORKERS = 8
_worker = False


def is_worker() -> bool:
    """Whether this process runs rewards for another, which ends it where a call takes too long."""
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


def kill(pid: int, *, group: bool = False) -> int:
    """Kills a child, or it and its process group; returns its status as `os.waitpid` gives it."""
    for send, target in ((os.killpg, pid), (os.kill, pid)) if group else ((os.kill, pid),):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            send(target, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        return os.waitpid(pid, 0)[1]
    return 0


def describe_end(status: int) -> str:
    """Returns in words how a process ended."""
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        return f"the process that ran the reward was killed by signal {-code} ({signal.strsignal(-code)})"
    return f"the reward ended its process with status {code}"
