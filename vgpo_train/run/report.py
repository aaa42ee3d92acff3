"""What a finished run leaves: a summary and plots; `python -m vgpo_train.run.report` draws several runs together."""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from vgpo_train.rl.types import SEGMENTS
from vgpo_train.run.checkpoint import write_json
from vgpo_train.run.metrics import TENTHS, read_metrics

_SMOOTHING = 10  # steps


def write_report(output_dir: Path, summary: dict[str, Any]) -> dict[str, Any]:
    """Writes the summary and the plots of a run from its `metrics.jsonl`; returns the summary.

    Args:
        output_dir: the run's folder.
        summary: of the trainer; `reward_first` and `reward_last` are added: the mean reward of the first and
            the last tenth of the steps.
    """
    lines = read_metrics(output_dir / "metrics.jsonl")
    rewards = [line["reward"] for line in lines]
    tenth = max(1, len(rewards) // 10)
    summary |= {
        "reward_first": sum(rewards[:tenth]) / tenth,
        "reward_last": sum(rewards[-tenth:]) / tenth,
    }
    write_json(output_dir / "summary.json", summary)
    _plot(
        output_dir / "reward.png",
        lines,
        {"reward": "reward", "accuracy": "accuracy"},
        _held_out(summary, lines),
    )
    _plot(
        output_dir / "focus.png",
        lines,
        {"focus_mean": "visual focus", "focus_late_early_ratio": "late / early focus"},
        [],
    )
    draw_forgetting(output_dir / "attention.png", lines)
    return summary


def draw_forgetting(path: Path, lines: list[dict[str, Any]]) -> bool:
    """Draws what completions attend to along their tokens, in the first and the last tenth of the steps and over all.

    Args:
        path: a PNG file.
        lines: of `metrics.jsonl`.

    Returns:
        Whether there was anything to draw; runs whose attention was not recorded leave no picture.
    """
    lines = [line for line in lines if line.get("attention_image") is not None]
    if not any(value is not None for line in lines for value in line["attention_image"]):
        return False
    figure, (curves, ratios) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    _draw_curves(curves, lines)
    _draw_ratios(ratios, lines)
    for axes in (curves, ratios):
        axes.grid(alpha=0.3)
        if axes.lines:
            # Below, where it hides no curve.
            axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
    return True


def _draw_curves(axes: Any, lines: list[dict[str, Any]]) -> None:
    tenth = max(1, len(lines) // 10)
    first, last = lines[:tenth], lines[-tenth:]
    for number, segment in enumerate(SEGMENTS):
        name, colour = f"attention_{segment}", f"C{number}"
        for steps, style in ((first, {"alpha": 0.4, "linestyle": "--"}), (last, {})):
            points = [(place, _known_mean([line[name][place] for line in steps])) for place in range(TENTHS)]
            points = [(100 * (place + 0.5) / TENTHS, value) for place, value in points if value is not None]
            if points:
                label = f"{segment}, {_steps_named(steps)}"
                axes.plot(*zip(*points, strict=True), color=colour, label=label, marker="o", markersize=3, **style)
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 1)
    axes.set_xlabel("place in the completion (% of its tokens)")
    axes.set_ylabel("share of attention")
    axes.set_title("What completions look at")


def _draw_ratios(axes: Any, lines: list[dict[str, Any]]) -> None:
    for kind, colour in (("correct", "C9"), ("incorrect", "C3")):
        name = f"visual_late_early_ratio_{kind}"
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            _draw_smoothed(axes, points, f"{kind} completions", color=colour)
    axes.set_xlabel("step")
    axes.set_ylabel("attention on the image: later / earlier half")
    axes.set_title("How much of it stays")


def _known_mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _steps_named(lines: list[dict[str, Any]]) -> str:
    first, last = lines[0]["step"], lines[-1]["step"]
    return f"step {first}" if first == last else f"steps {first}-{last}"


def compare(runs: list[Path], output: Path) -> None:
    """Draws the accuracy of several finished runs into one picture, held-out accuracy as points.

    Args:
        runs: their output folders.
        output: a PNG file; its folder is made if it is missing.

    Raises:
        FileNotFoundError: a folder without the `summary.json` that a finished run leaves.
        ValueError: a `summary.json` that is not a run's.
    """
    summaries = [_read_summary(run) for run in runs]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for run, summary in zip(runs, summaries, strict=True):
        lines = read_metrics(run / "metrics.jsonl")
        label = f"{summary['algorithm']}, seed {summary['seed']}"
        (curve,) = axes.plot(
            [line["step"] for line in lines], _smooth(tuple(line["accuracy"] for line in lines)), label=label
        )
        if points := _held_out(summary, lines):
            axes.plot(*zip(*points, strict=True), "o", color=curve.get_color(), markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("accuracy (line: sampled, dots: held out)")
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, format="png")
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """The command line of `compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m vgpo_train.run.report", description=compare.__doc__.splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    options = parser.parse_args(arguments)
    try:
        compare(options.runs, options.output)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


def _read_summary(run: Path) -> dict[str, Any]:
    path = run / "summary.json"
    if not path.is_file():
        raise FileNotFoundError(f"{str(run)!r} has no summary.json: expected the output folder of a finished run")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON: {error}") from error
    needed = {"algorithm", "seed", "steps", "accuracy_before", "accuracy_after"}
    if missing := sorted(needed - set(summary)):
        raise ValueError(f"{str(path)!r} is no summary of a run: {', '.join(missing)} missing")
    return summary


def _held_out(summary: dict[str, Any], lines: list[dict[str, Any]]) -> list[tuple[int, float]]:
    points = [(line["step"], line["accuracy_test"]) for line in lines if line.get("accuracy_test") is not None]
    if summary["accuracy_before"] is None:
        return points
    return [(0, summary["accuracy_before"]), *points, (summary["steps"], summary["accuracy_after"])]


def _plot(path: Path, lines: list[dict[str, Any]], names: dict[str, str], held_out: list[tuple[int, float]]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in names.items():
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if not points:
            continue
        _draw_smoothed(axes, points, label)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="black", label="held-out accuracy", markersize=4)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_smoothed(axes: Any, points: list[tuple[int, float]], label: str, **style: Any) -> None:
    steps, values = zip(*points, strict=True)
    (curve,) = axes.plot(steps, _smooth(values), label=label, **style)
    axes.plot(steps, values, color=curve.get_color(), alpha=0.25, linewidth=0.8)


def _smooth(values: tuple[float, ...]) -> list[float]:
    """Returns the mean of each value and those up to `_SMOOTHING` steps before it."""
    windows = [values[max(0, i - _SMOOTHING + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


if __name__ == "__main__":
    main()
