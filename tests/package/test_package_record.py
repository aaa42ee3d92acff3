"""What `--record` says of a session, on folders of a test or two."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.tools import working_tree

pytest_plugins = ["pytester"]


@pytest.fixture
def checkout(pytester: pytest.Pytester) -> pytest.Pytester:
    """A clean checkout with two tests that pass and one that is skipped, in two folders."""
    pytester.makeini("[pytest]\ntestpaths = tests")
    for path, text in {
        "tests/first/test_one.py": "def test_one(): pass\ndef test_two(): pass",
        "tests/second/test_three.py": "import pytest\n@pytest.mark.skip\ndef test_three(): pass",
        ".gitignore": "__pycache__\n.pytest_cache\nout",
    }.items():
        (pytester.path / path).parent.mkdir(parents=True, exist_ok=True)
        (pytester.path / path).write_text(text)
    _git(pytester.path, "init", "--quiet")
    _git(pytester.path, "add", ".")
    _git(pytester.path, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--message=m")
    return pytester


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def _record(checkout: pytest.Pytester, *arguments: str) -> dict[str, Any]:
    # The inner session poisons no memory: only the plugin under test is loaded.
    checkout.runpytest_inprocess("-p", "tests.tools.record", "--record", "out/tests.json", *arguments)
    return json.loads((checkout.path / "out/tests.json").read_text())


def test_a_green_session_says_what_it_ran(checkout: pytest.Pytester) -> None:
    record = _record(checkout)
    assert record["green"]
    assert not record["dirty"]
    assert record["commit"] == _git(checkout.path, "rev-parse", "HEAD")
    counts = [record[name] for name in ("passed", "failed", "errors", "skipped", "deselected")]
    assert counts == [2, 0, 0, 1, 0]
    assert record["paths"] == ["tests"]
    assert record["device"]
    assert record["seconds"] >= 0


def test_paths_are_told_from_the_root(checkout: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _record(checkout, "tests/first/test_one.py::test_one")["paths"] == ["tests/first/test_one.py::test_one"]
    monkeypatch.chdir(checkout.path / "tests")
    checkout.runpytest_inprocess("-p", "tests.tools.record", "--record", "../out/tests.json", "--rootdir=..", "first")
    assert json.loads((checkout.path / "out/tests.json").read_text())["paths"] == ["tests/first"]


@pytest.mark.parametrize(
    ("body", "counted"),
    [
        ("def test_red(): assert False", "failed"),
        ("import pytest\n@pytest.fixture\ndef bad(): raise OSError\ndef test_red(bad): pass", "errors"),
        ("import absent_module", "errors"),
    ],
)
def test_a_red_session_is_not_green(checkout: pytest.Pytester, body: str, counted: str) -> None:
    (checkout.path / "tests/first/test_red.py").write_text(body)
    record = _record(checkout)
    assert not record["green"]
    assert record[counted] == 1


@pytest.mark.parametrize("options", [("-k", "one"), ("--deselect", "tests/first/test_one.py::test_one")])
def test_a_session_that_left_tests_out_is_not_green(checkout: pytest.Pytester, options: tuple[str, str]) -> None:
    record = _record(checkout, *options)
    assert record["failed"] == record["errors"] == 0
    assert record["deselected"] > 0
    assert not record["green"]


@pytest.mark.parametrize("options", [("-m", "not absent"), ("--ignore", "tests/second"), ("--setup-plan",)])
def test_options_that_may_leave_tests_out_are_named(checkout: pytest.Pytester, options: tuple[str, ...]) -> None:
    record = _record(checkout, *options)
    assert options[0] in record["narrowed"]
    assert not record["green"]


def test_a_session_that_passed_nothing_is_not_green(checkout: pytest.Pytester) -> None:
    record = _record(checkout, "tests/second")
    assert record["skipped"] == 1
    assert not record["green"]


def test_changed_and_untracked_files_make_the_tree_dirty(checkout: pytest.Pytester) -> None:
    results = checkout.path / "benchmarks/results/machine.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    assert not _record(checkout)["dirty"]
    (checkout.path / "new.txt").write_text("")
    assert _record(checkout)["dirty"]


def test_a_tree_changed_by_its_tests_is_dirty(checkout: pytest.Pytester) -> None:
    (checkout.path / "tests/first/test_one.py").write_text("def test_one(): open('left.txt', 'w').close()")
    _git(checkout.path, "-c", "user.name=n", "-c", "user.email=e", "commit", "--quiet", "--all", "--message=m")
    assert _record(checkout)["dirty"]


def test_an_earlier_record_does_not_outlive_a_session_that_dies(
    checkout: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    _record(checkout)
    (checkout.path / "tests/first/test_one.py").write_text("import os\ndef test_one(): os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(working_tree.ROOT))
    assert checkout.runpytest_subprocess("-p", "tests.tools.record", "--record", "out/tests.json").ret == 3
    assert not (checkout.path / "out/tests.json").exists()


def test_a_copy_without_git_is_of_the_commit_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="expected a git checkout"):
        working_tree.read_working_tree(tmp_path)
    monkeypatch.setenv("VGPO_COMMIT", "c0ffee")
    assert working_tree.read_working_tree(tmp_path) == working_tree.WorkingTree("c0ffee", (), "VGPO_COMMIT")


def test_a_checkout_needs_no_name_and_takes_none(checkout: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VGPO_COMMIT", "c0ffee")
    tree = working_tree.read_working_tree(checkout.path)
    assert (len(tree.commit), tree.source) == (40, "git")


def test_without_a_checkout_the_session_does_not_start(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest_inprocess("-p", "tests.tools.record", "--record", "tests.json")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--record: *expected a git checkout with a commit*"])
