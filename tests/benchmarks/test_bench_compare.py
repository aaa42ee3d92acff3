"""Ratios to peers in two planted runs: what fell is said loudly, and nothing fails."""

from pathlib import Path
from typing import Any

import pytest
from result_factory import entry, write_results

from benchmarks import compare

ROOM = "focus"


def _entries(ours: float, peer: float, case: str = "one case", **facts: Any) -> list[dict[str, Any]]:
    return [
        entry(ROOM, "vgpo_kernels", "ours", ours, case=case, **facts),
        entry(ROOM, "vgpo_kernels, plain torch", "ours, plain", 1.0, case=case, **facts),
        entry(ROOM, "token loop", "peer", peer, case=case, **facts),
    ]


@pytest.fixture(autouse=True)
def _outside_of_github(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)


def _compare(
    tmp_path: Path, before: list[dict[str, Any]], after: list[dict[str, Any]], capsys: Any, *options: str
) -> str:
    files = [write_results(tmp_path / name, one) for name, one in (("before.json", before), ("after.json", after))]
    assert compare.main([*map(str, files), *options]) == 0
    return capsys.readouterr().out


def test_a_ratio_that_fell_is_said_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # 10x ahead, then 7x: times of both machines differ, the ratio fell by 30%.
    out = _compare(tmp_path, _entries(1.0, 10.0), _entries(5.0, 35.0), capsys)
    assert out.count(compare.BANNER) == 2
    assert "FELL BEHIND: 1 of our ratios" in out
    assert out.count("focus | one case | token loop: 10.00x -> 7.00x (-30%)") == 2
    assert "::warning" not in out


def test_on_github_it_is_a_warning_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    out = _compare(tmp_path, _entries(1.0, 10.0), _entries(1.0, 7.0), capsys)
    assert "\n::warning title=Benchmarks::focus | one case | token loop: 10.00x -> 7.00x (-30%)" in out


@pytest.mark.parametrize(("peer", "options"), [(8.0, ()), (12.0, ()), (7.0, ("--fall", "0.4"))])
def test_noise_and_gains_are_quiet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], peer: float, options: tuple[str, ...]
) -> None:
    out = _compare(tmp_path, _entries(1.0, 10.0), _entries(1.0, peer), capsys, *options)
    assert compare.BANNER not in out
    assert "No ratio fell by more than" in out
    assert f"10.00x -> {peer:.2f}x" in out


def test_our_plain_torch_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "plain torch" not in _compare(tmp_path, _entries(1.0, 10.0), _entries(1.0, 10.0), capsys)


def test_what_vanished_and_what_is_new_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _compare(tmp_path, _entries(1.0, 10.0), _entries(1.0, 10.0)[:2] + _entries(1.0, 2.0, "new case"), capsys)
    vanished, new = out.split("Vanished:")[1].split("New:")
    assert vanished.strip() == "focus | one case | token loop"
    assert [line.strip() for line in new.splitlines() if "new case" in line] == [
        f"focus | new case | {name}" for name in ("token loop", "vgpo_kernels", "vgpo_kernels, plain torch")
    ]
    assert "focus | one case | token loop: 10.00x -> none" in out


def test_levels_that_were_not_run_have_not_vanished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = _entries(1.0, 10.0, levels=["small"])
    paper = _entries(1.0, 20.0, "paper case", levels=["paper"])
    out = _compare(tmp_path, small + paper, small, capsys)
    assert "paper case" not in out
    assert "Vanished" not in out


def test_another_machine_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = _compare(tmp_path, _entries(1.0, 10.0), _entries(1.0, 10.0, device="Another"), capsys)
    assert "What else differs, and may change ratios alone:\n  device: A processor -> Another\n" in out


def test_files_that_cannot_be_read_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = write_results(tmp_path / "good.json", _entries(1.0, 10.0))
    assert compare.main([str(good), str(tmp_path / "absent.json")]) == 2
    assert "absent.json" in capsys.readouterr().err


def test_a_fall_of_everything_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare.main([str(tmp_path / "one.json"), str(tmp_path / "two.json"), "--fall", "25"])
