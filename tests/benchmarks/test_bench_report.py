"""Reports of planted figures: what they say, what they refuse, and which ratios fell."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from result_factory import COMMIT, MACHINE, entry, green_tests, write_results

from benchmarks import report
from benchmarks.gpu_bench import TEST_FOLDERS, gpu_test_files
from tests.tools.working_tree import RESULTS, ROOT


def entries(ours: float = 0.010, peer: float = 0.030) -> list[dict[str, Any]]:
    """A case with two peers, one that does less and is faster than ours; one without a peer; a sweep."""
    return [
        entry("mass", "vgpo_kernels", "ours", ours, roofline=0.004),
        entry("mass", "vgpo_kernels, plain torch", "ours, plain", 0.025),
        entry("mass", "two LSEs", "peer", peer, memory=90_000_000),
        entry("mass", "eager map", "peer", 0.150),
        entry("mass", "SDPA", "bound", 0.008),
        entry("focus", "vgpo_kernels", "ours", 435e-6),
        entry("weights", "vgpo_kernels", "ours", 0.1),
        entry("weights", "loop", "peer", 0.05),
        entry("mass", "vgpo_kernels", "ours", 1.0, length=512),
        entry("mass", "two LSEs", "peer", 9.0, length=512),
    ]


@pytest.fixture
def run(tmp_path: Path) -> report.Run:
    return report.read_run(write_results(tmp_path / "machine.json", entries()))


def test_four_columns_have_the_fastest_peer_and_the_lowest_ratio_first(run: report.Run):
    assert report.case_table(run).splitlines() == [
        "| case | ours | best peer | peer / ours |",
        "| --- | --- | --- | --- |",
        "| weights: one case | 100 ms | loop: 50.0 ms | 0.500x |",
        "| mass: one case | 10.0 ms | two LSEs: 30.0 ms | 3.00x |",
        "| focus: one case | 435 µs | - | - |",
    ]


def test_every_entry_outside_a_sweep_is_listed(run: report.Run):
    lines = report.entry_table(run).splitlines()
    assert len(lines) == 2 + 8
    assert "| mass: one case | vgpo_kernels | 10.0 ms | 1.00x | 40.0% | 1.00 MB |" in lines
    assert "| mass: one case | two LSEs | 30.0 ms | 3.00x | 3.33% | 90.0 MB |" in lines
    assert "| mass: one case | SDPA (less) | 8.00 ms | 0.800x | 12.5% | 1.00 MB |" in lines


def test_what_was_left_out_and_where_figures_come_from_is_said(tmp_path: Path):
    one = {"task": "mass", "case": "one case", "provider": "flash-colreduce"}
    changes = {"skipped": [one | {"reason": "needs a GPU"}], "not_reached": [one]}
    text = report.report(report.read_run(write_results(tmp_path / "machine.json", entries(), **changes)))
    assert f"A processor, 2 threads; commit {COMMIT}, clean; 900 tests passed, 0 failed; torch 2.13.0" in text
    assert "Skipped:\n\n| task | case | provider | reason |" in text
    assert "| mass | one case | flash-colreduce | needs a GPU |" in text
    assert "Not reached:" in text
    assert "Failed:" not in text


def test_the_command_prints_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file, picture = write_results(tmp_path / "machine.json", entries()), tmp_path / "machine.png"
    assert report.main([str(file), "--plot", str(picture)]) == 0
    assert capsys.readouterr().out.startswith("# machine\n")
    drawn = imread(picture)[..., :3]
    assert (drawn.max(-1) - drawn.min(-1) > 0.3).mean() > 5e-4  # coloured marks


REFUSED = {
    "no commit": ({"commit": None}, "no commit: expected a run inside a git checkout"),
    "a copy of no commit": ({"commit": "unknown"}, "no commit: expected a run inside a git checkout"),
    "changed files": ({"dirty": True}, "measured with uncommitted changes"),
    "busy": ({"machine": MACHINE | {"busy": 0.45}}, "the machine was busy: 45.0% of its processors"),
    "ours was wrong": ({"failed": [{"provider": "vgpo_kernels"}]}, "vgpo_kernels itself failed"),
    "other kernels": ({"machine": MACHINE | {"impl": "triton"}}, "VGPO_BENCH_IMPL or TRITON_INTERPRET chose other"),
    "interpreted": ({"machine": MACHINE | {"interpreter": True}}, "VGPO_BENCH_IMPL or TRITON_INTERPRET chose other"),
    "no tests": ({"tests": None}, "the tests of that commit were not green"),
    "red tests": ({"tests": green_tests(green=False)}, "the tests of that commit were not green"),
    "tests of another commit": ({"tests": green_tests(commit="beef")}, "the tests of that commit were not green"),
    "tests of changed files": ({"tests": green_tests(dirty=True)}, "the tests of that commit were not green"),
    "tests elsewhere": ({"tests": green_tests(device="NVIDIA H200")}, "the tests ran on another device"),
    "too few tests": ({"tests": green_tests(paths=["tests/focus"])}, "the tests did not cover every kernel"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_figures_that_cannot_be_reproduced_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], reason: str
):
    file = write_results(tmp_path / "machine.json", entries(), **changes)
    assert report.main([str(file)]) == 2
    found = capsys.readouterr()
    assert f"{file}: {reason}" in found.err
    assert found.out == ""


def test_on_a_gpu_the_tests_of_its_kernels_are_wanted(tmp_path: Path):
    paths = [path for folder in TEST_FOLDERS for path in gpu_test_files(folder)]
    changes = {"machine": MACHINE | {"kind": "cuda"}}
    for tested, lacking in ((paths, []), (paths[1:], ["the tests did not cover every kernel"])):
        tests = green_tests(paths=tested, device="NVIDIA H200")
        run = report.read_run(write_results(tmp_path / "gpu.json", entries(), tests=tests, **changes))
        assert report.objections(run) == [f"{run.path}: {why}" for why in lacking]


def test_committed_results_are_not_refused():
    files = sorted((ROOT / RESULTS).glob("*.json"))
    assert files
    assert report.main([*map(str, files), "--check"]) == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "expected the JSON of a run"),
        ("[]", "expected the JSON of a run"),
        ('{"entries": [{}]}', "expected entries"),
    ],
)
def test_other_files_are_named(tmp_path: Path, text: str, reason: str):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=rf"other\.json: {reason}"):
        report.read_run(tmp_path / "other.json")


def test_ratios_that_fell_are_said_and_fail_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    old = write_results(tmp_path / "old.json", entries())
    # Ours and the peer are both slower; their ratio falls from 3 to 2. One peer is no longer there.
    new = write_results(tmp_path / "new.json", entries(0.020, 0.040)[:7], dirty=True)
    assert report.main([str(new), "--against", str(old)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == [
        "  mass | one case | two LSEs: 3.00x, now 2.00x",
        "  mass | one case | eager map: 15.00x, now 7.50x",
        "  mass | one case | SDPA: 0.80x, now 0.400x",
        "  weights | one case | loop: 0.50x, now -",
        "  mass | T 512 | two LSEs: 9.00x, now -",
    ]
    assert report.main([str(old), "--against", str(old)]) == 0
    assert capsys.readouterr().out == "0 ratios to peers fell by more than 25% or are missing\n"
    assert report.main([str(new), "--against", str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_the_page_shows_what_the_committed_file_says():
    page = (ROOT / "docs/dev/performance.md").read_text()
    assert report.case_table(report.read_run(ROOT / RESULTS / "cpu-epyc-2.json")) in page
