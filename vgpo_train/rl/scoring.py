"""The scoring pass: log-probabilities, and where the policy looks, from one forward without gradient."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import visual_focus_score
from vgpo_kernels.integrations.transformers import (
    check_separable,
    image_ids,
    model_logprobs,
    record_visual_attention,
    visual_token_mask,
)
from vgpo_train.config import RECORDABLE, ConfigError, TrainConfig
from vgpo_train.data import PromptBatch
from vgpo_train.rl import policy
from vgpo_train.rl.algorithms import SEGMENTS
from vgpo_train.rl.micro_batches import micro_batches
from vgpo_train.rl.rollout import Completions


@dataclass
class Scores:
    """What the scoring pass found for a rank's B rows of T completion tokens."""

    old_logps: Tensor  # (B, T) fp32
    entropy: Tensor  # (B, T) fp32, of the distributions that the tokens were drawn from
    ref_logps: Tensor | None  # (B, T) fp32
    focus_similarity: Tensor | None  # (B, T) fp32
    attention: Tensor | None  # (B, T, 3) fp32: mass on the tokens of SEGMENTS
    has_visual: Tensor  # (B,) bool

    def put(self, rows: list[int], part: "Scores") -> None:
        """Writes the scores of a micro-batch, whose first rows are `rows`, to their places."""
        for name in ("old_logps", "entropy", "ref_logps", "focus_similarity", "attention"):
            whole, values = getattr(self, name), getattr(part, name)
            if whole is not None and values is not None:
                whole[rows, : values.shape[1]] = values[: len(rows)]
        self.has_visual[rows] = part.has_visual[: len(rows)]


class Scorer:
    """Scores a rank's rows in micro-batches.

    Args:
        config: of the run.
        engine: the policy.
        reference: the frozen model of the KL term, or None without one.
        companion: joins micro-batches without a picture.
        wants_focus: score focus from both sources, attention where it can be recorded.

    Raises:
        ConfigError: the policy's output head is none that can be stood in for; its attention cannot be recorded,
            though `model.attn_implementation` says so; or its pictures cannot be told apart for `focus.per_image`.
    """

    def __init__(
        self, config: TrainConfig, engine: Any, reference: Any | None, companion: PromptBatch, *, wants_focus: bool
    ) -> None:
        check_head(engine, companion, hidden_states=wants_focus)
        self.engine = engine
        self.reference = reference
        self.companion = companion
        self.micro_batch = config.optim.micro_batch
        self.temperature = config.rollout.temperature
        self.wants_focus = wants_focus
        self.per_image = config.focus.per_image
        if wants_focus and self.per_image:
            check_pictures(engine, companion)
        records = wants_focus and config.model.attn_implementation == RECORDABLE
        self.layers = config.focus.layers if records else None
        if self.layers is not None:
            check_recordable(engine, companion, self.layers)

    def __call__(self, prompts: PromptBatch, completions: Completions) -> Scores:
        """Returns the scores of `completions`, one row a prompt."""
        count, length = completions.mask.shape
        device = completions.mask.device

        def blank(wanted: bool, *shape: int) -> Tensor | None:
            return torch.zeros(count, length, *shape, device=device) if wanted else None

        scores = Scores(
            torch.zeros(count, length, device=device),
            torch.zeros(count, length, device=device),
            blank(self.reference is not None),
            blank(self.wants_focus),
            blank(self.layers is not None, len(SEGMENTS)),
            torch.zeros(count, dtype=torch.bool, device=device),
        )
        rows = list(range(count))
        for batch in micro_batches(prompts, completions, rows, self.companion, size=self.micro_batch):
            part = score(
                self.engine,
                self.reference,
                batch.prompts.tensors(device=device),
                batch.completions,
                temperature=self.temperature,
                wants_focus=self.wants_focus,
                per_image=self.per_image,
                images_per_row=batch.prompts.images_per_row,
                layers=self.layers,
            )
            scores.put(batch.rows, part)
        return scores


def focus_of(source: str, similarity: Tensor | None, attention: Tensor | None) -> Tensor | None:
    """Returns the (B, T) focus of `focus.source`, None where it was not scored.

    Args:
        source: similarity | attention.
        similarity: (B, T) of the scores.
        attention: (B, T, 3) of the scores.
    """
    if source == "similarity":
        return similarity
    return None if attention is None else attention[..., SEGMENTS.index("image")]


