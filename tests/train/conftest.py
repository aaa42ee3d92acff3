"""A small data set of real pictures, a small checkpoint, and one run of two processes, made once for all tests."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from train_launch import WORKERS, Finished, launch
from train_tools import SMALLEST, write_odd_data

from vgpo_train.quickstart.pictures import make_pictures


@pytest.fixture(scope="session", autouse=True)
def _copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of Parquet files go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    """A YAML file of the fewest keys that make a configuration."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data set: 64 training and 12 held-out pictures."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=64, test=12, seed=0)


@pytest.fixture(scope="session")
def tiny_checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny Qwen2.5-VL that has just learnt that completions end."""
    from vgpo_train.quickstart.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("checkpoint"), pictures=pictures, warm_start_steps=8)


@pytest.fixture(scope="session")
def lone_process() -> Iterator[None]:
    """A process group of one, for code that reduces over the ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def leaky_checkpoint(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with sampling defaults of its own."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("leaky") / "checkpoint")
    path = folder / "generation_config.json"
    own = {"repetition_penalty": 30.0, "do_sample": True, "top_k": 1, "temperature": 0.01, "max_length": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two processes")


@pytest.fixture(scope="session")
def finished(folder: Path, tiny_checkpoint: Path, leaky_checkpoint: Path, pictures: Path) -> Finished:
    write_odd_data(folder, pictures)
    script = WORKERS / "two_processes.py"
    paths = [str(path) for path in (folder, tiny_checkpoint, leaky_checkpoint, pictures)]
    # A collective that one rank does not reach waits for ever: the limit is what turns a hang into a failure.
    ended = launch(script, *paths, log=folder / "log", timeout=400)
    assert ended.returncode == 0, ended.output[-6000:]
    return ended


@pytest.fixture(scope="session")
def ranks(finished: Finished, folder: Path) -> list[dict[str, Any]]:  # noqa: ARG001
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in (0, 1)]
