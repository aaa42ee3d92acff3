"""A small data set of real pictures and a small checkpoint, made once for all tests of the driver."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from vgpo_train.make_pictures import make_pictures


@pytest.fixture(scope="session", autouse=True)
def _copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of Parquet files go to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a data set: 64 training and 12 held-out pictures."""
    return make_pictures(tmp_path_factory.mktemp("pictures"), train=64, test=12, seed=0)


@pytest.fixture(scope="session")
def tiny_checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny Qwen2.5-VL that has just learnt that completions end."""
    from vgpo_train.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("checkpoint"), pictures=pictures, warm_start_steps=8)


@pytest.fixture(scope="session")
def lone_process() -> Iterator[None]:
    """A process group of one, for code that reduces over the ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
