"""What a run exports: the checkpoint that it came from, with the trained values and nothing else changed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from published import PUBLISHED, published_tensors, write_checkpoint
from safetensors.torch import load_file
from torch import Tensor
from train_launch import WORKERS
from transformers import AutoModelForImageTextToText

from vgpo_train.config import ConfigError
from vgpo_train.model import load_model
from vgpo_train.model.export import check_exportable, check_weights, export, weight_files

sys.path.insert(0, str(WORKERS))

# Under ZeRO-3 on two processes: families with their published names, and forms that a checkpoint may have.
EXPORTED = (*PUBLISHED, "two files, two dtypes", "pickled, with tensors of no use", "tied, head and all")


def _tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in weight_files(folder):
        found |= load_file(file) if file.suffix == ".safetensors" else torch.load(file)
    return found


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", EXPORTED)
def test_an_export_is_the_source_with_other_values(ranks, folder, name: str) -> None:  # noqa: ARG001
    source, final = folder / "exports" / name / "source", folder / "exports" / name / "final"
    before, after = _tensors(source), _tensors(final)
    assert before.keys() == after.keys()
    for key, value in before.items():
        # Buffers and what the model does not use stay.
        added = 0.0 if key.startswith("mtp.") or key.endswith(("inv_freq", "e_score_correction_bias")) else 1.0
        assert after[key].dtype == value.dtype
        assert torch.equal(after[key], (value.float() + added).to(value.dtype)), key
    assert (final / "config.json").read_bytes() == (source / "config.json").read_bytes()
    assert not (final / "generation_config.json").exists()
    files = [path.name.replace("pytorch_model", "model").replace(".bin", ".safetensors") for path in source.iterdir()]
    assert sorted(path.name for path in final.iterdir()) == sorted(files)
    for index in final.glob("*.index.json"):
        weight_map = json.loads(index.read_text())["weight_map"]
        assert weight_map == {key: file.name for file in weight_files(final) for key in load_file(file)}


@pytest.mark.deepspeed
@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava", "glm4v_moe", "pickled, with tensors of no use"])
def test_an_export_loads_as_what_was_trained(ranks, folder, name: str) -> None:  # noqa: ARG001
    load = AutoModelForImageTextToText.from_pretrained
    before, after = (load(folder / "exports" / name / which, dtype=torch.bfloat16) for which in ("source", "final"))
    changed = dict(after.named_parameters())
    for key, value in before.named_parameters():
        assert torch.equal(changed[key], (value.float() + 1).bfloat16()), key


@pytest.mark.deepspeed
def test_what_could_not_be_exported_is_refused_after_loading(ranks, folder) -> None:
    for rank in ranks:
        said = rank["exports"]
        assert said.keys() == {"without a norm", "tied, with another head"}
        for name, message in said.items():
            assert message.startswith(f"model.path: {folder / 'exports' / name / 'source'} could not be written back")
            assert not (folder / "exports" / name / "final").exists()
        assert "parameter 'model.language_model.norm.weight' is in no tensor" in said["without a norm"]
        assert "'lm_head.weight' does not hold the values of" in said["tied, with another head"]


@pytest.mark.deepspeed
def test_a_run_exports_the_names_of_its_checkpoint(ranks, folder, tiny_checkpoint: Path) -> None:  # noqa: ARG001
    source = _tensors(tiny_checkpoint)
    assert "model.embed_tokens.weight" in source
    for run, dtype in (("two updates", "float32"), ("nan in bfloat16", "bfloat16")):
        final = _tensors(folder / run / "final")
        assert {name: value.shape for name, value in final.items()} == {n: v.shape for n, v in source.items()}
        assert {value.dtype for value in final.values()} == {torch.float32}, f"the source's, also of a {dtype} run"
        for name in ("config.json", "generation_config.json"):
            assert (folder / run / "final" / name).read_bytes() == (tiny_checkpoint / name).read_bytes()


@pytest.mark.usefixtures("lone_process")
def test_a_later_export_takes_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    source, final = tmp_path / "source", tmp_path / "final"
    write_checkpoint(source, *published_tensors("qwen2_vl"))
    (tmp_path / "final.partial").mkdir()
    (tmp_path / "final.partial" / "of_a_killed_run").touch()
    model = load_model(source, dtype=torch.float32)
    check_exportable(model, source)
    for added in (0, 1):
        with torch.no_grad():
            model.model.language_model.norm.weight += added
        export(model, source, final)
        norm = _tensors(source)["model.norm.weight"]
        assert torch.equal(_tensors(final)["model.norm.weight"], norm + added)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "final"}
    assert {path.name for path in final.iterdir()} == {path.name for path in source.iterdir()}


@pytest.mark.usefixtures("lone_process")
def test_an_export_that_would_differ_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", *published_tensors("qwen2_vl"))
    model = load_model(tmp_path / "source", dtype=torch.float32)
    model.resize_token_embeddings(101)
    with pytest.raises(
        ConfigError, match=r"final: .* differ from .*'lm_head.weight' has the shape \(101, 32\) instead"
    ):
        export(model, tmp_path / "source", tmp_path / "final")
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize(
    ("config", "files", "error", "message"),
    [
        ({}, {}, FileNotFoundError, r"model folder '.*' has no weights: none of model.safetensors, "),
        ({}, {"config.json": "{"}, ConfigError, r"model.path: cannot read .*/config.json: Expecting property name"),
        ({}, {"model.safetensors": "cut"}, ConfigError, r"model.path: cannot read the weights .*/model.safetensors: "),
        (
            {},
            {"model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors"}}'},
            ConfigError,
            r"model.path: cannot read the weights .*/model-1.safetensors: No such file",
        ),
        (
            {"quantization_config": {"quant_method": "fp8"}},
            {},
            ConfigError,
            r"model.path: .*: expected weights that can be trained, got quantized ones \(quantization_config .*: fp8\)",
        ),
        ({"text_config": {"compression_config": {"bits": 4}}}, {}, ConfigError, r"quantized ones \(compression_config"),
    ],
)
def test_weights_that_cannot_be_trained_are_named_before_they_are_loaded(
    tmp_path: Path, config: dict, files: dict[str, str], error: type[Exception], message: str
) -> None:
    for name, text in {"config.json": json.dumps(config), **files}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=message):
        check_weights(tmp_path)
