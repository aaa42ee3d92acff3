"""Builds a small, still uncertain Qwen2.5-VL checkpoint: `python -m vgpo_train.quickstart.tiny_model DIR`."""

from __future__ import annotations

import argparse
import json
import math
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vgpo_train.model import load_processor
from vgpo_train.quickstart.pictures import (
    CELL,
    COLOURS,
    EMPTY,
    Puzzle,
    answer_text,
    make_pictures,
    named_cells,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PLAIN_TOKENS = ("<think>", "</think>", "\\boxed{")
PATCH, MERGE = CELL // 2, 2
# Probabilities of a noisy label: that it is right, and that it is the next colour of the list.
RIGHT, MISTAKEN = 0.5, 0.4
WARM_START_STEPS = 260
CLEAN_SHARE = 0.85  # of the steps, with the true labels: reading a picture is learnt there, uncertainty after it
ANSWER_WEIGHT = 0.3  # of the loss: counting is one token of a dozen, and is learnt last

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'video' -%}
<|vision_start|><|video_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a byte-level tokenizer: one token for a word of the task, bytes for anything else."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4096, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_task_texts(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    fast.add_tokens([AddedToken(token, normalized=False, special=False) for token in PLAIN_TOKENS])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def build_config(tokenizer: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """Build the configuration of a model with about a million parameters, vision tower included."""
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text = {
        "vocab_size": math.ceil(len(tokenizer) / 64) * 64,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3.0, "mrope_section": [4, 6, 6]},
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "initializer_range": 0.08,
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 8 * PATCH,
        "fullatt_block_indexes": [1],
        "initializer_range": 0.08,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        eos_token_id=ids["<|im_end|>"],
        pad_token_id=ids["<|endoftext|>"],
    )


def write_processor(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write tokenizer, chat template, picture and video processor files as Qwen2.5-VL checkpoints have them."""
    tokenizer.save_pretrained(folder)
    pictures = Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": CELL * CELL, "longest_edge": 64 * CELL * CELL},
    )
    settings = json.loads(pictures.to_json_string())
    # The names of published checkpoints: each machine then picks the backend it has, Pillow or torchvision.
    settings |= {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    _write_json(folder / "preprocessor_config.json", settings)
    videos = {key: value for key, value in settings.items() if key != "image_processor_type"}
    videos |= {"video_processor_type": "Qwen2VLVideoProcessor", "min_frames": 4, "max_frames": 64, "fps": 2.0}
    _write_json(folder / "video_preprocessor_config.json", videos)


def noisy_answer(row: dict[str, Any], rng: random.Random) -> str:
    """Return a row's answer with label noise: some names are wrong, and the count is that of the names given."""
    return answer_text(tuple(_mistake(name, rng) for name in named_cells(row["answer"])), row["asked"])


def warm_start(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Any,
    data: Path,
    *,
    steps: int,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    seed: int = 0,
) -> list[float]:
    """Train a model on a data set's training pictures, with the true labels at first and with noisy ones at the end.

    Args:
        model: what is trained, in place.
        processor: its processor.
        data: folder that `make_pictures` wrote.
        steps: optimizer steps of `batch_size` pictures.
        batch_size: pictures a step.
        learning_rate: its peak; it falls to 0.3 of it in the end.
        seed: order of the pictures and the label noise.

    Returns:
        Loss of each step: nats a completion token.
    """
    rows = [json.loads(line) for line in (data / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    model.train()
    for step in tqdm(range(steps), desc="warm start", dynamic_ncols=True):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 10) * (1 - 0.7 * step / steps)
        noisy = step >= CLEAN_SHARE * steps
        batch = _labelled_batch(processor, data, rng.sample(rows, min(batch_size, len(rows))), rng, noisy=noisy)
        loss = _labelled_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def build_tiny_model(
    folder: str | Path,
    *,
    pictures: str | Path | None = None,
    seed: int = 0,
    warm_start_steps: int = WARM_START_STEPS,
) -> Path:
    """Write a small Qwen2.5-VL checkpoint that begins uncertain about coloured shapes.

    Args:
        folder: where to write; created if it is missing.
        pictures: folder that `make_pictures` wrote, with the training split; None draws a data set of its own.
        seed: the same seed on the same machine gives the same checkpoint.
        warm_start_steps: supervised steps on labelled pictures; 0 leaves the model random.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: `pictures` holds no train.jsonl.
        ValueError: negative `warm_start_steps`.
    """
    if warm_start_steps < 0:
        raise ValueError(f"warm_start_steps must be 0 or more, got {warm_start_steps}")
    if pictures is not None and not (Path(pictures) / "train.jsonl").is_file():
        raise FileNotFoundError(f"{pictures} has no train.jsonl: draw it with python -m vgpo_train.quickstart.pictures")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    config = build_config(tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=config.text_config.eos_token_id, pad_token_id=config.text_config.pad_token_id
    )
    config.save_pretrained(folder)
    write_processor(folder, tokenizer)
    if warm_start_steps:
        with tempfile.TemporaryDirectory() as scratch:
            data = Path(pictures) if pictures is not None else make_pictures(scratch, test=1, seed=seed)
            warm_start(model, load_processor(folder), data, steps=warm_start_steps, seed=seed)
    model.save_pretrained(folder)
    return folder


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vgpo_train.quickstart.tiny_model", description=__doc__)
    parser.add_argument("folder", metavar="DIR", help="where to write the checkpoint")
    parser.add_argument("--pictures", metavar="DIR", help="data set to warm up on; default: one of its own")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--warm-start-steps", type=int, default=WARM_START_STEPS, help="default: %(default)s")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    folder = build_tiny_model(
        options.folder,
        pictures=options.pictures,
        seed=options.seed,
        warm_start_steps=options.warm_start_steps,
    )
    print(f"tiny Qwen2.5-VL in {folder} after {time.monotonic() - start:.0f} s")


def _labelled_batch(
    processor: Any, data: Path, rows: list[dict[str, Any]], rng: random.Random, *, noisy: bool
) -> dict[str, Any]:
    prompts, texts, images = [], [], []
    for row in rows:
        content = [{"type": "image"}, {"type": "text", "text": row["problem"]}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        prompts.append(prompt)
        answer = noisy_answer(row, rng) if noisy else row["answer"]
        texts.append(f"{prompt}\\boxed{{{answer}}}{processor.tokenizer.eos_token}")
        images.append(Image.open(data / row["images"][0]))
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    # Padding is on the left, so a completion's tokens are the last ones of its row.
    lengths = [
        len(ids) for ids in processor.tokenizer([t[len(p) :] for p, t in zip(prompts, texts, strict=True)]).input_ids
    ]
    starts = batch["input_ids"].shape[1] - torch.tensor(lengths)
    is_completion = torch.arange(batch["input_ids"].shape[1]) >= starts[:, None]
    return {**batch, "labels": batch["input_ids"].masked_fill(~is_completion, -100)}


def _labelled_loss(model: Qwen2_5_VLForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
    labels = batch["labels"][:, 1:]  # (B, L - 1)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    # Padding is on the left and the answer has one digit, so a row ends with: digit, brace, end.
    return (1 - ANSWER_WEIGHT) * losses[labels != -100].mean() + ANSWER_WEIGHT * losses[:, -3].mean()


def _mistake(name: str, rng: random.Random) -> str:
    if name == EMPTY:
        return name
    colours, draw = tuple(COLOURS), rng.random()
    if draw < RIGHT:
        return name
    if draw < RIGHT + MISTAKEN:
        return colours[(colours.index(name) + 1) % len(colours)]
    return rng.choice(colours)


def _task_texts() -> list[str]:
    words = " ".join((*COLOURS, EMPTY))
    problems = [Puzzle((None,) * 6, asked).problem for asked in COLOURS]
    return [*problems, f" {words};", "system", "user", "assistant", " ".join("0123456789")] * 2


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
