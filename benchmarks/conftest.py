"""Where benchmarks run, and the sizes that end in minutes there."""

import os

import pytest
import torch

from vgpo_kernels import _native


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU where there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def timed(benchmark, device):
    """Times a call to its end, also on a GPU, and records what ran it; calls of seconds only `rounds` times."""
    benchmark.extra_info |= {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        # Instruction sets: torch's, its BLAS's where it is told, and ours.
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "mkl_instructions": os.environ.get("MKL_ENABLE_INSTRUCTIONS", "any"),
        "native": _native.missing() or _native.capability(),
    }

    def run(function, *arguments, rounds=None):
        def call():
            result = function(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        if rounds is not None:
            return benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        # The first calls of a process load what torch needs, and the number of rounds is taken from a first one.
        for _ in range(3):
            call()
        return benchmark(call)

    return run
