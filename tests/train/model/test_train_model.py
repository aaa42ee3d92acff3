"""Checkpoint folders: processors with and without a video half, models, the tokens of pictures."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, ChameleonConfig, Qwen2_5_VLConfig
from transformers.utils import is_torchvision_available

from vgpo_train.model.loading import (
    copy_processor_files,
    end_tokens,
    layer_count,
    load_model,
    load_processor,
    visual_token_ids,
)


def test_the_processor_pads_on_the_left_and_takes_pictures(tiny_checkpoint: Path) -> None:
    processor = load_processor(tiny_checkpoint)
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert processor.tokenizer.padding_side == "left"
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], tokenize=False
    )
    inputs = processor(images=[Image.new("RGB", (56, 56))], text=[text], return_tensors="pt")
    assert {"input_ids", "pixel_values", "image_grid_thw", "mm_token_type_ids"} <= set(inputs)


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision the processor takes videos")
def test_videos_are_refused_without_torchvision(tiny_checkpoint: Path) -> None:
    with pytest.raises(ValueError, match="videos need torchvision, which is not installed"):
        load_processor(tiny_checkpoint)(text=["?"], videos=[object()])


def test_missing_folders_are_named(tmp_path: Path) -> None:
    for load in (load_processor, lambda folder: load_model(folder, dtype=torch.float32)):
        with pytest.raises(FileNotFoundError, match=r"model folder '.*nowhere' does not exist"):
            load(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            load(tmp_path)


def test_processor_files_are_copied_unchanged_and_weights_are_not(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder"
    names = copy_processor_files(tiny_checkpoint, target)
    assert {path.name for path in target.iterdir()} == set(names)
    assert {"tokenizer.json", "preprocessor_config.json", "video_preprocessor_config.json"} <= set(names)
    assert not {"config.json", "generation_config.json", "model.safetensors"} & set(names)
    for name in names:
        assert (target / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert copy_processor_files(tiny_checkpoint, tiny_checkpoint) == names, "a folder may be its own target"


def test_further_chat_templates_and_tokenizers_are_copied(tmp_path: Path) -> None:
    source, target, store = tmp_path / "source", tmp_path / "target", tmp_path / "store"
    store.mkdir()
    names = ["additional_chat_templates/tools.jinja", "modeling_own.py", "qformer_tokenizer/vocab.txt"]
    left = ["config.json", "global_step5/state.json", "model.safetensors", "qformer_tokenizer/model.safetensors"]
    for number, name in enumerate(
        [*names, *left]
    ):  # links to read-only files in read-only folders, as in a hub's cache
        (store / str(number)).write_text("{}" if name == "config.json" else name)
        (store / str(number)).chmod(0o444)
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).symlink_to(store / str(number))
    (source / "gone.json").symlink_to(tmp_path / "nowhere")
    (source / "qformer_tokenizer").chmod(0o555)
    for _ in range(2):
        assert copy_processor_files(source, target) == names
        assert copy_processor_files(source, source) == names
    assert {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()} == set(names)
    for name in names:
        assert (target / name).read_text() == name
        assert not (target / name).is_symlink()
        assert (target / name).parent.stat().st_mode & 0o200, "a later export takes its place"


def test_a_copied_checkpoint_loads(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    copy_processor_files(tiny_checkpoint, tmp_path)
    ids = load_processor(tmp_path).tokenizer("How many?", return_tensors="pt").input_ids
    again = load_model(tmp_path, dtype=torch.float32)
    assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


def test_the_text_half_alone_runs_the_attention_that_can_be_recorded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="vgpo")
    used = [config._attn_implementation for config in (model.config.text_config, model.config.vision_config)]
    assert used == ["vgpo", "sdpa"]
    # Another program knows no such attention.
    model.save_pretrained(tmp_path)
    assert "vgpo" not in (tmp_path / "config.json").read_text()
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.config.text_config._attn_implementation == "sdpa"
    ids = torch.tensor([[100, 101, 102]])
    assert torch.equal(model.eval()(input_ids=ids).logits, again.eval()(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("config", "expected"),
    [(Qwen2_5_VLConfig(), {"text_config": "vgpo"}), (ChameleonConfig(), "vgpo")],
    ids=["two halves", "one configuration"],
)
def test_families_without_a_text_half_run_it_everywhere(tiny_checkpoint, monkeypatch, config, expected) -> None:
    asked = {}
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *_, **__: config)
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", lambda *_, **options: asked.update(options))
    load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="vgpo")
    assert asked["attn_implementation"] == expected
    load_model(tiny_checkpoint, dtype=torch.float32, attn_implementation="eager")
    assert asked["attn_implementation"] == "eager"


def test_the_layers_of_the_text_half_are_counted(tiny_checkpoint: Path) -> None:
    assert layer_count(tiny_checkpoint) == 2


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [7, 8]}, {"eos_token_id": 5}, [7, 8]),
        ({"eos_token_id": 0}, {"eos_token_id": 5}, [0]),
        (None, {"eos_token_id": [334, 329]}, [334, 329]),
        ({"temperature": 0.5}, {"eos_token_id": 5}, [5]),
        (None, {"eos_token_id": 5, "text_config": {"eos_token_id": 6}}, [5]),
        (None, {"text_config": {"eos_token_id": [1, 106]}}, [1, 106]),
        (None, {"eos_token_id": None, "text_config": {}}, [9]),
    ],
)
def test_a_completion_ends_where_generate_would_end_it(tmp_path: Path, generation, config, expected) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    assert end_tokens(tmp_path, SimpleNamespace(eos_token_id=9)) == expected


def test_a_checkpoint_without_an_end_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"model folder '.*' names no end-of-sequence token"):
        end_tokens(tmp_path, SimpleNamespace(eos_token_id=None))


def test_dtype_is_the_one_asked_for(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_visual_tokens_of_the_checkpoint(tiny_checkpoint: Path) -> None:
    processor = load_processor(tiny_checkpoint)
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    ids = visual_token_ids(config, processor)
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert {"<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"} <= set(tokens)
    assert processor.tokenizer.eos_token_id not in ids
    assert processor.tokenizer.pad_token_id not in ids


def test_visual_tokens_by_the_names_of_other_families() -> None:
    config = SimpleNamespace(image_token_index=7, boi_token_index=8, eoi_token_index=[9, 10], video_token_id=None)
    assert visual_token_ids(config) == [7, 8, 9, 10]
    assert visual_token_ids(SimpleNamespace()) == []
    inner = SimpleNamespace(image_token_id=11)
    assert visual_token_ids(SimpleNamespace(sub_configs={"vision_config": None}, vision_config=inner)) == [11]


def test_the_video_half_keeps_its_settings(tiny_checkpoint: Path) -> None:
    settings = json.loads((tiny_checkpoint / "video_preprocessor_config.json").read_text())
    assert settings["video_processor_type"] == "Qwen2VLVideoProcessor"
    assert "image_processor_type" not in settings
