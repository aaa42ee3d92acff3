"""Tests with a real vLLM for CPUs: `make vllm-test`. They are no part of `make test`, and are skipped without vLLM."""

import os
import sys
from pathlib import Path

import pytest

# Before vLLM is imported: memory for keys and values in GiB, engine in this process, no network.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
sys.path.append(str(Path(__file__).parents[1] / "integrations"))  # for trl_trainers


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from vgpo_train.quickstart.pictures import make_pictures

    return make_pictures(tmp_path_factory.mktemp("pictures"), train=16, test=4, seed=0)


@pytest.fixture(scope="session")
def checkpoint(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Qwen2.5-VL whose words are still nearly random."""
    from vgpo_train.quickstart.tiny_model import build_tiny_model

    return build_tiny_model(tmp_path_factory.mktemp("checkpoint"), pictures=pictures, warm_start_steps=6)
