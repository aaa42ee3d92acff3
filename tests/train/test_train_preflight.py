"""What forbids a run is said before its model is loaded, and what it will do is known."""

import json
from pathlib import Path

import pytest
from train_tools import collator

from vgpo_train.config import ConfigError, DataConfig, FocusConfig, ModelConfig, OptimConfig, RolloutConfig, TrainConfig
from vgpo_train.data import DataError, PictureDataset
from vgpo_train.preflight import check_layers, check_sizes, total_steps, usable


def test_number_of_steps() -> None:
    config = TrainConfig(rollout=RolloutConfig(prompts=8), epochs=2.0)
    assert total_steps(config, 20) == 5
    assert total_steps(config, 1) == 1, "a run has at least one step"
    config.steps = 7
    assert total_steps(config, 20) == 7


def test_sizes_that_no_step_can_have_are_refused() -> None:
    config = TrainConfig(
        data=DataConfig(train="d.jsonl"),
        rollout=RolloutConfig(prompts=4, completions=3),
        optim=OptimConfig(update_prompts=2),
    )
    check_sizes(config, 4, 3)
    with pytest.raises(ConfigError, match=r"expected a multiple of the 4 processes, got 6"):
        check_sizes(config, 4, 4)
    message = r"rollout.prompts: expected at most the 3 usable rows of data.train \(d.jsonl\), got 4"
    with pytest.raises(ConfigError, match=message):
        check_sizes(config, 3, 3)


@pytest.mark.parametrize("layers", ["last", "all", [0, 1], [-2], [1, -2]])
def test_layers_of_the_checkpoint_are_taken(tiny_checkpoint: Path, layers: str | list[int]) -> None:
    check_layers(TrainConfig(model=ModelConfig(path=str(tiny_checkpoint)), focus=FocusConfig(layers=layers)))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([2], r"focus.layers: expected numbers from -2 to 1, got 2"),
        ([0, -3], r"focus.layers: expected numbers from -2 to 1, got -3"),
        ([1, -1], r"focus.layers: expected each of the 2 layers at most once, got \[1, -1\]"),
    ],
)
def test_layers_that_the_checkpoint_lacks_are_refused(tiny_checkpoint: Path, layers: list[int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_layers(TrainConfig(model=ModelConfig(path=str(tiny_checkpoint)), focus=FocusConfig(layers=layers)))


@pytest.mark.usefixtures("lone_process")
def test_unusable_rows_stop_a_run_or_are_dropped(tmp_path: Path, tiny_checkpoint: Path, caplog) -> None:
    row = {"problem": "?", "answer": "1", "images": []}
    datasets = {
        "data.train": PictureDataset(_rows(tmp_path / "train.jsonl", row, row | {"answer": None})),
        "data.test": PictureDataset(_rows(tmp_path / "test.jsonl", row | {"problem": "<image>"}, row)),
    }
    with pytest.raises(DataError) as raised:
        usable(datasets, collator(tiny_checkpoint), "refuse")
    assert "data.train" in str(raised.value)
    assert "data.test" in str(raised.value)
    assert str(raised.value).splitlines()[-1] == "mend these rows, or leave them out with data.invalid=drop"
    caplog.clear()
    kept = usable(datasets, collator(tiny_checkpoint), "drop")
    assert {key: [sample.id for sample in data] for key, data in kept.items()} == {
        "data.train": ["0"],
        "data.test": ["1"],
    }
    assert caplog.text.count("1 of 2 rows cannot be used") == 2
    assert caplog.text.count("no row has a picture, so every focus is 0") == 2, "once a data set"


def _rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
