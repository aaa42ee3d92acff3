"""`pytest benchmarks --benchmark-only` as a user runs it, at the smallest sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_every_entry_says_where_it_comes_from(results: dict):
    tasks = {}
    for entry in results["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        assert entry["group"] == f"{info['task']} | {info['case']}"
        assert 0 < stats["min"] <= stats["median"] <= stats["max"]
        assert stats["rounds"] >= 2
        assert "data" not in stats
        assert info["achieved"]["of_ceiling"] == pytest.approx(info["floor"] / stats["median"])
        assert info["memory"]["peak_extra_bytes"] >= 0
        assert info["machine"]["device"]
        assert {"torch", "triton", "vgpo-kernels", "trl", "liger-kernel"} <= info["versions"].keys()
        assert len(info["commit"]) == 40
        assert info["dirty"] in (True, False)
        assert info["shapes"]
        tasks.setdefault(info["task"], {})[info["provider"]] = info["role"]
    assert set(tasks) == {
        "policy loss of log-probs",
        "policy loss of logits",
        "selective log-probs of logits",
    }
    for providers in tasks.values():
        assert providers["vgpo_kernels"] == "ours"
        assert providers["vgpo_kernels, plain torch"] == "ours, plain"
        assert providers["TRL"] == "peer"


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
    assert {one["extra_info"]["provider"] for one in results["benchmarks"]} >= {"vgpo_kernels"}
    assert {one["provider"] for one in results["not_reached"]} == {"token loop"}
    assert results["changed_meanwhile"] is False


def test_a_run_that_measures_nothing_says_why(tmp_path: Path):
    results = run_broken(tmp_path, "torch.rand", "benchmarks/tasks/test_weights.py")
    assert (results["benchmarks"], results["not_reached"]) == ([], [])
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
