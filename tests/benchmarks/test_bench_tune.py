"""`benchmarks/tune.py`: what it compiles, what it lets through to the clock, and how it sorts."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("psutil")

from benchmarks import tune, tune_timing
from benchmarks.harness import cases as harness
from vgpo_kernels import _compile, _tuning

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script as a user does, with Triton compiling, not interpreting, without a GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tune.py", *map(str, arguments)],
        env=inherited | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_without_a_gpu_it_compiles_and_says_so(tmp_path: Path) -> None:
    report = tmp_path / "tune.json"
    done = run("--kernel", "weights group", "--target", "sm_90", "--json", report, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("Compiled only: there is no GPU.\n")
    assert "weights group on sm_90, compiled as weights_group[balanced]" in done.stdout
    found = json.loads(report.read_text())
    assert found["timed"] is False
    assert {"machine", "versions", "commit", "dirty"} <= set(found)
    candidates = _tuning.configs()["weights group"].candidates["sm_90"]
    assert [result["tiles"] for result in found["results"] if not result["present"]] == list(candidates)
    assert [result["present"] for result in found["results"]] == [True] + [False] * len(candidates)
    for result in found["results"]:
        assert 16 <= result["registers"] <= 128
        assert (result["stack"], result["error"], result["seconds"]) == (0, None, {})
        assert f"  {result['registers']}  " in done.stdout


def test_the_interpreter_tunes_nothing() -> None:
    done = run("--compile-only", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "unset it to compile" in done.stderr


def test_an_unknown_kernel_is_refused() -> None:
    done = run("--kernel", "attention of a whale")
    assert done.returncode == 2
    assert "invalid choice: 'attention of a whale'" in done.stderr
    assert "attention mass" in done.stderr


def test_every_kernel_has_a_task_with_the_papers_cases() -> None:
    assert set(tune_timing.TASK_OF) == set(_tuning.configs())
    for name in set(tune_timing.TASK_OF.values()):
        task = tune_timing.task_named(name)
        assert [case.name[0] for case in tune_timing.timed_cases(task)] == ["1", "4"]
        assert {harness.OURS, harness.PLAIN} <= set(task.providers)
        assert tune_timing.checked_case(task).kind == "cpu"


class Inputs(NamedTuple):
    """What the stand-in doubles."""

    x: Tensor


@pytest.fixture
def marble(monkeypatch: pytest.MonkeyPatch) -> harness.Task:
    """A kernel that doubles: right with blocks of 16, 32 and 64, wrong in one element with 8, broken with 4."""
    monkeypatch.setattr(_tuning, "_configs", dict(_tuning.configs()))
    monkeypatch.setattr(harness, "TASKS", {})
    monkeypatch.setitem(tune_timing.TASK_OF, "marble", "cut marble")

    @_tuning.tunable("marble", case="none", candidates={})
    def marble_tiles() -> dict[str, int]:
        return {"BLOCK": 64}

    def double(given: Inputs) -> Tensor:
        block = marble_tiles()["BLOCK"]
        if block == 4:
            raise RuntimeError("no such block\nthe rest of a long message")
        doubled = given.x * 2
        doubled[0] += 1e-4 if block == 8 else 0.0
        return doubled

    sizes = {"n": 1000}
    return harness.Task(
        "cut marble",
        cases=[
            harness.Case("a slab", ("small",), sizes, kind="cpu"),
            *(harness.Case(name, ("paper",), sizes, kind="cuda") for name in ("1: a block", "2: two", "4: a quarry")),
        ],
        inputs=lambda case, device: Inputs(torch.linspace(0, 1, case["n"], device=device)),
        providers={
            harness.OURS: harness.Provider(double, "ours"),
            harness.PLAIN: harness.Provider(lambda given: given.x + given.x, "ours, plain"),
        },
        work=lambda case: harness.Work(0.0, 8.0 * case["n"]),
    )


def results_of(*blocks: int, error: str | None = None) -> list[tune.Result]:
    """Returns results of tiles of the stand-in, the present choice first, that compiled well (but for `error`)."""
    made = []
    for index, block in enumerate(blocks):
        attempt = _compile.Attempt(_tuning.configs()["marble"], "sm_90", {"BLOCK": block})
        row = _compile.Row("none", "sm_90", 40, 0, None, 1024, error if index else None)
        made.append(tune.Result(attempt, present=index == 0, row=row, error=row.error))
    return made


@pytest.mark.usefixtures("marble")
def test_what_is_wrong_or_broken_is_not_timed() -> None:
    right, fine, wrong, broken = results = results_of(64, 16, 8, 4)
    tune.time_them(results, tune_timing.Timing(CPU, "sm_90", seconds=1e-3))
    assert wrong.error is not None
    assert wrong.error.startswith("WRONG: AssertionError: result 0: error 1")
    assert broken.error == "WRONG: RuntimeError: no such block"
    assert wrong.seconds == broken.seconds == {}
    assert [*fine.seconds] == ["1: a block", "4: a quarry"]
    assert right.ratios == dict.fromkeys(right.seconds, 1.0)
    for case, seconds in fine.seconds.items():
        assert fine.ratios[case] == pytest.approx(seconds / right.seconds[case])
    assert [tune.failed(result, compile_only=False) for result in results] == [False, False, True, True]


@pytest.mark.usefixtures("marble")
def test_nothing_is_timed_where_the_present_choice_is_broken() -> None:
    broken, candidate = results = results_of(4, 16)
    tune.time_them(results, tune_timing.Timing(CPU, "sm_90", seconds=1e-3))
    assert broken.error == "WRONG: RuntimeError: no such block"
    assert broken.seconds == candidate.seconds == {}
    assert tune.failed(broken, compile_only=False)


@pytest.mark.usefixtures("marble")
def test_what_spills_is_not_timed_and_no_fault_on_a_gpu() -> None:
    present, spilling = results = results_of(64, 16, error="spills registers")
    tune.time_them(results, tune_timing.Timing(CPU, "sm_90", seconds=1e-3))
    assert present.seconds
    assert not spilling.seconds
    assert not tune.failed(spilling, compile_only=False)
    assert tune.failed(spilling, compile_only=True)


@pytest.mark.usefixtures("marble")
def test_a_case_that_does_not_fit_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    timed = tune_timing.seconds_of

    def short_of_memory(kernel: str, task: Any, case: harness.Case, *rest: Any) -> dict[str, list[float]]:
        if case.name.startswith("4"):
            raise torch.OutOfMemoryError
        return timed(kernel, task, case, *rest)

    monkeypatch.setattr(tune_timing, "seconds_of", short_of_memory)
    results = results_of(64, 16)
    tune.time_them(results, tune_timing.Timing(CPU, "sm_90", seconds=1e-3))
    assert capsys.readouterr().out == "marble: out of memory at case 4: a quarry\n"
    assert [[*result.seconds] for result in results] == [["1: a block"]] * 2


@pytest.mark.usefixtures("marble")
def test_the_table_has_the_best_first() -> None:
    slow, present, fast, spilling = results_of(32, 64, 16, 4)
    present.present, slow.present, spilling.error = True, False, "spills registers"
    for result, seconds in ((slow, 3e-3), (present, 2e-3), (fast, 1e-3)):
        result.seconds, result.ratios = {"1: a block": seconds}, {"1: a block": seconds / 2e-3}
    ordered = sorted([slow, present, fast, spilling], key=lambda result: result.order)
    lines = tune.table(ordered).splitlines()
    assert lines[1] == "marble on sm_90, compiled as none"
    assert lines[2].split() == ["BLOCK", "registers", "stack", "spilled", "shared", "case", "1,", "ms", "ratio"]
    assert [line.split()[-2:] for line in lines[3:6]] == [["1.0000", "0.500"], ["2.0000", "1.000"], ["3.0000", "1.500"]]
    assert [line.startswith("*") for line in lines[3:]] == [False, True, False, False]
    assert lines[6].endswith("-  spills registers")


@pytest.mark.usefixtures("marble")
def test_each_kernel_and_target_takes_its_own_rows_of_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    def attempts(config: _tuning.Config, target: str) -> list[_compile.Attempt]:
        return [_compile.Attempt(config, target, {"BLOCK": block}) for block in (64, 16)]

    def rows(tried: list[_compile.Attempt], _jobs: int) -> Iterator[_compile.Row]:
        return (_compile.Row(one.config.case, one.target, one.tiles["BLOCK"]) for one in tried)

    monkeypatch.setattr(_compile, "attempts", attempts)
    monkeypatch.setattr(_compile, "attempted_rows", rows)
    configs = [_tuning.configs()[name] for name in ("marble", "weights group")]
    groups = list(tune.tuned(configs, ["sm_90", "sm_100"], None, 1))
    found = [(group[0].row.kernel, group[0].row.target, [result.row.registers for result in group]) for group in groups]
    expected = [(config.case, target, [64, 16]) for config in configs for target in ("sm_90", "sm_100")]
    assert found == expected
