"""What tests of trainers share: a tiny checkpoint, its pictures, and trainers of it by TRL."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vgpo_train.quickstart.pictures import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures"), train=16, test=4, seed=0)


@pytest.fixture(scope="session")
def checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2.5-VL whose words are still nearly random."""
    from vgpo_train.quickstart.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("checkpoint"), pictures=pictures, warm_start_steps=6)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL counts the trainers that are made; tests send nothing."""
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *_, **__: None)


@pytest.fixture
def make(checkpoint: Path, pictures: Path, tmp_path: Path, offline: None):  # noqa: ARG001
    """Builds trainers of the tiny model, by default VGPOTrainer; see `build_trainer`."""
    from trl_trainers import build_trainer

    from vgpo_kernels.integrations.trl import VGPOTrainer

    def build(trainer: type = VGPOTrainer, **options: Any) -> Any:
        return build_trainer(trainer, checkpoint, pictures, tmp_path, **options)

    return build
