"""Peaks of memory: what is seen, and what is left out."""

import sys

import pytest
import torch
from torch import Tensor

from benchmarks.harness import memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_peak_is_what_a_call_takes_beyond_its_result():
    def call() -> Tensor:
        passing = torch.ones(25_000_000)  # 100 MB, gone at the end
        return passing[:10_000_000] * 2  # 40 MB, handed out

    peak = memory.resident_peak(call)
    assert 95e6 < peak < 125e6


@linux
def test_memory_that_was_there_before_is_not_counted():
    before = torch.ones(25_000_000)
    assert memory.resident_peak(lambda: before.sum()) < 5e6


@linux
def test_a_peak_in_a_process_of_its_own():
    # Dense torch makes a float32 copy of the states, ours reads them in place.
    given = ("benchmarks.tasks.test_focus", "focus", "T 2048")
    ours = memory.fresh_process_peak(*given, "vgpo_kernels")
    dense = memory.fresh_process_peak(*given, "dense torch")
    assert ours < 2e6 < 8e6 < dense


@linux
def test_what_fails_there_is_said_here():
    with pytest.raises(RuntimeError, match="KeyError: 'no such'"):
        memory.fresh_process_peak("benchmarks.tasks.test_focus", "focus", "tiny", "no such")


def test_bytes_of_counts_a_storage_once():
    x = torch.zeros(10, 10)
    assert memory.bytes_of((x, x[2:], {"y": [x.T, torch.zeros(5)]}, "text", 3)) == 400 + 20


def test_a_gpu_is_asked_for_its_allocators_peak(monkeypatch: pytest.MonkeyPatch):
    counts = {"now": 1000, "most": 0}

    def call() -> Tensor:
        counts["most"] = 6000
        return torch.zeros(100)

    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: counts.update(most=0))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: counts["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: counts["most"])
    assert memory.cuda_peak(call, torch.device("cuda")) == 6000 - 1000 - 400
