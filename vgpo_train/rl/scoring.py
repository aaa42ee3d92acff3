"""The scoring pass: log-probabilities, entropy, visual focus and attention from one forward without gradient."""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels.integrations.transformers import (
    check_separable,
    completion_focus,
    image_ids,
    model_logprobs,
    record_visual_attention,
    visual_token_mask,
)
from vgpo_train.config import RECORDABLE, ConfigError, TrainConfig
from vgpo_train.data import PromptBatch
from vgpo_train.rl.types import SEGMENTS, Batch, Completions, Scores


class Scorer:
    """Scores a rank's rows in micro-batches.

    Args:
        config: of the run.
        engine: the policy.
        reference: the frozen model of the KL term, or None without one.
        dummy: a prompt with a picture, for micro-batches without any.
        wants_focus: score focus from both sources; attention only if `model.attn_implementation` can be recorded.

    Raises:
        ConfigError: the policy's output head cannot be replaced; its attention cannot be recorded, though
            `model.attn_implementation` requires it; or its pictures cannot be told apart for `focus.per_image`.
    """

    def __init__(
        self, config: TrainConfig, engine: Any, reference: Any | None, dummy: PromptBatch, *, wants_focus: bool
    ) -> None:
        check_head(engine, dummy, hidden_states=wants_focus)
        self.engine = engine
        self.reference = reference
        self.dummy = dummy
        self.micro_batch = config.optim.micro_batch
        self.temperature = config.rollout.temperature
        self.wants_focus = wants_focus
        self.per_image = config.focus.per_image
        if wants_focus and self.per_image:
            check_pictures(engine, dummy)
        records = wants_focus and config.model.attn_implementation == RECORDABLE
        self.layers = config.focus.layers if records else None
        if self.layers is not None:
            check_recordable(engine, dummy, self.layers)

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
        batch = Batch(prompts, completions)
        for start in range(0, count, self.micro_batch):
            rows = list(range(start, min(start + self.micro_batch, count)))
            scores.put(rows, self.forward(batch.take(rows, self.dummy)))
        return scores

    @torch.no_grad()
    def forward(self, batch: Batch) -> Scores:
        """Returns the scores of the rows of one forward, the dummy's among them."""
        ids, mask = batch.completions
        prompts = batch.prompts.tensors(device=ids.device)
        inputs = model_inputs(prompts, batch.completions)
        length = prompts["input_ids"].shape[1]
        given = {"prompt_length": length, "completion_mask": mask, "temperature": self.temperature}
        recording = nullcontext() if self.layers is None else _recording(self.engine.module, self.layers, length)
        with recording as record:
            output = model_logprobs(self.engine, inputs, entropy=True, hidden_states=self.wants_focus, **given)
        ref_logps = None if self.reference is None else model_logprobs(self.reference, inputs, **given).logps
        attention = None  # the mean over the recorded layers
        if record is not None:
            attention = record.mass.mean(0).masked_fill(~mask[..., None], 0.0)
        config = self.engine.module.config
        visual = visual_token_mask(config, prompts["input_ids"])
        focus = None
        if self.wants_focus:
            images = image_ids(config, prompts, batch.prompts.images_per_row) if self.per_image else None
            focus = completion_focus(output.hidden_states, visual, mask, image_ids=images)
        return Scores(output.logps, output.entropy, ref_logps, focus, attention, visual.any(1))


def model_inputs(prompts: Mapping[str, Tensor], completions: Completions) -> dict[str, Tensor]:
    """Returns the prompts' inputs with the completions appended; completions hold no image."""
    shape = prompts["input_ids"].shape
    inputs = dict(prompts)
    for name, value in prompts.items():
        if name == "input_ids":
            tail = completions.ids
        elif name == "attention_mask":
            tail = completions.mask
        elif value.shape == shape and not value.is_floating_point():
            tail = torch.zeros_like(completions.ids)  # token types: 0 is text
        else:
            continue
        inputs[name] = torch.cat([value, tail.to(value.dtype)], dim=1)
    return inputs


def focus_of(source: str, similarity: Tensor | None, attention: Tensor | None) -> Tensor | None:
    """Returns the (B, T) focus of `focus.source`, None if it was not scored.

    Args:
        source: similarity | attention.
        similarity: (B, T) of the scores.
        attention: (B, T, 3) of the scores.
    """
    if source == "similarity":
        return similarity
    return None if attention is None else attention[..., SEGMENTS.index("image")]


@torch.no_grad()
def check_head(engine: Any, dummy: PromptBatch, *, hidden_states: bool = False) -> None:
    """Raises ConfigError, with the reason, if this policy's log-probabilities cannot be computed without its logits.

    It runs a small forward, which shows what the model does with logits after its head.

    Args:
        engine: the policy.
        dummy: what the forward takes; its last token is taken for a completion.
        hidden_states: the last hidden states are needed, too.
    """
    inputs = dummy.tensors(device=engine.device)
    try:
        model_logprobs(engine, inputs, prompt_length=inputs["input_ids"].shape[1] - 1, hidden_states=hidden_states)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.path: {error}") from error


def check_pictures(engine: Any, dummy: PromptBatch) -> None:
    """Raises ConfigError, with the reason, if several pictures of a prompt cannot be told apart.

    Args:
        engine: the policy.
        dummy: a prompt with a picture, which shows what the model gets with one.
    """
    try:
        check_separable(engine.module.config, dummy.tensors(device=engine.device))
    except ValueError as error:
        raise ConfigError(f"focus.per_image: {error}; leave it out for one prototype of all pictures") from error


@torch.no_grad()
def check_recordable(engine: Any, dummy: PromptBatch, layers: str | list[int]) -> None:
    """Raises ConfigError, with the reason, if a forward of this policy cannot be recorded; it runs a small one.

    Args:
        engine: the policy, in the mode that it will be scored in.
        dummy: what the forward takes.
        layers: as `focus.layers` says.
    """
    try:
        with _recording(engine.module, layers, None):
            engine(**dummy.tensors(device=engine.device), use_cache=False)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"model.attn_implementation: {RECORDABLE!r} records where the policy looks, which is not possible here: "
            f"{error}; with sdpa, focus.source=similarity trains without it"
        ) from error


def _recording(model: Any, layers: str | list[int], prompt_length: int | None) -> AbstractContextManager[Any]:
    return record_visual_attention(
        model, layers=layers, segments="/".join(SEGMENTS), prompt_length=prompt_length, queries="token"
    )
