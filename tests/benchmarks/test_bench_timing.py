"""Calls are timed in turns; an imitation of a GPU shows what happens around each call there."""

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import timing

CPU = torch.device("cpu")


def test_calls_take_turns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "SETTLING", 0.0)
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.001)) for name in "abc"}
    samples = timing.interleaved(calls, CPU, seconds=0.03, least=5, most=20)
    rounds = {name: len(times) for name, times in samples.items()}
    assert all(5 <= n <= 20 for n in rounds.values())
    # After the first calls, no call runs many times in a row: a round holds each of them.
    timed = order[len(order) - sum(rounds.values()) :]
    positions = [i for i, name in enumerate(timed) if name == "a"]
    assert max(b - a for a, b in itertools.pairwise(positions)) <= 2 * len(calls)
    assert {"".join(timed[i : i + 3]) for i in range(0, len(timed) - 2, 3)} != {"abc"}  # shuffled


def test_a_slow_call_gets_few_turns_spread_over_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timing, "SETTLING", 0.0)
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02)

    samples = timing.interleaved({"slow": slow, "fast": lambda: order.append("fast")}, CPU, 0.06, least=2, most=50)
    assert 2 <= len(samples["slow"]) <= 4
    assert len(samples["fast"]) == 50
    assert min(samples["slow"]) >= 0.02
    timed = order[-(len(samples["slow"]) + 50) :]
    first, last = timed.index("slow"), len(timed) - 1 - timed[::-1].index("slow")
    assert last - first >= 15  # not all at one end


def test_what_one_call_leaves_behind_is_not_charged_to_the_next():
    """A call that makes others slow for some milliseconds, as threads that spin on do."""
    ended = -1.0

    def leaves_threads_spinning():
        nonlocal ended
        time.sleep(0.001)
        ended = time.perf_counter()

    def victim():
        time.sleep(0.003 if time.perf_counter() - ended < 0.005 else 0.001)

    calls = {"one": leaves_threads_spinning, "other": victim}
    samples = timing.interleaved(calls, CPU, seconds=0.05, least=5)
    assert len(samples["other"]) >= 5
    assert sorted(samples["other"])[len(samples["other"]) // 2] < 0.0025


def test_short_calls_are_timed_several_times_a_turn():
    order = []
    calls = {name: lambda name=name: (order.append(name), time.sleep(0.001)) for name in "ab"}
    samples = timing.interleaved(calls, CPU, seconds=0.06, least=3, most=30)
    assert all(10 <= len(times) <= 30 for times in samples.values())
    turns = [len(list(same)) for _, same in itertools.groupby(order)]
    assert len(turns) >= 6  # three at least of each


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list:
    """A GPU whose clock is the host's and which does at once what is queued; returns what was asked of it."""
    asked = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            asked.append("record")
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            asked.append("wait")

        def elapsed_time(self, other: "Event") -> float:
            return (other.at - self.at) * 1e3

    def spin(cycles: int) -> None:
        asked.append("spin")
        time.sleep(cycles * 1e-9)  # a billion cycles a second

    monkeypatch.setattr(
        torch,
        "cuda",
        SimpleNamespace(Event=Event, synchronize=lambda _: asked.append("synchronize"), _sleep=spin),
    )
    timing._spin_rate.cache_clear()
    yield asked
    timing._spin_rate.cache_clear()


def test_a_gpu_is_timed_between_events_behind_a_spin(gpu: list):
    samples = timing.interleaved(
        {"call": lambda: (gpu.append("call"), time.sleep(0.002))}, torch.device("cuda"), seconds=0.01, least=3, most=3
    )
    assert all(0.002 <= seconds < 0.05 for seconds in samples["call"])
    # The last call: the GPU is idle, then busy while the host queues; then both events around the call alone.
    assert gpu[-6:] == ["synchronize", "spin", "record", "call", "record", "wait"]


def test_host_time_is_from_idle_to_idle(gpu: list):
    seconds = timing.host_seconds(lambda: gpu.append("call"), torch.device("cuda"), most=3)
    assert gpu == ["synchronize", *["call", "synchronize"] * 4]
    assert 0 < seconds < 0.1


def test_host_time_of_slow_calls_is_taken_once(gpu: list):
    timing.host_seconds(lambda: time.sleep(0.02), torch.device("cuda"), seconds=0.01)
    assert gpu == ["synchronize"] * 2


def test_ceilings_are_those_of_this_machine():
    found = timing.ceilings(CPU, torch.float32)
    assert 1e8 < found.flops < 1e14
    assert 1e8 < found.bandwidth < 1e13
    assert timing.ceilings(CPU, torch.float32) is found  # measured once
