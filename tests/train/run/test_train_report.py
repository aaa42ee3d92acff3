"""Several runs in one picture, from Python and from the command line."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from PIL import Image

from vgpo_train.run import report
from vgpo_train.run.checkpoint import write_json


def _run(folder: Path, algorithm: str, accuracies: list[float], *, held_out: tuple | None) -> Path:
    folder.mkdir()
    lines = [{"step": step, "accuracy": accuracy} for step, accuracy in enumerate(accuracies, start=1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before, after = held_out or (None, None)
    known = {"algorithm": algorithm, "seed": 3, "steps": len(accuracies)}
    write_json(folder / "summary.json", known | {"accuracy_before": before, "accuracy_after": after})
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two finished runs, the second without a held-out split."""
    return [
        _run(tmp_path / "one", "vgpo", [0.0, 0.5, 1.0], held_out=(0.1, 0.9)),
        _run(tmp_path / "two", "grpo", [0.0, 0.25], held_out=None),
    ]


def test_runs_are_drawn_into_one_picture(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    report.compare(runs, tmp_path / "new" / "both.png")
    monkeypatch.undo()
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["vgpo, seed 3", "grpo, seed 3"]
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]
    assert curves == [([1, 2, 3], [0.0, 0.25, 0.5]), ([0, 3], [0.1, 0.9]), ([1, 2], [0.0, 0.125])]
    plt.close(drawn[0])
    _check_picture(tmp_path / "new" / "both.png")


def test_the_command_line_draws_the_same(runs: list[Path], tmp_path: Path) -> None:
    report.main([*map(str, runs), "--output", str(tmp_path / "both.png")])
    _check_picture(tmp_path / "both.png")


def test_a_folder_without_a_summary_is_named(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1] / "summary.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"two' has no summary\.json: expected the output folder of a finished"):
        report.compare(runs, tmp_path / "both.png")
    with pytest.raises(SystemExit, match="2"):
        report.main([*map(str, runs), "--output", str(tmp_path / "both.png")])
    assert "two' has no summary.json" in capsys.readouterr().err
    assert not (tmp_path / "both.png").exists()


def test_a_summary_of_something_else_is_named(runs: list[Path], tmp_path: Path) -> None:
    write_json(runs[0] / "summary.json", {"algorithm": "vgpo", "steps": 3, "accuracy_before": 0, "accuracy_after": 1})
    with pytest.raises(ValueError, match=r"one/summary\.json' is no summary of a run: seed missing"):
        report.compare(runs, tmp_path / "both.png")
    (runs[0] / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"one/summary\.json' is not JSON"):
        report.compare(runs, tmp_path / "both.png")


def _attention_lines(steps: int) -> list[dict]:
    """Returns steps whose image curve falls, and falls further from step to step; its last tenth is never reached."""
    return [
        {
            "step": step,
            "reward": 0.0,
            "attention_image": [0.5 - 0.01 * place - 0.01 * step for place in range(9)] + [None],
            "attention_query": [0.25] * 10,
            "attention_generated": [0.1 * place for place in range(10)],
            "visual_late_early_ratio_correct": 0.5 + 0.01 * step,
            "visual_late_early_ratio_incorrect": None if step == 1 else 0.25,
        }
        for step in range(1, steps + 1)
    ]


def test_the_forgetting_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    assert report.draw_forgetting(tmp_path / "attention.png", _attention_lines(20))
    monkeypatch.undo()
    curves, ratios = drawn[0].axes
    assert [line.get_label() for line in curves.lines] == [
        f"{segment}, steps {steps}" for segment in ("image", "query", "generated") for steps in ("1-2", "19-20")
    ]
    first, last = curves.lines[:2]
    assert list(first.get_xdata()) == [5, 15, 25, 35, 45, 55, 65, 75, 85]
    assert list(first.get_ydata()) == pytest.approx([0.485 - 0.01 * place for place in range(9)])
    assert list(last.get_ydata()) == pytest.approx([0.305 - 0.01 * place for place in range(9)])
    assert first.get_color() == last.get_color() != curves.lines[2].get_color()
    assert (first.get_linestyle(), last.get_linestyle()) == ("--", "-")
    shown = {line.get_label(): line for line in ratios.lines if not line.get_label().startswith("_")}
    assert shown.keys() == {"correct completions", "incorrect completions"}
    assert list(shown["incorrect completions"].get_xdata()) == list(range(2, 21))
    assert shown["correct completions"].get_ydata()[-1] == pytest.approx(0.655), "the mean of the last ten"
    for axes in (curves, ratios):
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.get_legend() is not None
    plt.close(drawn[0])
    _check_picture(tmp_path / "attention.png")


def test_the_forgetting_curve_of_one_step(tmp_path: Path) -> None:
    assert report.draw_forgetting(tmp_path / "attention.png", _attention_lines(1))
    _check_picture(tmp_path / "attention.png")


@pytest.mark.parametrize(
    "lines",
    [[], [{"step": 1, "reward": 0.5}], [{"step": 1, "attention_image": [None] * 10}]],
    ids=["no step", "not recorded", "text alone"],
)
def test_without_attention_there_is_no_forgetting_curve(tmp_path: Path, lines: list[dict]) -> None:
    assert not report.draw_forgetting(tmp_path / "attention.png", lines)
    assert not (tmp_path / "attention.png").exists()


def _check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "curves are drawn"
