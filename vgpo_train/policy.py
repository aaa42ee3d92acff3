"""The policy's forward over prompt and completion: log-probabilities, and the states that focus reads."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_train.rollout import Completions


class PolicyOutput(NamedTuple):
    """One forward over B rows of P prompt and T completion tokens."""

    logps: Tensor  # (B, T) fp32, at the sampling temperature
    hidden_states: Tensor | None  # (B, P + T, D), after the final norm


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


def forward(
    engine: Any,
    prompts: Mapping[str, Tensor],
    completions: Completions,
    *,
    temperature: float,
    with_hidden_states: bool = False,
) -> PolicyOutput:
    """Runs the policy over prompts and completions.

    Args:
        engine: DeepSpeed engine around an image-text-to-text model.
        prompts: left-padded model inputs of B rows.
        completions: what was sampled for them.
        temperature: divides the logits, as it did when sampling.
        with_hidden_states: return the last layer's states, too.
    """
    caught: list[Tensor] = []
    base = engine.module.base_model
    handle = base.register_forward_hook(lambda _module, _args, output: caught.append(output.last_hidden_state))
    length = completions.ids.shape[1]
    try:
        logits = engine(**model_inputs(prompts, completions), use_cache=False, logits_to_keep=length + 1).logits
    finally:
        handle.remove()
    if with_hidden_states and not caught:
        raise TypeError(f"{type(engine.module).__name__}: its base model gives no last_hidden_state to score focus on")
    # The state before a token predicts it; the last state predicts nothing that was sampled.
    logps = selective_logps(logits[:, -length - 1 : -1], completions.ids, temperature)
    return PolicyOutput(logps, caught[0] if with_hidden_states else None)


def selective_logps(logits: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Returns the fp32 log-probabilities (B, T) of `targets` (B, T) under `logits` (B, T, V) / temperature."""
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)
