"""A pytest plugin: a test whose kernels broke the CUDA context fails by itself, and takes no other with it.

An illegal access is sticky: it shows at a later call, and every call after it fails. So each test waits for the GPU,
and a process whose context is lost runs no more tests: pytest-xdist starts another worker, a session without it ends.
"""

import os
from collections.abc import Iterator

import pytest
import torch

LOST = "the CUDA context is lost"


def context_is_lost() -> bool:
    """Whether the CUDA context of this process answers with an error twice; an error that is not sticky shows once."""
    if not torch.cuda.is_initialized():
        return False
    for _ in range(2):
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            continue
        return False
    return True


@pytest.fixture(autouse=True)
def fault_of_this_test() -> Iterator[None]:
    """Waits for the GPU after each test, so that a fault is that test's error."""
    yield
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ends the worker, or without pytest-xdist the session, after the reports of a test that lost the context."""
    result = yield
    if context_is_lost():
        if hasattr(item.config, "workerinput"):
            os._exit(1)
        item.session.shouldfail = f"{LOST} since {item.nodeid}"
    return result
