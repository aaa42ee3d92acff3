"""Trainers of a tiny model on real pictures, by VGPOTrainer and by TRL's own GRPOTrainer, and what their tests ask."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch import Tensor
from trl import GRPOConfig

from vgpo_train.model import load_processor

LENGTH = 9  # of a completion: odd, so that no tile and no row length fits by chance


def dataset(pictures: Path, *, without_picture: tuple[int, ...] = (), split: str = "train") -> Any:
    rows = [json.loads(line) for line in (pictures / f"{split}.jsonl").read_text().splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["problem"]}],
                "images": [
                    Image.open(pictures / path).copy() for path in row["images"] if number not in without_picture
                ],
                "answer": row["answer"],
            }
            for number, row in enumerate(rows)
        ]
    )


def length_reward(completions: list[Any], **_: Any) -> list[float]:
    """Differs within every group: completions of a random model are not alike."""
    return [float(len(completion[0]["content"])) for completion in completions]


def build_trainer(
    trainer: type,
    checkpoint: Path,
    pictures: Path,
    folder: Path,
    *,
    model: Any = None,
    data: Any = None,
    processor: Any = None,
    trainer_options: Any = None,
    **options: Any,
) -> Any:
    """A trainer, by default one that generates for two prompts of four completions a step."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_generations": 4,
        "max_completion_length": LENGTH,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "shuffle_dataset": False,
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **options,
    }
    return trainer(
        str(checkpoint) if model is None else model,
        length_reward,
        args=GRPOConfig(**settings),
        train_dataset=dataset(pictures) if data is None else data,
        processing_class=load_processor(checkpoint) if processor is None else processor,
        **(trainer_options or {}),
    )


def batch_for(trainer: Any) -> dict[str, Any]:
    """A generated batch of two groups of four, with ragged completions where TRL's own would all be as long."""
    trainer.model.train()
    rows = [row for row in (trainer.train_dataset[0], trainer.train_dataset[1]) for _ in range(4)]
    generate = trainer._generate_single_turn

    def shorter(*arguments: Any) -> Any:
        completions, logps = generate(*arguments)
        lengths = [LENGTH, 4, 1, 7, 5, LENGTH, 2, 8]
        return [ids[:length] for ids, length in zip(completions, lengths, strict=True)], logps

    trainer._generate_single_turn = shorter
    try:
        return trainer._generate_and_score_completions(rows)
    finally:
        del trainer._generate_single_turn


def loss_and_gradients(trainer: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], dict[str, float]]:
    """The loss of a batch, its gradients, and what was logged of it."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer._metrics["train"].clear()
    loss = trainer.compute_loss(trainer.model, dict(inputs))
    loss.backward()
    gradients = {name: value.grad.clone() for name, value in trainer.model.named_parameters() if value.grad is not None}
    logged = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.detach(), gradients, logged


def assert_same(ours: Any, theirs: Any) -> None:
    """Losses to the rounding of float32, gradients to 1e-5 of their norm, and every metric of TRL."""
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    assert ours[2].keys() == theirs[2].keys()
    for name, value in theirs[2].items():
        assert ours[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6, nan_ok=True), name


def off_policy(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch as if it had been sampled by another policy: ratios around 1, some of them beyond the clips."""
    generator = torch.Generator().manual_seed(1)
    logps = batch["old_per_token_logps"]
    others = logps + 0.3 * torch.randn((2, *logps.shape), generator=generator)
    return batch | {"old_per_token_logps": others[0], "ref_per_token_logps": others[1]}


@torch.no_grad()
def dense_focus(trainer: Any, batch: dict[str, Any]) -> Tensor:
    """(B, T) cosines of the completion's last states to the mean visual state, with all logits and states in memory."""
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    names = ("pixel_values", "image_grid_thw", "mm_token_type_ids")
    output = trainer.model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        output_hidden_states=True,
        **{name: batch[name] for name in names if name in batch},
    )
    states, start = output.hidden_states[-1], batch["prompt_ids"].shape[1]
    visual = (input_ids == trainer.model.config.image_token_id)[..., None]
    prototype = (states * visual).sum(1, keepdim=True) / visual.sum(1, keepdim=True).clamp(min=1)
    return torch.cosine_similarity(states, prototype, dim=-1)[:, start:]


def heads_own_calls(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes every call of the head's own forward, and whether it served generation."""
    head, calls, generating = trainer.model.get_output_embeddings(), [], []
    forward, generate = torch.nn.Linear.forward, trainer.model.generate

    def noting(self: Any, states: Tensor) -> Tensor:
        if self is head:
            calls.append("generation" if generating else "training")
        return forward(self, states)

    def noted(*arguments: Any, **options: Any) -> Any:
        generating.append(True)
        try:
            return generate(*arguments, **options)
        finally:
            generating.pop()

    monkeypatch.setattr(torch.nn.Linear, "forward", noting)
    monkeypatch.setattr(trainer.model, "generate", noted)
    return calls


def mixing_processor(checkpoint: Path) -> Any:
    """Takes what TRL 1.16 makes of a batch in which some rows have no picture: None instead of an empty list."""
    processor = load_processor(checkpoint)

    class Mixing(type(processor)):
        def __call__(self, images: Any = None, **options: Any) -> Any:
            return super().__call__(images=[own or [] for own in images] if images else None, **options)

    processor.__class__ = Mixing
    return processor


def run_processes(checkpoint: Path, pictures: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of two processes of `trl_worker.py` notes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    worker = Path(__file__).with_name("trl_worker.py")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_DISABLE_TELEMETRY": "1"}
    common |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    processes = [
        subprocess.Popen(
            [sys.executable, str(worker), str(checkpoint), str(pictures), str(folder)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in processes:
            said, _ = process.communicate(timeout=240)
            assert process.returncode == 0, said
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
