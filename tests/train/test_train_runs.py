"""Whole runs by the command line: what they leave behind, and that a killed one goes on as if nothing had happened."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_launch import WORKERS, Finished, launch
from transformers import AutoModelForImageTextToText

from vgpo_train.config import load_config
from vgpo_train.model import load_processor
from vgpo_train.run.metrics import read_metrics

pytestmark = pytest.mark.deepspeed

STEPS = 6
PROMISED = {
    "step",
    "reward",
    "accuracy",
    "completion_length",
    "loss",
    "kl",
    "clip_fraction",
    "rollout_entropy",
    "focus_mean",
    "focus_late_early_ratio",
    "attention_image",
    "attention_query",
    "attention_generated",
    "visual_late_early_ratio",
    "visual_late_early_ratio_correct",
    "visual_late_early_ratio_incorrect",
    "corr_trajectory_weight_length",
    "time_rollout",
    "time_reward",
    "time_score",
    "time_weight",
    "time_update",
    "time_step",
    "tokens_per_second",
}
SUMMARY = {
    "algorithm",
    "focus_source",
    "seed",
    "steps",
    "seconds",
    "accuracy_before",
    "accuracy_after",
    "reward_first",
    "reward_last",
    "skipped_updates",
}

Start = Callable[..., Finished]


@pytest.fixture(scope="module")
def start(tiny_checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the run with its results in a given folder."""
    data = tmp_path_factory.mktemp("mixed") / "train.jsonl"
    rows = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        # Two rows of three have no picture, so that now and then a rank's micro-batch has none.
        row["images"] = [str(pictures / image) for image in row["images"]] if number % 3 == 0 else []
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        f"model.path={tiny_checkpoint}",
        f"data.train={data}",
        f"data.test={pictures}/test.jsonl",
        "data.test_limit=5",  # odd: one of the two ranks has a sample less
        f"steps={STEPS}",
        "save_every=2",
        "keep_checkpoints=1",
        "eval_every=3",
        "optim.warmup_updates=2",
        "optim.weight_decay=0.01",
        "resume=auto",
        "tensorboard=true",
    ]

    def run(output: Path, **options: Any) -> Finished:
        config = ["--config", str(WORKERS / "tiny.yaml")]
        return launch(WORKERS / "train.py", *config, *arguments, f"output_dir={output}", timeout=200, **options)

    return run


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    ended = start(folder, log=folder.with_suffix(".log"))
    assert ended.returncode == 0, ended.output[-6000:]
    (folder / "log").write_text(ended.output)
    return folder


