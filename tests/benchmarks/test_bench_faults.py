"""What a session does once a test has broken the CUDA context, and without hypothesis; what the smoke checks say."""

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_bench, smoke
from tests.tools import cuda_faults

pytest_plugins = ["pytester"]

FAULT = "CUDA error: an illegal memory access was encountered"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A context that answers with the errors in `errors`, one a wait, and once it is `lost` with one each time."""
    state = SimpleNamespace(errors=[], lost=False)

    def synchronize(*_: object) -> None:
        if state.lost or state.errors:
            raise RuntimeError(FAULT if state.lost else state.errors.pop())

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch, "gpu_of_this_test", state, raising=False)
    yield state
    state.lost = False  # before this session's own plugin looks


def test_a_context_is_lost_if_it_errs_twice(gpu: SimpleNamespace) -> None:
    assert not cuda_faults.context_is_lost()
    gpu.errors.append("invalid configuration")
    assert not cuda_faults.context_is_lost()
    gpu.lost = True
    assert cuda_faults.context_is_lost()


@pytest.mark.usefixtures("gpu")
def test_a_session_ends_after_the_test_that_lost_the_context(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        "import torch\n"
        "def test_before(): pass\n"
        "def test_breaks(): torch.gpu_of_this_test.lost = True\n"
        "def test_after(): pass\n"
    )
    found = pytester.runpytest_inprocess("-p", "tests.tools.cuda_faults")
    # The broken test passed; its fault showed when it was waited for.
    found.assert_outcomes(passed=2, errors=1)
    found.stdout.fnmatch_lines([f"*{FAULT}*", f"*{cuda_faults.LOST} since *::test_breaks*"])


def test_a_worker_of_xdist_ends_itself(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    item = SimpleNamespace(config=SimpleNamespace(workerinput={}), session=SimpleNamespace(), nodeid="a test")
    for gpu.lost in (False, True):
        hook: Iterator[None] = cuda_faults.pytest_runtest_protocol(item)
        next(hook)
        with pytest.raises(StopIteration):
            hook.send(True)
    assert ended == [1]


def test_without_hypothesis_property_tests_are_skipped(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(
        "import sys\n"
        "for name in [name for name in sys.modules if name.split('.')[0] == 'hypothesis']:\n"
        "    del sys.modules[name]\n"
        "sys.modules['hypothesis'] = None\n"
        "import without_hypothesis\n"
        "assert without_hypothesis.install()\n"
    )
    pytester.makepyfile(
        "import pytest\n"
        "from hypothesis import HealthCheck, given, settings\n"
        "from hypothesis import strategies as st\n"
        "@st.composite\n"
        "def drawn(draw): return draw(st.none() | st.floats(0, 1))\n"
        "PAIRS = st.tuples(*[st.sampled_from([1, 2])] * 2)\n"
        "@pytest.mark.parametrize('impl', ['one', 'other'])\n"
        "@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])\n"
        "@given(one=drawn(), pair=PAIRS, data=st.data())\n"
        "def test_property(impl, one, pair, data): raise AssertionError\n"
        "def test_plain(): pass\n"
    )
    found = pytester.runpytest_inprocess("-p", "no:hypothesispytest", "-rs")
    found.assert_outcomes(passed=1, skipped=2)
    found.stdout.fnmatch_lines(["*hypothesis is not installed*"])


@pytest.fixture
def checks() -> dict:
    """Two checks that keep to the budget, one that does not, one that raises, one that cannot run."""
    one, exact = torch.ones(3), torch.ones(3, dtype=torch.float64)

    def raising(_: torch.dtype) -> Iterator[tuple]:
        yield "first", one, one, exact
        raise ZeroDivisionError("no such kernel\nat all")

    def absent(_: torch.dtype) -> Iterator[tuple]:
        raise smoke.LeftOut("for GPUs alone")
        yield

    return {
        "right": lambda _: iter([("first", one, one, exact)]),
        "wrong": lambda _: iter([("first", one, one, exact), ("second", one + 1e-3, one, exact)]),
        "raising": raising,
        "absent": absent,
    }


def test_smoke_says_of_each_check_what_came_of_it(checks: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert smoke.run(checks, list(checks), ["float16"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "right, float16: well" in lines
    assert any(line.startswith("wrong, float16: second: error 1.000e-03 above the budget") for line in lines)
    assert "raising, float16: after first: ZeroDivisionError: no such kernel" in lines
    assert "absent, float16: left out, for GPUs alone" in lines
    assert lines[-1] == "failed: wrong, float16; raising, float16"
    assert smoke.run(checks, ["right", "absent"], ["float16"]) == 0


def test_smoke_goes_on_in_another_process_once_the_context_is_lost(
    checks: dict, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started = []
    monkeypatch.setattr(smoke.subprocess, "run", lambda command: started.append(command[3:]))
    gpu.lost = True
    assert smoke.run(checks, ["raising", "right", "absent"], ["float16"]) == 1
    assert started == [["right", "absent", "--dtype", "float16"]]
    assert "raising" in capsys.readouterr().out.splitlines()[-1]


def test_the_script_asks_for_checks_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setitem(smoke.DTYPES, "bfloat16", torch.bfloat16)
    monkeypatch.setattr(smoke, "run", lambda known, names, dtypes: asked.append((len(known), names, dtypes)) or 0)
    call = gpu_bench.Call(Path(), (), Path(), trial=False)
    for step in gpu_bench.smoke(call):
        arguments = step.command[step.command.index("benchmarks/smoke.py") + 1 :]
        assert smoke.main(arguments) == 0
    count = len(smoke.checks())
    everything, racing = list(smoke.checks()), ["weights", "policy loss of logits"]
    assert asked == [
        (count, everything, list(smoke.DTYPES)),
        (count, everything, ["bfloat16"]),
        (count, racing, ["bfloat16"]),
    ]


def test_every_task_of_the_benchmarks_has_a_smoke_check() -> None:
    from benchmarks.harness import cases as harness

    smoke.task_named("weights")
    for name in smoke.TASK_OF.values():
        smoke.task_named(name)
    assert set(harness.TASKS) - {"training step"} <= set(smoke.checks())
