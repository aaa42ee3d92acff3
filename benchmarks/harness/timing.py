"""How long calls take: in turns, so that drift hits all alike; on a GPU by events, ahead of which the host runs."""

import ctypes
import functools
import gc
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch

# A spin before a timed call keeps the GPU busy while the host queues it; longer ones hide nothing more.
LONGEST_SPIN = 0.02
# Seconds that a call runs before it is timed on a CPU, and is timed in one turn; one many times as long does without.
SETTLING, LONG = 0.01, 20
# Of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


class Ceilings(NamedTuple):
    """What a machine reaches, measured beside the benchmarks.

    Args:
        flops: operations a second of a large square matrix product.
        bandwidth: bytes read plus bytes written a second by a large copy.
    """

    flops: float
    bandwidth: float


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device,
    seconds: float = 1.0,
    least: int = 3,
    most: int = 200,
) -> dict[str, list[float]]:
    """Times calls in turns, in a shuffled order each round; slow ones in fewer rounds, spread evenly.

    On a CPU a call that is short has a turn of several, after some that do not count: torch's threads spin for
    milliseconds when their work is done, which would count as time of the next call.

    Args:
        calls: by name; what they return is dropped.
        device: where they run.
        seconds: about how long each call is repeated.
        least: times that even the slowest call is timed.
        most: times that the fastest call is timed.

    Returns:
        The seconds of each call, by name: wall-clock on a CPU, between two events on a GPU.
    """
    clocks = {name: _clock(call, device) for name, call in calls.items()}
    settling = 0.0 if device.type == "cuda" else SETTLING
    with _undisturbed():
        expected = {name: _expected(clock) for name, clock in clocks.items()}
        times = {name: int(min(most, max(least, seconds / once))) for name, once in expected.items()}
        bursts = {name: max(1, min(times[name] // least, int(settling / once))) for name, once in expected.items()}
        turns = {name: math.ceil(times[name] / bursts[name]) for name in calls}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        order, rounds = random.Random(0), max(turns.values(), default=0)
        for number in range(rounds):
            due = [name for name, n in turns.items() if (number + 1) * n // rounds > number * n // rounds]
            for name in order.sample(due, len(due)):
                if expected[name] < LONG * settling:
                    _settle(clocks[name], settling)
                left = times[name] - len(samples[name])
                samples[name] += [clocks[name]() for _ in range(min(left, bursts[name]))]
    return samples


def _expected(clock: Callable[[], float]) -> float:
    """Returns about how long a call takes; its first ones load what torch needs."""
    first = clock()
    return first if first > 0.3 else min(clock() for _ in range(3))


def _settle(clock: Callable[[], float], seconds: float) -> None:
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        clock()


def keep_memory() -> None:
    """Has this process keep what it frees, on Linux with glibc, where large blocks go back to the system at once.

    A call would else be timed with the page faults of its results, which take several times as long as some kernels.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_memory_back() -> None:
    """Gives what is free back to the system."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


@contextmanager
def _undisturbed():
    """No garbage collection inside."""
    gc.collect()
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _clock(call: Callable[[], object], device: torch.device) -> Callable[[], float]:
    return _EventClock(call, device) if device.type == "cuda" else functools.partial(_wall, call)


def _wall(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


class _EventClock:
    """Times what a call queues on the GPU, without the gaps that the host would leave between launches."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self.call, self.device = call, device
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.spin = 0.0

    def __call__(self) -> float:
        torch.cuda.synchronize(self.device)
        if self.spin:
            torch.cuda._sleep(int(self.spin * _spin_rate(self.device)))
        queued = time.perf_counter()
        self.start.record()
        self.call()
        self.end.record()
        self.spin = min(LONGEST_SPIN, 2 * (time.perf_counter() - queued))
        self.end.synchronize()
        return self.start.elapsed_time(self.end) / 1e3


@functools.cache
def _spin_rate(device: torch.device) -> float:
    """Returns how many of the cycles that `torch.cuda._sleep` counts pass in a second."""
    cycles, (start, end) = 10_000_000, (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first one loads it
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize(device)
    return cycles / (start.elapsed_time(end) / 1e3)


def host_seconds(call: Callable[[], object], device: torch.device, seconds: float = 1.0, most: int = 10) -> float:
    """Returns the median wall-clock time from an idle GPU, before the call, to an idle GPU after it."""

    def waited() -> None:
        call()
        torch.cuda.synchronize(device)

    torch.cuda.synchronize(device)
    first = _wall(waited)
    return median([first, *(_wall(waited) for _ in range(min(most, int(seconds / first))))])


def launches(call: Callable[[], object], device: torch.device) -> int | None:
    """Returns how many kernels, copies and fills a call starts on the GPU; None where the profiler saw none."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize(device)
    # Named ranges lie on the GPU's time, too, and start nothing.
    named = "is_user_annotation"
    events = [event for event in profiled.events() if not getattr(event, named, False)]
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events) or None


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures what the machine gives in this process: a large product in `dtype`, a large copy."""
    side, count = (8192, 1 << 30) if device.type == "cuda" else (2048, 1 << 28)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(count // 4, device=device)
    target = torch.empty_like(source)
    samples = interleaved({"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, device, least=5, most=20)
    product, copy = (median(samples[name]) for name in ("product", "copy"))
    return Ceilings(2 * side**3 / product, 2 * count / copy)
