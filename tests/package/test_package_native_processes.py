"""The CPU kernels in processes of their own: the environment's instruction set, and forks."""

import os
import subprocess
import sys

import pytest

from vgpo_kernels import _native

CAPABILITIES = [] if _native.missing() else _native.capabilities()
pytestmark = pytest.mark.skipif(not CAPABILITIES, reason="the CPU kernels are not built")


def run_fresh(code, **environment):
    """Runs Python code in a process of its own, and returns its status and what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize("name", CAPABILITIES)
def test_the_environment_chooses_the_capability(name):
    code = "from vgpo_kernels import _native; print(_native.capability())"
    assert run_fresh(code, VGPO_CPU_CAPABILITY=name)[:2] == (0, name)


def test_an_unknown_capability_in_the_environment():
    code = "from vgpo_kernels import _native; print(_native.capability())"
    status, _, error = run_fresh(code, VGPO_CPU_CAPABILITY="mmx")
    assert status == 1
    assert "ValueError: VGPO_CPU_CAPABILITY: expected one of 'portable'" in error
    assert "got 'mmx'" in error


FORK = """
import os
import torch
from vgpo_kernels import _native
torch.set_num_threads(2)
left, right, out = torch.randn(300, 300), torch.randn(300, 300), torch.empty(300, 300)
_native.call("product", out, left, right, False)
expected = out.numpy().tobytes()
child = os.fork()
out.numpy().fill(0)  # a parallel operation of torch would hang in the child, as it does after any other in the parent
_native.call("product", out, left, right, False)
same = out.numpy().tobytes() == expected
if child == 0:
    os._exit(0 if same else 1)
assert same
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_after_a_parallel_call():
    status, printed, error = run_fresh(FORK)
    assert (status, printed) == (0, "0"), error
