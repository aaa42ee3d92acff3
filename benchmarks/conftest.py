"""Where benchmarks run, and the sizes that end in minutes there."""

import pytest
import torch


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
    }

    def run(function, *arguments, rounds=None):
        def call():
            result = function(*arguments)
            if device == "cuda":
                torch.cuda.synchronize()
            return result

        return benchmark(call) if rounds is None else benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)

    return run
