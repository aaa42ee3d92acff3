"""What several tests of the driver share: an engine without DeepSpeed, prompts, completions."""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vgpo_kernels.integrations.transformers import model_logprobs
from vgpo_train.data import PromptBatch, PromptCollator, Sample, epoch_order
from vgpo_train.model import load_processor
from vgpo_train.rl.scoring import model_inputs
from vgpo_train.rl.types import Batch, Completions

# The fewest keys that make a configuration.
SMALLEST = {
    "model": {"path": "m"},
    "data": {"train": "d.jsonl"},
    "rewards": {"weights": {"exact_match": 1.0}, "accuracy": "exact_match"},
    "output_dir": "out",
}


class PlainEngine(torch.nn.Module):
    """What the driver uses of a DeepSpeed engine, on one process and without an optimizer."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.device = torch.device("cpu")
        self.boundaries: list[bool] = []
        self.steps = 0

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.boundaries.append(is_boundary)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.steps += 1

    def was_step_applied(self) -> bool:
        return True

    def get_global_grad_norm(self) -> float:
        return 1.0


def collator(checkpoint: Path) -> PromptCollator:
    """Returns a collator with the checkpoint's processor."""
    return PromptCollator(load_processor(checkpoint), max_prompt_length=200)


def end_and_pad(checkpoint: Path) -> tuple[int, int]:
    """Returns the ids of a checkpoint's end-of-sequence and padding tokens."""
    tokenizer = load_processor(checkpoint).tokenizer
    return tokenizer.eos_token_id, tokenizer.pad_token_id


def mixed_samples(pictures: Path, kinds: str) -> list[Sample]:
    """Returns one sample a letter of `kinds`: p with a picture, t without, d with two."""
    rows = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()]
    numbers = {"t": 0, "p": 1, "d": 2}
    samples = []
    for place, kind in enumerate(kinds):
        own = rows[2 * place : 2 * place + numbers[kind]]
        paths = tuple(pictures / row["images"][0] for row in own)
        # Problems of different lengths, so that prompts need padding.
        problem = rows[place]["problem"] + " Count." * (place % 3)
        samples.append(Sample(f"{kind}{place}", problem, rows[place]["answer"], paths))
    return samples


def write_odd_data(folder: Path, pictures: Path) -> None:
    """Writes data that a run of two ranks must bear, or must refuse.

    Of `one_sided.jsonl` the first step gives the two rows with a picture to rank 0, and text alone to rank 1. Half of
    the rows of `half.jsonl` have a picture. Of
    `bad_rows.jsonl` each rank reads a row that cannot be used. Of `only_rank_N.jsonl` there is that of rank 0 alone.
    """
    rows = [json.loads(line) for line in (pictures / "train.jsonl").read_text().splitlines()[:6]]
    rows = [row | {"images": [str(pictures / image) for image in row["images"]]} for row in rows]

    def write(name: str, chosen: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in chosen))

    order = epoch_order(4, 0, seed=0)
    write(
        "one_sided.jsonl", [row if place in order[:2] else row | {"images": []} for place, row in enumerate(rows[:4])]
    )
    write("half.jsonl", [row if place % 2 else row | {"images": []} for place, row in enumerate(rows)])
    write("bad_rows.jsonl", [*rows[:2], rows[2] | {"images": ["gone.png"]}, *rows[3:5], rows[5] | {"answer": None}])
    write("only_rank_0.jsonl", rows[:1])


def random_completions(lengths: list[int], seed: int = 0) -> Completions:
    """Returns completions of the given lengths, of plain tokens of the tiny tokenizer."""
    draw = random.Random(seed)
    longest = max(lengths)
    ids = torch.tensor([[draw.randrange(100, 200) for _ in range(longest)] for _ in lengths])
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return Completions(ids.masked_fill(~mask, 0), mask)


@contextmanager
def no_head(model: Any) -> Iterator[None]:
    """Refuses the forward of the model's output head."""
    head, real = model.get_output_embeddings(), torch.nn.Linear.forward

    def forward(self: torch.nn.Linear, states: torch.Tensor) -> torch.Tensor:
        assert self is not head, "the head's own forward has run"
        return real(self, states)

    torch.nn.Linear.forward = forward
    try:
        yield
    finally:
        torch.nn.Linear.forward = real


def eager_attention(
    model: Any, inputs: dict[str, torch.Tensor], completions: Completions, layers: list[int]
) -> torch.Tensor:
    """Returns what completions attend to by a model with attention maps, added up key by key.

    Args:
        model: loaded with attn_implementation="eager".
        inputs: left-padded prompts.
        completions: what follows them.
        layers: whose mean is taken, over heads, too.

    Returns:
        (B, T, 3) fp64, on image, query and generated tokens, 0 outside the mask.
    """
    with torch.no_grad():
        maps = model(**model_inputs(inputs, completions), output_attentions=True).attentions
    length = inputs["input_ids"].shape[1]
    mean = torch.stack([maps[layer] for layer in layers]).double().mean((0, 2))[:, length:]  # [B, T, L]
    is_image = inputs["input_ids"] == model.config.image_token_id
    is_query = inputs["attention_mask"].bool() & ~is_image
    found = torch.zeros(*completions.ids.shape, 3, dtype=torch.float64)
    for row in range(mean.shape[0]):
        found[row, :, 0] = mean[row][:, :length][:, is_image[row]].sum(-1)
        found[row, :, 1] = mean[row][:, :length][:, is_query[row]].sum(-1)
        found[row, :, 2] = mean[row][:, length:][:, completions.mask[row]].sum(-1)
    return found * completions.mask[..., None]


def logprobs(
    engine: Any, prompts: dict[str, torch.Tensor], completions: Completions, temperature: float, **options: Any
) -> Any:
    """Returns what `model_logprobs` returns for prompts and completions."""
    options |= {"completion_mask": completions.mask, "temperature": temperature}
    length = prompts["input_ids"].shape[1]
    return model_logprobs(engine, model_inputs(prompts, completions), prompt_length=length, **options)


def dense_logps(
    engine: Any, prompts: dict[str, torch.Tensor], completions: Completions, temperature: float
) -> torch.Tensor:
    """Returns the log-probabilities (B, T) of completions, from the model's own logits."""
    logits = engine(**model_inputs(prompts, completions), use_cache=False).logits
    log_p = (logits[:, -completions.ids.shape[1] - 1 : -1].float() / temperature).log_softmax(-1)
    return log_p.gather(-1, completions.ids[..., None])[..., 0]


def weighted_batch(engine: Any, prompts: PromptBatch, completions: Completions) -> Batch:
    """Returns a batch with random advantages and factors, sampled by a policy not far from the engine's."""
    generator = torch.Generator().manual_seed(0)
    shape = completions.mask.shape
    with torch.no_grad():
        logps = logprobs(engine, prompts.tensors(), completions, 0.8).logps

    def draw(*size: int) -> torch.Tensor:
        return torch.rand(*size, generator=generator)

    return Batch(
        prompts,
        completions,
        advantages=draw(shape[0]) * 4 - 2,
        # Ratios of e^-0.5 to e^0.5: some are clipped, most are not.
        old_logps=logps + draw(*shape) - 0.5,
        ref_logps=logps + draw(*shape) - 0.5,
        token_weights=0.5 + draw(*shape),
        trajectory_weights=0.5 + draw(shape[0]),
    )