@torch.no_grad()
def check_head(engine: Any, companion: PromptBatch, *, hidden_states: bool = False) -> None:
    """Raises ConfigError, with the reason, where this policy's log-probabilities cannot be had without logits.

    It runs a small forward, which shows what the model does with logits after its head.

    Args:
        engine: the policy.
        companion: what the forward takes; its last token stands for a completion.
        hidden_states: the last hidden states have to be at hand, too.
    """
    inputs = companion.tensors(device=engine.device)
    try:
        model_logprobs(engine, inputs, prompt_length=inputs["input_ids"].shape[1] - 1, hidden_states=hidden_states)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error


def check_pictures(engine: Any, companion: PromptBatch) -> None:
    """Raises ConfigError, with the reason, where several pictures of a prompt cannot be told apart.

    Args:
        engine: the policy.
        companion: a prompt with a picture, which shows what the model gets with one.
    """
    try:
        check_separable(engine.module.config, companion.tensors(device=engine.device))
    except ValueError as error:
        raise ConfigError(f"focus.per_image: {error}; leave it out for one prototype of all pictures") from error


@torch.no_grad()
def check_recordable(engine: Any, companion: PromptBatch, layers: str | list[int]) -> None:
    """Raises ConfigError, with the reason, where a forward of this policy cannot be recorded: it runs a small one.

    Args:
        engine: the policy, in the mode that it will be scored in.
        companion: what the forward takes.
        layers: as `focus.layers` says.
    """
    try:
        with _recording(engine.module, layers, prompt_length=None):
            engine(**companion.tensors(device=engine.device), use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.attn_implementation: {RECORDABLE!r} records where the policy looks, which is not possible here: "
            f"{error}; with sdpa, focus.source=similarity trains without it"
        ) from error


@torch.no_grad()
def score(
    engine: Any,
    reference: Any | None,
    prompts: Mapping[str, Tensor],
    completions: Completions,
    *,
    temperature: float,
    wants_focus: bool,
    per_image: bool,
    images_per_row: list[int] | None = None,
    layers: str | list[int] | None = None,
) -> Scores:
    """Scores the rows of one forward: the log-probabilities that updates start from, and where the policy looks.

    Args:
        engine: the policy.
        reference: the frozen model of the KL term, or None without one.
        prompts: left-padded model inputs.
        completions: what was sampled.
        temperature: the rollout's.
        wants_focus: compute the visual focus score.
        per_image: score against each image on its own and take the maximum.
        images_per_row: how many pictures each prompt has; None leaves it to the model's inputs and family.
        layers: whose attention is recorded in the same forward, as `focus.layers` says; None records none.
    """
    length = prompts["input_ids"].shape[1]
    recording = nullcontext() if layers is None else _recording(engine.module, layers, prompt_length=length)
    with recording as record:
        output = policy.logprobs(
            engine,
            prompts,
            completions,
            temperature=temperature,
            with_entropy=True,
            with_hidden_states=wants_focus,
        )
    attention = None if record is None else _mass(record, completions.mask)
    ref_logps = None
    if reference is not None:
        ref_logps = policy.logprobs(reference, prompts, completions, temperature=temperature).logps
    config = engine.module.config
    prompt_mask = visual_token_mask(config, prompts["input_ids"])
    focus = None
    if wants_focus:
        images = image_ids(config, prompts, images_per_row) if per_image else None
        focus = _focus(output.hidden_states, prompt_mask, completions.mask, images)
    return Scores(output.logps, output.entropy, ref_logps, focus, attention, prompt_mask.any(1))


def _recording(model: Any, layers: str | list[int], *, prompt_length: int | None) -> AbstractContextManager[Any]:
    return record_visual_attention(
        model, layers=layers, segments="/".join(SEGMENTS), prompt_length=prompt_length, queries="token"
    )


def _mass(record: Any, mask: Tensor) -> Tensor:
    """Returns the mean over the recorded layers (B, T, 3), 0 outside `mask`."""
    return record.mass.mean(0).masked_fill(~mask[..., None], 0.0)


def _focus(hidden_states: Tensor, prompt_visual: Tensor, mask: Tensor, images: Tensor | None) -> Tensor:
    visual = torch.cat([prompt_visual, torch.zeros_like(mask)], dim=1)
    completion = torch.cat([torch.zeros_like(prompt_visual), mask], dim=1)
    if images is not None:
        images = torch.cat([images, images.new_full(mask.shape, -1)], dim=1)
    return visual_focus_score(hidden_states, visual, completion, image_ids=images)[:, prompt_visual.shape[1] :]
