"""`pytest benchmarks --benchmark-only` as a user runs it, at the smallest sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).parents[2]


def run_benchmarks(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # One thread: the sizes are tiny, and threads of processes that meet on few cores wait for one another.
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    if "TRITON_INTERPRET" not in environment:
        variables.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "--cases", "tiny", *arguments, "-q", "-p", "no:cacheprovider"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, check=False)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a run of one file leaves; the others are the same code with other functions."""
    file = tmp_path_factory.mktemp("run") / "results.json"
    run = run_benchmarks("benchmarks/tasks/test_policy_loss.py", "--benchmark-only", f"--benchmark-json={file}")
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(file.read_text())


def test_the_file_says_where_its_entries_come_from(results: dict):
    assert results["machine"]["device"]
    assert 0 <= results["machine"]["busy"] <= 1
    assert {"torch", "triton", "vgpo-kernels", "trl", "liger-kernel"} <= results["versions"].keys()
    assert (len(results["commit"]), results["source"]) == (40, "git")
    assert results["dirty"] in (True, False)
    tasks = {}
    for entry in results["entries"]:
        assert entry["median"] > 0
        assert entry["rounds"] >= 2
        assert entry["roofline"] == pytest.approx(entry["bytes"] / entry["ceilings"]["gbs"] / 1e9)
        assert entry["memory"] >= 0
        tasks.setdefault(entry["task"], {})[entry["provider"]] = entry["role"]
    assert set(tasks) == {
        "policy loss of log-probs",
        "policy loss of logits",
        "selective log-probs of logits",
    }
    for providers in tasks.values():
        assert providers["vgpo_kernels"] == "ours"
        assert providers["vgpo_kernels, plain torch"] == "ours, plain"
        assert providers["TRL"] == "peer"


def test_the_report_shows_the_file(results: dict, tmp_path: Path):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(results))
    assert "| policy loss of log-probs: tiny | " in report.case_table(report.read_run(file))


def test_what_could_not_run_is_listed(results: dict):
    skipped = {(one["task"], one["provider"]): one["reason"] for one in results["skipped"]}
    assert skipped[("policy loss of logits", "Liger")] == "needs a GPU"


def run_broken(folder: Path, broken: str, *arguments: str) -> dict:
    """Returns what a run leaves that fails because a function raises an error."""
    module, _, name = broken.rpartition(".")
    text = (
        f"import {module}\n\n\ndef broken(*_, **__):\n    raise RuntimeError('broken {name}')\n\n\n{broken} = broken\n"
    )
    (folder / "breaking.py").write_text(text)
    file = folder / "results.json"
    run = run_benchmarks(
        *(*arguments, "-p", "breaking", "--benchmark-only", f"--benchmark-json={file}"),
        PYTHONPATH=os.pathsep.join(map(str, (folder, ROOT))),
    )
    assert run.returncode == 1, run.stdout + run.stderr
    return json.loads(file.read_text())


def test_what_fails_and_what_is_not_reached_is_kept(tmp_path: Path):
    """A peer that breaks, and a run that stops at it."""
    broken = "benchmarks.peers.focus.dense_focus"
    results = run_broken(tmp_path, broken, "benchmarks/tasks/test_focus.py", "-k", "not compile", "-x")
    (failed,) = results["failed"]
    assert (failed["provider"], failed["reason"]) == ("dense torch", "does not run: RuntimeError: broken dense_focus")
    assert {one["provider"] for one in results["entries"]} >= {"vgpo_kernels"}
    assert {one["provider"] for one in results["not_reached"]} == {"token loop"}


def test_a_run_that_measures_nothing_says_why(tmp_path: Path):
    results = run_broken(tmp_path, "torch.rand", "benchmarks/tasks/test_weights.py")
    assert (results["entries"], results["not_reached"]) == ([], [])
    assert {one["reason"] for one in results["failed"]} == {"does not run: RuntimeError: broken rand"}


@pytest.mark.timeout(900)
def test_the_kernels_of_gpus_agree_with_every_peer():
    """Triton kernels, interpreted, in all tasks that have them; nothing is timed."""
    run = run_benchmarks(
        "benchmarks",
        "--benchmark-disable",
        # The step trains a model, whose kernels take minutes interpreted; torch.compile makes no difference to results.
        *("-k", "not training_step and not compile"),
        VGPO_BENCH_IMPL="triton",
        TRITON_INTERPRET="1",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


def test_levels_are_checked():
    run = run_benchmarks("benchmarks", "--benchmark-only", "--cases", "huge")
    assert run.returncode == 4
    assert "invalid choice: 'huge'" in run.stderr
