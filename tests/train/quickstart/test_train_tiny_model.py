"""The small checkpoint: loads like any other, reads text without loss, warms up, and repeats itself."""

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vgpo_train.data import PictureDataset, PromptCollator
from vgpo_train.model import load_model, load_processor
from vgpo_train.quickstart.pictures import COLOURS, named_cells
from vgpo_train.quickstart.tiny_model import build_tiny_model, noisy_answer, warm_start


def _logits(folder: Path, pictures: Path, model=None) -> torch.Tensor:
    collator = PromptCollator(load_processor(folder), max_prompt_length=128)
    data = PictureDataset(pictures / "test.jsonl", limit=4)
    model = load_model(folder, dtype=torch.float32) if model is None else model
    with torch.no_grad():
        return model.eval()(**collator(list(data)).tensors()).logits


def test_it_is_small_and_has_a_vision_tower(tiny_checkpoint: Path) -> None:
    model = load_model(tiny_checkpoint, dtype=torch.float32)
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert 500_000 < sum(parameter.numel() for parameter in model.parameters()) < 1_500_000
    assert sum(parameter.numel() for parameter in model.model.visual.parameters()) > 100_000


def test_saving_and_loading_gives_the_same_logits(tiny_checkpoint: Path, pictures: Path, tmp_path: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint)
    before = _logits(tiny_checkpoint, pictures, model)
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(tiny_checkpoint, pictures, load_model(tmp_path, dtype=torch.float32)), before)


def test_text_comes_back_as_it_was(tiny_checkpoint: Path, pictures: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    samples = list(PictureDataset(pictures / "train.jsonl"))
    texts = [text for sample in samples for text in (sample.problem, sample.answer)]
    for text in [*texts, "  naïve <b>\n ünknown \\boxed{x} 漢字 \t", ""]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_word_of_the_task_is_a_token(tiny_checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    words = ["<think>", "</think>", "\\boxed{", "}", ";", " 7", *(f" {colour}" for colour in COLOURS)]
    assert [len(tokenizer(word).input_ids) for word in words] == [1] * len(words)


def test_completions_are_short(tiny_checkpoint: Path, pictures: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    samples = list(PictureDataset(pictures / "train.jsonl"))
    assert max(len(tokenizer(f"\\boxed{{{sample.answer}}}").input_ids) for sample in samples) < 20


def test_the_logits_depend_on_the_picture(tiny_checkpoint: Path, pictures: Path) -> None:
    collator = PromptCollator(load_processor(tiny_checkpoint), max_prompt_length=128)
    inputs = collator(list(PictureDataset(pictures / "test.jsonl", limit=1))).tensors()
    model = load_model(tiny_checkpoint, dtype=torch.float32).eval()
    with torch.no_grad():
        seen = model(**inputs).logits[:, -1]
        blank = model(**(inputs | {"pixel_values": torch.zeros_like(inputs["pixel_values"])})).logits[:, -1]
    assert (seen - blank).abs().max() > 1e-4


def test_a_seed_builds_the_same_checkpoint(pictures: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    folders = [
        build_tiny_model(tmp_path / name, pictures=pictures, seed=seed, warm_start_steps=2)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    one, two, other = (_logits(folder, pictures) for folder in folders)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state), "the caller's random state is left alone"


def test_the_warm_start_learns(pictures: Path, tmp_path: Path) -> None:
    folder = build_tiny_model(tmp_path, warm_start_steps=0)
    model = load_model(folder, dtype=torch.float32)
    losses = warm_start(model, load_processor(folder), pictures, steps=8, batch_size=32)
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 1


def test_noisy_labels_err_but_count_the_names_given() -> None:
    row = {"answer": "red red blue empty; red 2", "asked": "red"}
    rng = random.Random(0)
    labels = [noisy_answer(row, rng) for _ in range(200)]
    names = [named_cells(label) for label in labels]
    assert all(label.endswith(f"; red {cells.count('red')}") for label, cells in zip(labels, names, strict=True))
    assert all(cells[3] == "empty" and len(cells) == 4 for cells in names)
    first = [cells[0] for cells in names]
    assert 0.4 < first.count("red") / 200 < 0.65


def test_errors(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="warm_start_steps must be 0 or more, got -1"):
        build_tiny_model(tmp_path, pictures=pictures, warm_start_steps=-1)
    with pytest.raises(FileNotFoundError, match=r"has no train\.jsonl"):
        build_tiny_model(tmp_path, pictures=tmp_path)
