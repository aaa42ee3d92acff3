"""`scripts/gpu_bench.sh` and `benchmarks/worst.py`: steps that fail or take too long stop nothing, and all is said."""

import json
import os
import re
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_bench, gpu_steps
from benchmarks.gpu_steps import CLOCKS_HEAD, Clocks, Step

pytest.importorskip("triton")
pytest.importorskip("psutil")

from benchmarks import tune_timing, worst

ROOT = Path(__file__).resolve().parents[2]
# As much of the tree as the steps below need, without .git.
COPIED = ("benchmarks/**/*.py", "scripts/gpu_bench.sh", "tests/*.py", "tests/tools/*.py", "pyproject.toml")
KILLS_ITSELF = "import os, signal\n\n\ndef test_kills():\n    os.kill(os.getpid(), signal.SIGKILL)\n"


def script(root: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the script without a GPU."""
    return subprocess.run(
        [root / "scripts" / "gpu_bench.sh", *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""} | environment,
        capture_output=True,
        text=True,
        timeout=560,
    )


def results(summary: str) -> dict[str, str]:
    """Returns what a summary says of each step."""
    lines = [re.match(r"(\w+/\S+(?: \S+)*) +\d+ +\d+  (.*)", line) for line in summary.splitlines()]
    return {line[1]: line[2] for line in lines if line}


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def step(name: str, code: str, **rest: object) -> Step:
    return Step(name, ["sh", "-c", code], 1, **rest)


@pytest.fixture
def stoppable() -> Iterator[list[str]]:
    """The signals that this process was told to stop by, as a call of the script takes them."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    gpu_steps.stop_at_signals()
    yield gpu_steps.STOPPED
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
    gpu_steps.STOPPED.clear()


def test_a_folder_must_be_named() -> None:
    done = script(ROOT)
    assert (done.returncode, done.stderr) == (2, "usage: scripts/gpu_bench.sh OUT [STAGE...]\n")


def test_without_a_gpu_it_refuses(tmp_path: Path) -> None:
    done = script(ROOT, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu_bench: no GPU is found with torch; GPU_BENCH_CPU=1 tries the script on the CPU\n"
    assert not list(tmp_path.iterdir())


def test_a_copy_without_git_with_a_test_that_kills_its_process(tmp_path: Path) -> None:
    root, out = tmp_path / "copy", tmp_path / "out"
    for pattern in COPIED:
        for path in ROOT.glob(pattern):
            copy = root / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    (root / "vgpo_kernels").symlink_to(ROOT / "vgpo_kernels")
    for folder, text in (("weights", KILLS_ITSELF), ("focus", "def test_passes():\n    pass\n")):
        (root / "tests" / folder).mkdir()
        (root / "tests" / folder / "test_one.py").write_text(text)
    environment = {"GPU_BENCH_CPU": "1", "BUDGET_SECONDS": "500", "OMP_NUM_THREADS": "1"}
    done = script(root, out, "tests/weights", "tests/focus", "small/weights", **environment)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (out / "summary.txt").read_text() == done.stdout
    killed = "killed by SIGKILL" if "xdist" not in (out / "log.txt").read_text() else "failed (1)"
    found = results(done.stdout)
    assert found.pop("tests/weights").startswith(killed), done.stdout
    assert all(result.startswith("well: ") for result in found.values()), (out / "log.txt").read_text()
    assert list(found) == ["tests/focus", "small/weights"]
    assert "commit unknown: there is no .git, and VGPO_COMMIT names none" in done.stdout
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"tests/weights: {killed}")
    assert killed == "failed (1)" or last.endswith("tests/weights/test_one.py::test_kills")
    record = json.loads((out / "tests.json").read_text())
    assert (record["passed"], record["commit"], record["paths"][-1]) == (1, "unknown", "tests/focus/test_one.py")
    measured = json.loads((out / "small.json").read_text())
    assert {one["provider"] for one in measured["entries"]} >= {"vgpo_kernels", "token loop"}
    assert measured["tests"]["passed"] == 1


@pytest.mark.usefixtures("stoppable")
def test_steps_that_fail_or_do_not_end_stop_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, first, second = tmp_path / "out", tmp_path / "first.json", tmp_path / "second.json"
    out.mkdir()
    first.write_text('{"benchmarks": [1], "changed_meanwhile": false}')
    (tmp_path / "late").write_text('{"benchmarks": [2], "changed_meanwhile": true}')
    steps = [
        step("small/whole", "echo", part=first),
        # As pytest does, it writes what it has when it is interrupted.
        step("small/late", f"trap 'mv {tmp_path}/late {second}; exit 2' INT; echo half of it; sleep 60", part=second),
        step("small/red", "echo 'why it failed\n\n'; exit 3", part=tmp_path / "absent.json"),
        step("small/absent", "", left_out="there is no such tool"),
        step("small/last", "echo $TOLD", environment={"TOLD": "=== what it was told in 0.5s ==="}),
    ]
    assert gpu_bench.run_all(steps, out, time.monotonic() + 35, "a title") == 1
    text = capsys.readouterr().out
    assert text == (out / "summary.txt").read_text()
    assert text.startswith("a title\n")
    assert results(text) == {
        "small/whole": "well",
        "small/late": "out of time: half of it",
        "small/red": "failed (3): why it failed",
        "small/absent": "left out: there is no such tool",
        "small/last": "well: what it was told in 0.5s",
    }
    assert "of 5 steps 2 failed, 0 did not begin\n\nsmall/late: out of time: half of it\n" in text
    assert text.splitlines()[-1] == "small/red: failed (3): why it failed"
    assert json.loads((out / "small.json").read_text()) == {"benchmarks": [1, 2], "changed_meanwhile": True}
    assert "==> small/last:" in (out / "log.txt").read_text()
    assert "what it was told" in (out / "log.txt").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_the_call_and_keeps_what_there_is(
    number: signal.Signals, stoppable: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, ready = tmp_path / "part.json", tmp_path / "ready"
    (tmp_path / "late").write_text('{"benchmarks": [1]}')
    code = f"trap 'mv {tmp_path}/late {part}; exit 2' INT; echo half of it; touch {ready}; sleep 60"

    def send() -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    steps = [step("small/cut", code, part=part), step("small/next", "echo")]
    assert gpu_bench.run_all(steps, tmp_path, time.monotonic() + 60, "") == 1
    assert stoppable == [number.name]
    assert results(capsys.readouterr().out) == {
        "small/cut": f"interrupted by {number.name}: half of it",
        "small/next": f"not begun: the call was ended by {number.name}",
    }
    assert json.loads((tmp_path / "small.json").read_text()) == {"benchmarks": [1]}


WORKERS = """[gw0] [ 25%] PASSED tests/one.py::test_quick[0 1]
tests/one.py::test_fails
[gw1] [ 50%] FAILED tests/one.py::test_fails
tests/one.py::test_hangs
tests/one.py::test_quick[2]
[gw0] [ 75%] PASSED tests/one.py::test_quick[2]"""


@pytest.mark.usefixtures("stoppable")
def test_a_late_step_names_the_test_that_hangs_on_a_worker_and_why_others_failed(tmp_path: Path) -> None:
    code = f"trap 'echo FAILED tests/one.py::test_fails - 1 == 2; exit 2' INT; echo '{WORKERS}'; sleep 60"
    outcome = gpu_steps.run(step("tests/one", code), 1, tmp_path / "log.txt")
    assert outcome.result == "out of time: tests/one.py::test_hangs"
    assert outcome.lines[0] == "FAILED tests/one.py::test_fails - 1 == 2"


def test_without_time_nothing_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_bench.run_all([step("tests/one", "")], tmp_path, time.monotonic(), "") == 1
    assert results(capsys.readouterr().out) == {"tests/one": "not begun: no time left"}


def test_records_of_several_folders_are_one() -> None:
    old = {"green": True, "dirty": False, "passed": 3, "paths": ["a"], "commit": "c", "seconds": 1.5}
    new = {"green": False, "dirty": True, "passed": 4, "paths": ["b"], "commit": "c", "seconds": 2.0}
    expected = {"green": False, "dirty": True, "passed": 7, "paths": ["a", "b"], "commit": "c", "seconds": 3.5}
    assert gpu_bench.merged(old, new) == expected


def test_clocks_are_noted_with_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable(
        tmp_path / "nvidia-smi", '#!/bin/sh\nwhile :; do echo "1500, 2619, 300.5, 700, 50, 99"; sleep 0.1; done\n'
    )
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with Clocks(tmp_path / "clocks.csv") as clocks:
        clocks.step = "small/mass"
        deadline = time.monotonic() + 30
        while "small/mass" not in (tmp_path / "clocks.csv").read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
    head, *rows = (line.split(",") for line in (tmp_path / "clocks.csv").read_text().splitlines())
    assert tuple(head) == CLOCKS_HEAD
    assert rows[-1][1:] == ["small/mass", "1500", "2619", "300.5", "700", "50", "99"]


def test_out_holds_no_more_files_than_can_be_taken(tmp_path: Path) -> None:
    names = [*gpu_bench.FILES, "log.txt", "worst.ncu-rep"]
    for name in names:
        (tmp_path / name).write_text(name)
    gpu_bench.bundle(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*gpu_bench.FILES, "rest.tar"}
    with tarfile.open(tmp_path / "rest.tar") as archive:
        assert archive.getnames() == ["log.txt", "worst.ncu-rep"]
    (tmp_path / "log.txt").write_text("a later call's")
    gpu_bench.bundle(tmp_path)
    assert len(list(tmp_path.iterdir())) == gpu_bench.MOST_FILES


def test_stages_hold_every_task_and_every_kernel_with_tiles() -> None:
    text = {path.name: path.read_text() for path in (ROOT / "benchmarks/tasks").glob("test_*.py")}
    entries = {
        f"{name}::{one}" for name, code in text.items() for one in re.findall(r"^def (test_\w+)\(entry\)", code, re.M)
    }
    assert entries == {node for node, _ in gpu_bench.TASKS.values()}
    assert set(gpu_bench.TILES) == set(tune_timing.TASK_OF)
    files = [path for folder in gpu_bench.TEST_FOLDERS for path in gpu_bench.gpu_test_files(folder)]
    assert {"tests/attention/test_attention_mass_kernels.py", "tests/weights/test_weights_kernels.py"} < set(files)
    assert not [path for path in files if "native" in path or "reference" in path or "errors" in path]


@pytest.fixture
def call(tmp_path: Path) -> gpu_bench.Call:
    return gpu_bench.Call(tmp_path / "out", (tmp_path / "first", tmp_path / "second"), tmp_path, trial=True)


def test_a_step_is_named_by_its_stage(call: gpu_bench.Call) -> None:
    found = gpu_bench.chosen(call, ["small/mass", "tiles/attention forward", "worst"])
    assert [one.name for one in found] == ["small/mass", "tiles/attention forward", "worst/kernel"]
    with pytest.raises(ValueError, match=r"STAGE: expected of smoke, tests, .*, got 'all'"):
        gpu_bench.chosen(call, ["all"])
    with pytest.raises(ValueError, match=r"STAGE: expected small or one of small/mass, .*, got 'small/none'"):
        gpu_bench.chosen(call, ["small/none"])


def test_the_calls_of_the_docs_fit_their_budget(call: gpu_bench.Call) -> None:
    page = (ROOT / "docs/dev/benchmarks.md").read_text().replace("\\\n", "")
    calls = [shlex.split(asked) for asked in re.findall(r"gpu_bench.sh (?:first|second|third) (.*)", page)]
    assert len(calls) == 3
    for asked in calls:
        assert sum(step.seconds for step in gpu_bench.chosen(call, asked)) <= 540, asked


def test_what_an_earlier_call_left_whole_is_found(call: gpu_bench.Call) -> None:
    call.earlier[0].mkdir()
    (call.earlier[0] / "tests.json").write_text('{"green": tr')
    for folder in (call.earlier[1], call.out):
        folder.mkdir()
        (folder / "tests.json").write_text("{}")
        (one,) = gpu_bench.chosen(call, ["small/mass"])
        assert one.environment["VGPO_TESTS_RECORD"] == str(folder / "tests.json")
    assert gpu_bench.worst(call)[0].command[-3:] == [str(call.out), *map(str, call.earlier)]


def test_compute_sanitizer_is_looked_for_beside_cuda(
    call: gpu_bench.Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert "compute-sanitizer is not on the PATH" in gpu_bench.smoke(call)[1].left_out
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    tool = executable(tmp_path / "cuda" / "bin" / "compute-sanitizer", "")
    memcheck = gpu_bench.smoke(call)[1]
    assert memcheck.left_out is None
    assert memcheck.command[:3] == [str(tool), "--tool", "memcheck"]


@pytest.fixture
def entry() -> Callable[..., SimpleNamespace]:
    def make(task: str, share: float, role: str = "ours", axis: list | None = None) -> SimpleNamespace:
        return SimpleNamespace(task=task, case="tiny", role=role, median=1.0, roofline=share, axis=axis)

    return make


def test_the_worst_is_ours_and_a_kernel(entry: Callable[..., SimpleNamespace]) -> None:
    expected = entry("focus", 0.3)
    found = [
        entry("weights", 0.4),
        expected,
        entry("focus", 0.1, role="peer"),
        entry("training step", 0.01),
        entry("weights", 0.02, axis=["T", 512]),
    ]
    assert worst.worst(found) is expected
    assert worst.worst(found[2:]) is None


def test_a_folder_without_results_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert worst.main([str(tmp_path)]) == 2
    assert f"{tmp_path}: expected entries of ours in small.json or paper.json, found none" in capsys.readouterr().err


def test_ncu_profiles_the_call(
    tmp_path: Path,
    entry: Callable[..., SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    executable(tmp_path / "ncu", '#!/bin/sh\nfor last; do :; done\necho "ncu $1 $3 $4, last $last"\n')
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert worst.profile(entry("focus", 0.3), tmp_path / "worst.ncu-rep") == 0
    assert (
        capfd.readouterr().out
        == "ncu --set --clock-control none, last tiny\nncu --import --page details, last details\n"
    )
    executable(tmp_path / "ncu", "#!/bin/sh\nexit 9\n")
    assert worst.profile(entry("focus", 0.3), tmp_path / "worst.ncu-rep") == 9


def test_what_kernels_take_is_printed_though_ncu_fails(
    tmp_path: Path, entry: Callable[..., SimpleNamespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    printed = []
    monkeypatch.setattr(worst, "entries", lambda _: [entry("focus", 0.3)])
    monkeypatch.setattr(worst.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(worst, "profile", lambda *_: 9)
    monkeypatch.setattr(worst, "resources", lambda task: printed.append(task) or 0)
    assert worst.main([str(tmp_path)]) == 1
    assert printed == ["focus"]


def test_without_ncu_it_says_so(
    entry: Callable[..., SimpleNamespace],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert worst.profile(entry("focus", 0.3), tmp_path / "worst.ncu-rep") == 0
    assert "ncu is not on the PATH" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_profiled_call_runs() -> None:
    worst.call("weights", "tiny")
