"""`scripts/gpu_bench.sh` and `benchmarks/worst.py`: steps that fail or take too long stop nothing, and all is said."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from result_file import Entry

pytest.importorskip("triton")
pytest.importorskip("psutil")

import worst

ROOT = Path(__file__).resolve().parents[2]
STEPS = ["tests", "small", "paper", "tune", "worst"]
# Stands in for Python: no GPU and no pytest-xdist, tests that fail, benchmarks that do not end.
STAND_IN = """#!/bin/sh
case "$*" in
    -c*) exit 1 ;;
    *tests/weights*) echo "1 failed"; exit 1 ;;
    *--cases*) exec sleep 60 ;;
    *) echo "called with $*" ;;
esac
"""


def gpu_bench(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script with no GPU in sight."""
    return subprocess.run(
        [ROOT / "scripts" / "gpu_bench.sh", *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def results(summary: str) -> dict[str, str]:
    """Returns what a summary says of each step."""
    lines = [line.split(None, 3) for line in summary.splitlines()[1:-1]]
    return {name: result for name, _seconds, _limit, result in lines}


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_folder_must_be_named() -> None:
    done = gpu_bench()
    assert (done.returncode, done.stderr) == (2, "usage: scripts/gpu_bench.sh OUTDIR\n")


def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    done = gpu_bench(tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.endswith("finds no GPU with torch; GPU_BENCH_CPU=1 tries the script on the CPU\n")
    assert not list(tmp_path.iterdir())


def test_an_interpreter_without_torch_is_told_from_one_without_a_gpu(tmp_path: Path) -> None:
    done = gpu_bench(tmp_path, PYTHON=str(executable(tmp_path / "python", "#!/bin/sh\nexit 3\n")))
    assert done.returncode == 2
    assert "has no torch; PYTHON names another" in done.stderr


def test_steps_that_fail_or_do_not_end_stop_nothing(tmp_path: Path) -> None:
    python, out = executable(tmp_path / "python", STAND_IN), tmp_path / "out"
    done = gpu_bench(out, PYTHON=str(python), GPU_BENCH_CPU="1", BUDGET_SECONDS="8")
    assert done.returncode == 1
    assert (out / "summary.txt").read_text() == done.stdout
    late = "out of time"
    assert results(done.stdout) == dict(zip(STEPS, ["failed (1): 1 failed", late, late, "well", "well"], strict=True))
    assert done.stdout.splitlines()[-1] == "3 of 5 steps failed"
    log = (out / "log.txt").read_text()
    assert [line.split()[1] for line in log.splitlines() if line.startswith("==>")] == [f"{name}:" for name in STEPS]
    assert f"called with benchmarks/worst.py {out}" in log


def test_without_time_nothing_begins(tmp_path: Path) -> None:
    python = executable(tmp_path / "python", STAND_IN)
    done = gpu_bench(tmp_path / "out", PYTHON=str(python), GPU_BENCH_CPU="1", BUDGET_SECONDS="0")
    assert done.returncode == 1
    assert results(done.stdout) == dict.fromkeys(STEPS, "not begun: no time left")
    assert done.stdout.splitlines()[-1] == "5 of 5 steps failed"


def test_all_of_it_on_the_smallest_sizes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gpu_bench(out, GPU_BENCH_CPU="1", BUDGET_SECONDS="240", TRITON_CACHE_DIR=str(tmp_path / "cache"))
    log = (out / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + log
    assert results(done.stdout) == dict.fromkeys(STEPS, "well")
    files = {path.name for path in out.iterdir()}
    assert files == {"log.txt", "summary.txt", *(f"{name}.json" for name in STEPS[:-1])}
    for name in ("small", "paper"):
        rooms = {one["extra_info"]["room"] for one in json.loads((out / f"{name}.json").read_text())["benchmarks"]}
        assert rooms == {"weights"}
    assert json.loads((out / "tests.json").read_text())["failed"] == 0
    assert json.loads((out / "tune.json").read_text())["results"]
    assert "weights | tiny: " in log
    assert "weights_token[balanced]" in log


@pytest.fixture
def entry() -> Callable[..., Entry]:
    def make(room: str, of_ceiling: float, role: str = "ours", axis: dict[str, object] | None = None) -> Entry:
        facts = {"floor": of_ceiling, "axis": axis}
        return Entry(room, "tiny", "any", role, median=1.0, spread=None, memory=None, facts=facts)

    return make


def test_the_worst_is_ours_and_a_kernel(entry: Callable[..., Entry]) -> None:
    expected = entry("focus", 0.3)
    found = [
        entry("weights", 0.4),
        expected,
        entry("focus", 0.1, role="peer"),
        entry("training step", 0.01),
        entry("weights", 0.02, axis={"name": "T", "value": 512}),
    ]
    assert worst.worst(found) is expected
    assert worst.worst(found[2:]) is None


def test_a_folder_without_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worst.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: expected entries of ours in small.json or paper.json, found none" in capsys.readouterr().err


def test_ncu_profiles_the_call(
    tmp_path: Path, entry: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    executable(tmp_path / "ncu", '#!/bin/sh\nfor last; do :; done\necho "ncu $1, last $last"\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert worst.profile(entry("focus", 0.3), tmp_path / "worst.ncu-rep") == 0
    assert capfd.readouterr().out == "ncu --set, last tiny\nncu --import, last details\n"
    executable(tmp_path / "ncu", "#!/bin/sh\nexit 9\n")
    assert worst.profile(entry("focus", 0.3), tmp_path / "worst.ncu-rep") == 9


def test_what_kernels_take_is_printed_though_ncu_fails(
    tmp_path: Path, entry: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []
    monkeypatch.setattr(worst, "entries", lambda _: [entry("focus", 0.3)])
    monkeypatch.setattr(worst.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(worst, "profile", lambda *_: 9)
    monkeypatch.setattr(worst, "resources", lambda room: printed.append(room) or 0)
    assert worst.main([str(tmp_path)]) == 1
    assert printed == ["focus"]


def test_without_ncu_it_says_so(
    entry: Callable[..., Entry], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert worst.profile(entry("focus", 0.3), tmp_path / "worst.ncu-rep") == 0
    assert "ncu is not on the PATH" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_profiled_call_runs() -> None:
    worst.call("weights", "tiny")
