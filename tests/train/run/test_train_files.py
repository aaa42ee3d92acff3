"""What a run writes: checkpoints that survive a kill, metrics, the report."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from PIL import Image

from vgpo_train.config import ConfigError, OptimConfig, RewardConfig, TrainConfig
from vgpo_train.run.checkpoint import CheckpointStore, RunState, check_resumable, write_json
from vgpo_train.run.metrics import MetricsLog, PhaseTimer, progress, read_metrics
from vgpo_train.run.report import write_report

pytestmark = pytest.mark.usefixtures("lone_process")


class _Engine:
    """Saves and loads folders with one file, and dies while saving where told to."""

    loaded = None

    def __init__(self, *, dies: bool = False) -> None:
        self.dies = dies

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest, "DeepSpeed would name a checkpoint before it is whole"
        (Path(folder) / tag).mkdir(parents=True, exist_ok=True)
        if self.dies:
            raise KeyboardInterrupt
        (Path(folder) / tag / "weights").write_text(tag)

    def load_checkpoint(self, folder: str, tag: str):
        self.loaded = Path(folder) / tag
        return (str(self.loaded), {}) if (self.loaded / "weights").exists() else (None, {})


def _config(**changes) -> TrainConfig:
    return TrainConfig(**({"output_dir": "out", "deepspeed": "zero3.json"} | changes))


def _state(step: int, **changes) -> RunState:
    return RunState(**({"step": step, "world_size": 1, "config": json.loads(json.dumps(asdict(_config())))} | changes))


def _folders(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.is_dir())


def test_a_state_comes_back(tmp_path: Path) -> None:
    store, engine = CheckpointStore(tmp_path, keep=2), _Engine()
    assert store.latest() is None
    state = _state(7, seconds=1.5, accuracy_before=0.25, skipped_updates=3)
    store.save(engine, state)
    restored = store.latest()
    store.load(engine, restored)
    assert asdict(restored) == json.loads(json.dumps(asdict(state)))
    assert engine.loaded == store.folder / "step_000007"


def test_a_kill_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(_Engine(), _state(2))
    with pytest.raises(KeyboardInterrupt):
        store.save(_Engine(dies=True), _state(4))
    assert _folders(store) == ["step_000002", "step_000004"]
    assert store.latest().step == 2


def test_only_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6):
        store.save(_Engine(), _state(step))
    assert _folders(store) == ["step_000004", "step_000006"]


def test_a_half_written_later_folder_does_not_displace_the_latest(tmp_path: Path) -> None:
    # The resumed run saves more often than the killed one: step 3 comes before the half-written step 4.
    store = CheckpointStore(tmp_path, keep=1)
    store.save(_Engine(), _state(2))
    with pytest.raises(KeyboardInterrupt):
        store.save(_Engine(dies=True), _state(4))
    store.save(_Engine(), _state(3))
    assert _folders(store) == ["step_000003"]
    assert store.latest().step == 3


def test_a_named_checkpoint_that_is_gone_is_an_error(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    write_json(store.folder / "latest.json", asdict(_state(9)))
    with pytest.raises(ConfigError, match=r"resume: DeepSpeed could not load .*step_000009"):
        store.load(_Engine(), store.latest())


def test_a_cut_file_is_named_before_the_model_is_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    store.save(_Engine(), _state(2))
    file = store.folder / "step_000002" / "rank_1_optim_states.pt"
    torch.save({"step": torch.zeros(1000)}, file)
    store.check_whole(store.latest())
    file.write_bytes(file.read_bytes()[:-500])
    with pytest.raises(ConfigError, match=rf"resume: {file} is cut or damaged: .*; restore it, or choose another"):
        store.check_whole(store.latest())
    latest = store.folder / "latest.json"
    latest.write_text(latest.read_text()[:100])
    with pytest.raises(ConfigError, match=rf"resume: cannot read {latest}: "):
        store.latest()


def test_a_resume_is_refused_by_name() -> None:
    check_resumable(_state(1), _config(steps=99, save_every=1, output_dir="moved", resume="auto", eval_every=3))
    check_resumable(_state(1), _config(rewards=RewardConfig(timeout=60.0)))
    with pytest.raises(ConfigError, match="the checkpoint is of 3 processes, this run has 1"):
        check_resumable(_state(1, world_size=3), _config())
    changed = _config(optim=OptimConfig(lr=5.0), loss={"beta": 0.1})
    with pytest.raises(ConfigError, match=r"configured otherwise in loss.beta, optim.lr; choose another"):
        check_resumable(_state(1), changed)


def test_json_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def _log(folder: Path, done: int, steps: list[dict], *, tensorboard: bool = False) -> None:
    log = MetricsLog(folder, done, tensorboard=tensorboard)
    for metrics in steps:
        log.write(metrics)
    log.close()


def test_a_resumed_log_has_each_step_once(tmp_path: Path) -> None:
    _log(tmp_path, 0, [{"step": step, "reward": step / 8} for step in (1, 2, 3, 4)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # the kill came here
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    _log(tmp_path, 2, [{"step": 3, "reward": 9.0}])
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert lines == [{"step": 1, "reward": 0.125}, {"step": 2, "reward": 0.25}, {"step": 3, "reward": 9.0}]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    _log(tmp_path, 0, [{"step": 1, "nan": float("nan"), "inf": float("inf"), "none": None, "whole": 3}])
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "nan": None, "inf": None, "none": None, "whole": 3}]


def test_curves_are_lists_of_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _log(tmp_path, 0, [{"step": 1, "curve": [0.25, float("nan"), 1]}], tensorboard=True)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "curve": [0.25, null, 1]}\n'
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["curve/0", "curve/2"]
    assert [event.value for event in events.Scalars("curve/0")] == [0.25]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _log(tmp_path, 0, [{"step": 1, "reward": 0.5, "kl": float("nan")}, {"step": 2, "reward": 0.75}], tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward"]
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 0.5), (2, 0.75)]


def test_phases_add_up() -> None:
    timer = PhaseTimer()
    for phase in ("rollout", "update", "rollout"):
        with timer(phase):
            pass
    metrics = timer.metrics(tokens=10)
    assert set(metrics) == {"time_rollout", "time_update", "time_step", "tokens_per_second"}
    assert metrics["time_step"] == pytest.approx(metrics["time_rollout"] + metrics["time_update"])
    assert metrics["tokens_per_second"] == pytest.approx(10 / metrics["time_step"])


def test_the_progress_bar_shows_reward_length_kl_and_time() -> None:
    shown = progress({"reward": 0.25, "completion_length": 12.5, "kl": 0.001, "time_step": 1.5, "accuracy_test": 0.5})
    assert shown == {"reward": "0.250", "length": "12.5", "kl": "1.00e-03", "s/step": "1.50", "test": "0.500"}


def _lines(count: int, **changes) -> list[dict]:
    fields = {"focus_mean": 0.2, "focus_late_early_ratio": None, "accuracy": 0.5}
    return [{"step": step + 1, "reward": float(step)} | fields | changes for step in range(count)]


@pytest.mark.parametrize(
    ("lines", "accuracies"),
    [(_lines(20), (0.1, 0.6)), (_lines(1), (None, None)), (_lines(3, focus_mean=None, accuracy_test=0.4), (0.0, 0.4))],
    ids=["twenty steps", "one step without a held-out split", "text alone"],
)
def test_the_report(tmp_path: Path, lines: list[dict], accuracies) -> None:
    _log(tmp_path, 0, lines)
    before, after = accuracies
    known = {"steps": len(lines), "accuracy_before": before, "accuracy_after": after}
    summary = write_report(tmp_path, known)
    tenth = max(1, len(lines) // 10)
    assert summary["reward_first"] == pytest.approx((tenth - 1) / 2)
    assert summary["reward_last"] == pytest.approx(len(lines) - (tenth + 1) / 2)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    for name in ("reward.png", "focus.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 300
    with Image.open(tmp_path / "reward.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20, "curves are drawn"
