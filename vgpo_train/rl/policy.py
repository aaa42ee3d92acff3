"""The policy's forwards over prompt and completion: log-probabilities, the loss, and the states that focus reads.

Logits exist a few tokens at a time at most: the output head is stood in for.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels import PolicyLossOutput
from vgpo_kernels.integrations.transformers import FusedHead, ModelLogprobs, model_logprobs
from vgpo_train.rl.rollout import Completions


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


def logprobs(
    engine: Any,
    prompts: Mapping[str, Tensor],
    completions: Completions,
    *,
    temperature: float,
    with_entropy: bool = False,
    with_hidden_states: bool = False,
) -> ModelLogprobs:
    """Runs a model over prompts and completions.

    Args:
        engine: DeepSpeed engine around an image-text-to-text model.
        prompts: left-padded model inputs of B rows.
        completions: what was sampled for them.
        temperature: divides the logits, as it did when sampling.
        with_entropy: return the entropy of each token's distribution, too.
        with_hidden_states: return the last layer's states (B, P + T, D) after the final norm, too.
    """
    return model_logprobs(
        engine,
        model_inputs(prompts, completions),
        prompt_length=prompts["input_ids"].shape[1],
        completion_mask=completions.mask,
        temperature=temperature,
        entropy=with_entropy,
        hidden_states=with_hidden_states,
    )


def loss(
    fused: FusedHead,
    prompts: Mapping[str, Tensor],
    completions: Completions,
    old_logps: Tensor,
    advantages: Tensor,
    **options: Any,
) -> PolicyLossOutput:
    """Runs the policy over prompts and completions to its loss.

    Args:
        fused: of the engine, entered.
        prompts: left-padded model inputs of B rows.
        completions: what was sampled for them.
        old_logps: (B, T) of the policy that sampled.
        advantages: (B,).
        options: of `FusedHead.policy_loss`, such as temperature and config.
    """
    inputs = model_inputs(prompts, completions)
    length = prompts["input_ids"].shape[1]
    return fused.policy_loss(inputs, old_logps, advantages, completions.mask, prompt_length=length, **options)