@pytest.fixture(scope="module")
def resumed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed in the middle and started again."""
    folder = tmp_path_factory.mktemp("resumed")
    metrics = folder / "metrics.jsonl"
    start(folder, log=folder.with_suffix(".killed"), kill_when=lambda: len(read_metrics(metrics)) >= 3)
    latest = json.loads((folder / "checkpoints" / "latest.json").read_text())
    assert 2 <= latest["step"] < STEPS, "the kill must come between the first checkpoint and the end"
    assert not (folder / "summary.json").exists()
    _leave_half_a_checkpoint(folder / "checkpoints", f"step_{latest['step']:06d}")
    with metrics.open("a") as file:
        file.write('{"step": 5, "reward"')
    ended = start(folder, log=folder.with_suffix(".resumed"))
    assert ended.returncode == 0, ended.output[-6000:]
    return folder


def _leave_half_a_checkpoint(checkpoints: Path, whole: str) -> None:
    """Does what a kill does while a later checkpoint is written: some files are missing, one is cut short."""
    later = checkpoints / f"step_{STEPS + 1:06d}"
    later.mkdir()
    source = next((checkpoints / whole).iterdir())
    (later / source.name).write_bytes(source.read_bytes()[:1000])
    os.truncate(later / source.name, 500)


def _timeless(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith("time_") and key != "tokens_per_second"}


def test_metrics_have_what_is_promised(whole: Path) -> None:
    lines = read_metrics(whole / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line.keys() >= PROMISED
        assert line["failed_rewards"] == 0
        assert line["reward"] == line["accuracy"] == line["reward_even_length"]
        phases = sum(value for key, value in line.items() if key.startswith("time_") and key != "time_step")
        assert line["time_step"] == pytest.approx(phases)
        # Twelve completions a step.
        assert line["tokens_per_second"] == pytest.approx(12 * line["completion_length"] / line["time_step"])
        for curve in ("attention_image", "attention_query", "attention_generated"):
            assert len(line[curve]) == 10
            assert all(value is None or 0 <= value <= 1 for value in line[curve])
    assert any(line["updates"] == 1 and line["grad_norm"] > 0 and line["entropy"] > 0 for line in lines)
    assert all(line["rollout_entropy"] > 0 for line in lines)
    assert any(line["attention_image"][0] and line["visual_late_early_ratio"] for line in lines)
    assert [("accuracy_test" in line) for line in lines] == [False, False, True, False, False, False], (
        "the last step's is the summary's"
    )


def test_the_learning_rate_follows_its_schedule(whole: Path) -> None:
    done, expected = 0, []
    lines = read_metrics(whole / "metrics.jsonl")
    for line in lines:
        done += line["updates"]
        expected.append(1e-3 * (done / 2 if done < 2 else (STEPS - done) / (STEPS - 2)))
    assert [line["learning_rate"] for line in lines] == pytest.approx(expected, abs=1e-12)


def test_the_summary(whole: Path) -> None:
    summary = json.loads((whole / "summary.json").read_text())
    assert summary.keys() == SUMMARY
    rewards = [line["reward"] for line in read_metrics(whole / "metrics.jsonl")]
    assert (summary["algorithm"], summary["focus_source"], summary["seed"]) == ("vgpo", "similarity", 0)
    assert (summary["steps"], summary["skipped_updates"]) == (STEPS, 0)
    assert (summary["reward_first"], summary["reward_last"]) == (rewards[0], rewards[-1])
    for key in ("accuracy_before", "accuracy_after"):
        assert summary[key] * 5 == pytest.approx(round(summary[key] * 5)), "five samples, each counted once"
    assert summary["seconds"] > 0


def test_tensorboard_has_the_curves(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    lines = read_metrics(whole / "metrics.jsonl")
    assert {"reward", "loss", "focus_mean", "attention_image/0", "time_step"} <= set(events.Tags()["scalars"])
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([line["reward"] for line in lines])


def test_the_plots_are_pictures(whole: Path) -> None:
    for name in ("reward.png", "focus.png", "attention.png"):
        with Image.open(whole / name) as picture:
            assert picture.format == "PNG"
            assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "curves are drawn"


def test_the_final_checkpoint_loads(whole: Path, tiny_checkpoint: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(whole / "final")
    load_processor(whole / "final")
    start = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    before, after = dict(start.named_parameters()), dict(model.named_parameters())
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert any("visual" in name for name in changed), "the tower learns, too"
    assert any("language_model" in name for name in changed)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_only_as_many_checkpoints_as_asked_are_kept(whole: Path) -> None:
    assert [path.name for path in sorted((whole / "checkpoints").glob("step_*"))] == [f"step_{STEPS:06d}"]


def test_the_configuration_is_kept(whole: Path) -> None:
    config = load_config(whole / "config.yaml", [])
    assert (config.steps, config.output_dir, config.optim.lr) == (STEPS, str(whole), 1e-3)


def test_the_progress_bar_is_drawn_once(whole: Path) -> None:
    log = (whole / "log").read_text()
    assert f"{STEPS}/{STEPS}" in log
    for shown in ("reward=", "length=", "kl=", "s/step="):
        assert shown in log
    assert log.count("results in ") == 1


def test_a_killed_run_goes_on_as_if_nothing_had_happened(whole: Path, resumed: Path) -> None:
    expected = [_timeless(line) for line in read_metrics(whole / "metrics.jsonl")]
    assert [_timeless(line) for line in read_metrics(resumed / "metrics.jsonl")] == expected
    weights = [_weights(folder / "final") for folder in (whole, resumed)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_killed_run_ends_with_the_same_summary(whole: Path, resumed: Path) -> None:
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, resumed)]
    assert {key: value for key, value in summaries[0].items() if key != "seconds"} == {
        key: value for key, value in summaries[1].items() if key != "seconds"
    }
    # The time before the kill counts: that of the steps up to the checkpoint.
    assert summaries[1]["seconds"] > 0


def test_half_a_checkpoint_is_cleared_away(resumed: Path) -> None:
    assert [path.name for path in (resumed / "checkpoints").glob("step_*")] == [f"step_{STEPS:06d}"]


def test_tensorboard_of_a_resumed_run_has_each_step_once(whole: Path, resumed: Path) -> None:
    rewards = []
    for folder in (whole, resumed):
        events = EventAccumulator(str(folder / "tensorboard"))
        events.Reload()
        rewards.append([(event.step, event.value) for event in events.Scalars("reward")])
    assert rewards[0] == rewards[1]
