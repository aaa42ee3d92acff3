"""DeepSpeed's options and Liger's kernels follow the configuration; what contradicts it is refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from vgpo_train.config import ConfigError, load_config
from vgpo_train.model.engine import _apply_liger, deepspeed_options


def _deepspeed_file(path: Path, content: str) -> list[str]:
    path.write_text(content)
    return [f"deepspeed={path}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "ds.json is no JSON"),
        ('{"zero_optimization": {"stage": 2}}', "ds.json: expected zero_optimization.stage 3, got 2"),
        ("{}", "ds.json: expected zero_optimization.stage 3, got None"),
        ("[]", "ds.json: expected an object"),
        (
            '{"zero_optimization": {"stage": 3}, "train_batch_size": 8}',
            "'train_batch_size' is set by optim.update_prompts of the YAML file; remove it",
        ),
        (
            '{"zero_optimization": {"stage": 3}, "optimizer": {"type": "Adam"}}',
            "'optimizer' is set by optim of the YAML file",
        ),
        ('{"zero_optimization": {"stage": 3}, "fp16": {}}', "'fp16' is set by model.dtype"),
        (
            '{"zero_optimization": {"stage": 3}, "data_types": {"grad_accum_dtype": "bf16"}}',
            "data_types.grad_accum_dtype: expected 'fp32', got 'bf16', .*; remove it",
        ),
    ],
)
def test_a_wrong_deepspeed_file_is_named(smallest: Path, tmp_path: Path, content: str, message: str) -> None:
    config = load_config(smallest, _deepspeed_file(tmp_path / "ds.json", content))
    with pytest.raises(ConfigError, match=f"deepspeed: .*{message}"):
        deepspeed_options(config)


def test_a_missing_deepspeed_file_is_named(smallest: Path) -> None:
    with pytest.raises(ConfigError, match=r"deepspeed: cannot read .*zero3.json: No such file.*; copy vgpo_train/"):
        deepspeed_options(load_config(smallest, []))


def test_deepspeed_gets_what_the_yaml_file_says(smallest: Path, tmp_path: Path) -> None:
    ours = {"zero_optimization": {"stage": 3, "overlap_comm": False}, "communication_data_type": "fp32"}
    arguments = _deepspeed_file(tmp_path / "ds.json", json.dumps(ours))
    options = deepspeed_options(load_config(smallest, [*arguments, "optim.micro_batch=3", "optim.max_grad_norm=0.5"]))
    assert options.items() >= ours.items()
    assert options["train_micro_batch_size_per_gpu"] == 3
    assert options["gradient_clipping"] == 0.5
    assert options["bf16"] == {"enabled": True}
    assert options["data_types"] == {"grad_accum_dtype": "fp32"}


def test_liger_on_a_cpu_is_refused(smallest: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = load_config(smallest, ["model.liger=on"])
    with pytest.raises(ConfigError, match=r"model.liger: Liger's kernels need a GPU; set it to auto or off"):
        _apply_liger(config.model, None)


def test_liger_gets_only_what_a_family_has(smallest: Path, monkeypatch) -> None:
    monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    calls = []

    def gemma_like(rope=False, geglu=False, rms_norm=False, cross_entropy=True, model=None):
        calls.append((rope, geglu, rms_norm, cross_entropy, model))

    model = SimpleNamespace(config=SimpleNamespace(model_type="like_gemma"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "like_gemma", gemma_like)
    _apply_liger(load_config(smallest, []).model, model)
    assert calls == [(True, True, True, False, model)]
    model.config.model_type = "unheard_of"
    _apply_liger(load_config(smallest, []).model, model)
    with pytest.raises(ConfigError, match=r"model.liger: Liger knows no model type 'unheard_of'"):
        _apply_liger(load_config(smallest, ["model.liger=on"]).model, model)
    assert len(calls) == 1
