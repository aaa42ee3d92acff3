"""Reports of planted figures: what they say, what they draw, and when they refuse."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from result_factory import COMMIT, MACHINE, entry, green_tests, write_results

from benchmarks import goals, report, scaling
from benchmarks.gpu_bench import TEST_FOLDERS, gpu_test_files
from benchmarks.report_text import report_text
from benchmarks.result_file import Group, Results, read_results

MASS = goals.MASS


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A clean checkout of one commit."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "file.txt").write_text("as committed")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=n", "-c", "user.email=e", "commit", "-qm", "m"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


def _mass_entries(**facts: Any) -> list[dict[str, Any]]:
    """Ours in 10 ms and 1 MB, its floor 4 ms; the fastest peer is not the leanest, and a bound is faster than ours."""
    return [
        entry(MASS, "vgpo_kernels", "ours", 0.010, floor=0.004, memory=1_000_000, **facts),
        entry(MASS, "vgpo_kernels, plain torch", "ours, plain", 0.025, floor=0.004, memory=8_000_000, **facts),
        entry(MASS, "two LSEs", "peer", 0.030, floor=0.004, memory=90_000_000, **facts),
        entry(MASS, "eager map", "peer", 0.150, floor=0.004, memory=50_000_000, **facts),
        entry(MASS, "SDPA, no mass", "bound", 0.008, floor=0.004, memory=500_000, **facts),
    ]


def _sweep(provider: str, role: str, time: float, memory: float, room: str = MASS) -> list[dict[str, Any]]:
    """Times and memory that grow with these exponents of T, above a floor of exponent 2 and bytes of exponent 1."""
    return [
        entry(
            room, provider, role, 1e-9 * t**time, memory=round(100 * t**memory), floor=1e-10 * t**2, moved=t, length=t
        )
        for t in (512, 2048, 8192, 32768)
    ]


def _read(tmp_path: Path, entries: list[dict[str, Any]], name: str = "machine.json", **changes: Any) -> Results:
    return read_results(write_results(tmp_path / name, entries, **changes))


def _only_group(results: Results) -> Group:
    (group,) = results.groups
    return group


def _cells(text: str, start: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def _text(results: Results, tmp_path: Path) -> str:
    return report_text([results], {results.path: {}}, tmp_path)


def test_ratios_and_the_best_peer(tmp_path: Path) -> None:
    group = _only_group(_read(tmp_path, _mass_entries()))
    assert group.best_peer.provider == "two LSEs"
    assert group.leanest_peer.provider == "eager map"
    assert group.ratio(group.best_peer) == pytest.approx(3)
    assert group.ratio(group.plain) == pytest.approx(2.5)
    assert group.memory_ratio(group.leanest_peer) == pytest.approx(50)
    assert group.ours.of_ceiling == pytest.approx(0.4)


def test_tables_show_ratios_floor_rate_spread_and_memory(tmp_path: Path) -> None:
    text = _text(_read(tmp_path, _mass_entries()), tmp_path)
    line = _cells(text, "| **vgpo_kernels** | ours ")
    assert line[2:] == ["10.0 ms", "1.00x", "2.50x", "40.0 GFLOP/s", "40.0%", "2.00%", "1.00 MB", "1.00x"]
    assert _cells(text, "| two LSEs ")[3] == "3.00x"
    assert _cells(text, "| two LSEs ")[-1] == "90.0x"
    summary = _cells(text, f"| {MASS} | one case | 10.0 ms")
    assert summary[3:] == ["3.00x (two LSEs)", "2.50x", "2.50x", "50.0x (eager map)"]


def test_rates_are_of_what_bounds_the_work(tmp_path: Path) -> None:
    line = _cells(_text(_read(tmp_path, _mass_entries(bound_by="bytes")), tmp_path), "| **vgpo_kernels** ")
    assert line[5] == "1.00 GB/s"


def test_the_worst_ratio_comes_first(tmp_path: Path) -> None:
    entries = [
        one
        for case, ratio in (("ahead", 3.0), ("behind", 0.5), ("alone", None))
        for one in [entry(MASS, "vgpo_kernels", "ours", 1.0, case=case)]
        + ([entry(MASS, "eager map", "peer", ratio, case=case)] if ratio else [])
    ]
    text = _text(_read(tmp_path, entries), tmp_path)
    summary = text.split("### Ratios, worst first")[1].split("###")[0]
    assert [line.split("|")[2].strip() for line in summary.splitlines() if MASS in line] == ["behind", "ahead", "alone"]


def test_goals_are_judged_on_the_paper_cases_of_their_machine_only(tmp_path: Path) -> None:
    on_goal, elsewhere = {}, {}
    for device, found in (("NVIDIA H200", on_goal), ("A processor", elsewhere)):
        small = {"case": "small alone", "levels": ["small"], "device": device}
        entries = [entry(MASS, "vgpo_kernels", "ours", 1.0, **small), entry(MASS, "two LSEs", "peer", 0.1, **small)]
        entries += _mass_entries(device=device)
        found |= {one.goal.text: one for one in goals.verdicts(_read(tmp_path, entries))}
    lse, eager, rate = (next(x for x in on_goal if word in x) for word in ("two-LSE", "eager", "480 TFLOP/s"))
    assert (on_goal[lse].value, on_goal[lse].met) == (pytest.approx(3), True)
    assert (on_goal[eager].value, on_goal[eager].met) == (pytest.approx(15), False)
    assert on_goal[rate].met is False
    assert (elsewhere[lse].value, elsewhere[lse].case, elsewhere[lse].met) == (pytest.approx(0.1), "small alone", None)
    unmeasured = next(one for one in on_goal.values() if one.goal.room == goals.FOCUS)
    assert (unmeasured.value, unmeasured.met) == (None, None)


def test_goals_furthest_behind_come_first(tmp_path: Path) -> None:
    found = goals.verdicts(_read(tmp_path, _mass_entries(device="NVIDIA H200")))
    measured = [one.value is not None for one in found]
    assert measured == sorted(measured, reverse=True)
    margins = [one.goal.margin(one.value) for one in found if one.value is not None]
    assert margins == sorted(margins)
    assert len(margins) >= 3


@pytest.mark.parametrize(("seconds", "met"), [(1.01, True), (1.03, False)])
def test_a_step_may_take_little_more_than_one_that_does_less(tmp_path: Path, seconds: float, met: bool) -> None:
    entries = [
        entry(goals.STEP, "vgpo_kernels", "ours", seconds, device="NVIDIA H200", allocated_bytes=1100, live_bytes=9000),
        entry(
            goals.STEP,
            "vgpo_kernels, similarity only",
            "ours",
            0.5,
            device="NVIDIA H200",
            allocated_bytes=1,
            live_bytes=9000,
        ),
        entry(goals.STEP, "GRPO, plain", "bound", 1.0, device="NVIDIA H200", allocated_bytes=1000, live_bytes=9000),
    ]
    found = {one.goal.text: one for one in goals.verdicts(_read(tmp_path, entries)) if one.goal.room == goals.STEP}
    time, memory, extra = (
        next(found[x] for x in found if word in x) for word in ("the time", "the memory", "beyond parameters")
    )
    assert (time.value, time.met) == (pytest.approx(seconds), met)
    assert (memory.value, memory.met) == (pytest.approx(1.01), True)
    assert (extra.value, extra.met) == (pytest.approx(1.1), None)


def test_goals_of_one_of_ours_are_held_to_that_one(tmp_path: Path) -> None:
    entries = [
        entry(goals.FORWARD, "vgpo_kernels", "ours", 1.0),
        entry(goals.FORWARD, "vgpo_kernels, mass after a stock kernel", "ours", 1.2),
        entry(goals.FORWARD, "stock kernel, no mass", "bound", 0.8),
        entry(goals.FORWARD, "FlexAttention, no mass", "bound", 3.0),
        entry(goals.BACKWARD, "vgpo_kernels", "ours", 1.1),
        entry(goals.BACKWARD, "vgpo_kernels, no mass gradient", "bound", 1.0),
        entry(goals.BACKWARD, "SDPA, no mass gradient", "bound", 0.5),
    ]
    found = {one.goal.text: one.value for one in goals.verdicts(_read(tmp_path, entries)) if one.value is not None}
    assert found == {
        "stock kernel and our mass: at most 1.3x the kernel alone": pytest.approx(1.5),
        "all-Triton: at least as fast as FlexAttention without mass": pytest.approx(3),
        "at most 1.05x the same backward without": pytest.approx(1.1),
    }


def test_exponents_of_planted_power_laws_are_found(tmp_path: Path) -> None:
    (found,) = scaling.growths(_read(tmp_path, _sweep("vgpo_kernels", "ours", 2.1, 1.0)))
    assert (found.time, found.floor) == (pytest.approx(2.1), pytest.approx(2))
    assert (found.memory, found.bytes) == (pytest.approx(1, abs=1e-4), pytest.approx(1))
    assert found.too_fast == []


@pytest.mark.parametrize(
    ("role", "time", "memory", "flagged"),
    [("ours", 2.3, 1.0, ["time"]), ("ours", 2.0, 1.3, ["memory"]), ("peer", 2.3, 1.3, []), ("ours", 1.5, 0.0, [])],
)
def test_only_ours_is_flagged_where_it_outgrows_its_floor(
    tmp_path: Path, role: str, time: float, memory: float, flagged: list[str]
) -> None:
    results = _read(tmp_path, _sweep("vgpo_kernels", role, time, memory))
    (found,) = scaling.growths(results)
    assert found.too_fast == flagged
    assert _cells(_text(results, tmp_path), f"| {MASS} | T | 512, 32,768 | 4 ")[-1].strip("*") == "".join(flagged)


def test_no_exponent_of_one_size_or_of_no_memory() -> None:
    assert scaling.exponent([(512, 1.0)]) is None
    assert scaling.exponent([(512, 0), (1024, 0)]) is None
    assert scaling.exponent([(512, None), (1024, 3.0), (2048, 6.0)]) == pytest.approx(1)


def test_what_was_left_out_is_said(tmp_path: Path) -> None:
    skipped = [{"task": MASS, "case": "one case", "provider": "flash-colreduce", "reason": "needs a GPU"}]
    text = _text(_read(tmp_path, _mass_entries(), skipped=skipped), tmp_path)
    assert f"| {MASS} | one case | flash-colreduce | needs a GPU |" in text


def test_what_failed_and_what_was_not_reached_is_said_first(tmp_path: Path) -> None:
    failed = [{"task": MASS, "case": "one case", "provider": "eager", "reason": "does not run"}]
    not_reached = [{"task": MASS, "case": "last", "provider": name} for name in ("vgpo_kernels", "eager")]
    text = _text(_read(tmp_path, _mass_entries(), failed=failed, not_reached=not_reached), tmp_path)
    assert text.index(f"| {MASS} | one case | eager | does not run |") < text.index("### Ahead")
    assert "The run ended before 2 of its entries" in text
    assert "### Failed" not in _text(_read(tmp_path, _mass_entries()), tmp_path)


def test_a_copy_without_git_is_said_to_be_one(tmp_path: Path) -> None:
    assert ", clean, its tests green" in _text(_read(tmp_path, _mass_entries()), tmp_path)
    copied = _text(_read(tmp_path, _mass_entries(commit_from="VGPO_COMMIT")), tmp_path)
    assert "in a copy without git's own files, taken for clean, its tests green" in copied


def test_phases_of_a_step_are_shown(tmp_path: Path) -> None:
    phases = {"score": {"seconds": 0.25, "peak_extra_bytes": 2_000_000}}
    entries = [
        entry(goals.STEP, "vgpo_kernels", "ours", 1.0, phases=phases),
        entry(goals.STEP, "GRPO, plain", "bound", 0.9, phases={"update": {"seconds": 0.9}}),
    ]
    text = _text(_read(tmp_path, entries), tmp_path)
    assert "| vgpo_kernels | 250 ms, 2.00 MB | - |" in text
    assert "| GRPO, plain | - | 900 ms |" in text


def test_the_command_writes_the_report_and_pictures_for_both_kinds_of_page(
    tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = _mass_entries() + _sweep("vgpo_kernels", "ours", 2, 1) + _sweep("eager map", "peer", 2, 2)
    file = write_results(tmp_path / "a-machine.json", entries)
    assert report.main([str(file)], root=checkout) == 0
    folder = checkout / "benchmarks/results"
    assert capsys.readouterr().out.strip() == str(folder / "report.md")
    text = (folder / "report.md").read_text()
    for name in ("time", "memory", "ceiling"):
        light, dark = (imread(folder / f"a-machine-{name}-{theme}.png")[..., :3] for theme in ("light", "dark"))
        assert light.shape == dark.shape
        assert light[0, 0].min() == 1  # a corner is page
        assert dark[0, 0].max() < 0.1
        for picture in (light, dark):
            assert (abs(picture - picture[0, 0]).max(-1) > 0.3).mean() > 0.005  # something is drawn
        assert f'srcset="a-machine-{name}-dark.png"' in text
        assert f'src="a-machine-{name}-light.png"' in text
    assert f"a-machine.json, commit {COMMIT[:10]}, A processor" in text
    # What it wrote does not keep it from writing again.
    assert report.main([str(file), "--check"], root=checkout) == 0


def test_without_a_sweep_there_is_no_picture_of_one(tmp_path: Path) -> None:
    results = _read(tmp_path, _mass_entries())
    report.write_report([results], tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "machine-ceiling-dark.png",
        "machine-ceiling-light.png",
    ]


REFUSED = {
    "measured dirty": ({"dirty": True}, {}, "measured on a tree with uncommitted changes"),
    "no git": (
        {"commit": None, "dirty": None},
        {"commit_info": {"id": "unversioned"}},
        "no commit: expected a run inside",
    ),
    "perhaps dirty": ({"dirty": None}, {}, "measured on a tree with uncommitted changes"),
    "no commit": ({"commit": None}, {"commit_info": {"id": "unknown"}}, "no commit: expected a run inside a git"),
    "a copy of no commit": (
        {"commit": "unknown", "commit_from": "VGPO_COMMIT"},
        {"commit_info": {"id": "unversioned"}},
        "no commit: expected a run inside a git",
    ),
    "other commit at the end": ({}, {"commit_info": {"id": "beef"}}, f"entries of several commits: beef, {COMMIT}"),
    "changed on the way": ({}, {"changed_meanwhile": True}, "measured on a tree with uncommitted changes"),
    "ours was wrong": (
        {},
        {"failed": [{"task": MASS, "case": "another", "provider": "vgpo_kernels", "reason": "3e-1 away"}]},
        f"vgpo_kernels itself failed: {MASS}, another",
    ),
    "other kernels": ({"machine": MACHINE | {"impl": "triton"}}, {}, "VGPO_BENCH_IMPL or TRITON_INTERPRET had other"),
    "interpreted": ({"machine": MACHINE | {"interpreter": True}}, {}, "VGPO_BENCH_IMPL or TRITON_INTERPRET had other"),
    "no tests": ({}, {"tests": None}, "no record of the tests at that commit"),
    "half a record": ({}, {"tests": {"green": True}}, "the record of the tests lacks commit, dirty, paths"),
    "tests of another commit": ({}, {"tests": green_tests(commit="beef")}, "tests ran at beef, the benchmarks at"),
    "tests of a dirty tree": ({}, {"tests": green_tests(dirty=True)}, "tests ran on a tree with uncommitted changes"),
    "red tests": ({}, {"tests": green_tests(green=False, failed=2)}, "tests were not green: 900 passed, 2 failed"),
    "tests of another machine": (
        {},
        {"tests": green_tests(device="NVIDIA H200")},
        "tests ran on NVIDIA H200, the benchmarks on A processor",
    ),
    "too few tests": (
        {},
        {"tests": green_tests(paths=["tests/attention", "tests/focus/test_one.py", "tests/weights"])},
        "tests did not cover tests/focus, tests/policy_loss",
    ),
}


def test_on_a_gpu_the_tests_of_its_kernels_are_wanted(tmp_path: Path) -> None:
    machine = MACHINE | {"device": "NVIDIA H200", "kind": "cuda"}
    paths = [path for folder in TEST_FOLDERS for path in gpu_test_files(folder)]
    for tested, found in ((paths, []), (["tests"], []), (paths[1:], [f"tests did not cover {paths[0]}"])):
        record = green_tests(device="NVIDIA H200", paths=tested)
        results = _read(tmp_path, _mass_entries(machine=machine), tests=record)
        assert report.objections(results) == [f"{results.path}: {one}" for one in found]


@pytest.mark.parametrize(("facts", "changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_figures_that_nobody_could_reproduce_are_refused(
    tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str], facts: dict, changes: dict, reason: str
) -> None:
    file = write_results(tmp_path / "machine.json", _mass_entries(**facts), **changes)
    assert report.main([str(file)], root=checkout) == 2
    assert f"{file}: {reason}" in capsys.readouterr().err
    assert not (checkout / "benchmarks").exists()


def test_one_entry_of_another_commit_is_refused(
    tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entries = [*_mass_entries(), entry(MASS, "late", "peer", 1.0, commit="beef")]
    assert report.main([str(write_results(tmp_path / "machine.json", entries))], root=checkout) == 2
    assert "entries of several commits" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["file.txt", "new.txt", "docs/new.png"])
def test_a_dirty_tree_is_refused(tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    file = write_results(tmp_path / "machine.json", _mass_entries())
    (checkout / name).parent.mkdir(exist_ok=True)
    (checkout / name).write_text("changed")
    assert report.main([str(file), "--output", str(tmp_path / "out")], root=checkout) == 2
    assert f"uncommitted changes: {name}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_check_writes_nothing(tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_results(tmp_path / "machine.json", _mass_entries())
    assert report.main([str(file), "--check"], root=checkout) == 0
    assert "would be written" in capsys.readouterr().out
    assert not (checkout / "benchmarks").exists()


def test_files_of_one_name_are_refused(tmp_path: Path, checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other").mkdir()
    files = [write_results(folder / "machine.json", _mass_entries()) for folder in (tmp_path, tmp_path / "other")]
    assert report.main([*map(str, files)], root=checkout) == 2
    assert "files of one name" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "expected the JSON of a run of the benchmarks"),
        ("[]", "found no entry in it"),
        (json.dumps({"benchmarks": [{"name": "old", "extra_info": {}, "stats": {}}]}), "entry 'old' is not one of"),
    ],
)
def test_other_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=rf"other\.json: .*{reason}"):
        read_results(tmp_path / "other.json")
