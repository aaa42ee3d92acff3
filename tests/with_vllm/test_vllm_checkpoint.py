"""vLLM reads what the driver exports: its greedy completions are those of the trained weights."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from vgpo_train.model import load_processor

sys.path.append(str(Path(__file__).resolve().parents[1] / "train"))

from train_launch import REPOSITORY, WORKERS, launch

vllm = pytest.importorskip("vllm")

NEW_TOKENS = 12


@pytest.fixture(scope="module")
def trained(checkpoint: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `final/` of a short run on two processes, in the driver's own environment."""
    python = REPOSITORY / ".venv" / "bin" / "python"
    if not python.exists():
        pytest.skip("the driver's environment is missing: make setup")
    output = tmp_path_factory.mktemp("run")
    overrides = {"model.path": checkpoint, "data.train": pictures / "train.jsonl", "output_dir": output}
    arguments = ["--config", str(WORKERS / "tiny.yaml"), "algorithm=grpo", "optim.lr=0.003"]
    arguments += [f"{key}={value}" for key, value in overrides.items()]
    ended = launch(WORKERS / "train.py", *arguments, log=output.with_suffix(".log"), timeout=500, python=python)
    assert ended.returncode == 0, ended.output[-4000:]
    return output / "final"


def _prompts(folder: Path, pictures: Path) -> tuple[Any, list[str], list[Image.Image]]:
    processor = load_processor(folder)
    content = [{"type": "image"}, {"type": "text", "text": "How many fields are red?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    images = [Image.open(path).convert("RGB") for path in sorted(pictures.rglob("*.png"))[:4]]
    return processor, [text] * len(images), images


def _generated(folder: Path, pictures: Path) -> list[list[int]]:
    """Returns what transformers completes, up to the end-of-sequence token."""
    processor, texts, images = _prompts(folder, pictures)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    inputs = processor(text=texts, images=[[image] for image in images], return_tensors="pt", padding=True)
    ids = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    end, rows = processor.tokenizer.eos_token_id, ids.tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def test_vllm_completes_with_the_trained_weights(trained: Path, checkpoint: Path, pictures: Path) -> None:
    expected = _generated(trained, pictures)
    assert expected != _generated(checkpoint, pictures)
    _, texts, images = _prompts(trained, pictures)
    engine = vllm.LLM(str(trained), dtype="float32", enforce_eager=True, max_model_len=256)
    prompts = [
        {"prompt": text, "multi_modal_data": {"image": image}} for text, image in zip(texts, images, strict=True)
    ]
    outputs = engine.generate(prompts, vllm.SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS), use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
