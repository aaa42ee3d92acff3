"""Checks of logits, hidden states, head and targets, and what they become."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._operator import as_autocast
from vgpo_kernels._validate import (
    FLOATING,
    MASK,
    check_choice,
    check_mask_values,
    check_not_empty,
    check_number,
    check_tensor,
)
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.checks import check_inputs
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.vocabulary.backend import Head

DEPENDENCIES = ("k3", "kl", "logratio")


def check_hidden(hidden: Any, head: Head, targets: Any, mask: Any) -> tuple[Tensor, Head]:
    """Returns hidden states (..., D) and head, cast as autocast says, once they fit together and to the targets."""
    hidden, weight = as_autocast(hidden, head.weight)
    bias = None if head.bias is None else as_autocast(head.bias)[0]
    if not isinstance(hidden, Tensor):
        raise TypeError(f"hidden: expected a tensor, got {type(hidden).__name__}")
    if hidden.dim() < 2:
        raise ValueError(f"hidden: expected shape (..., D) with at least two dimensions, got {tuple(hidden.shape)}")
    check_tensor("hidden", hidden, shape=("...",) * hidden.dim(), dtypes=FLOATING)
    check_not_empty("hidden", hidden)
    check_tensor("weight", weight, shape=("V", hidden.shape[-1]), dtypes=(hidden.dtype,), device=hidden.device)
    check_not_empty("weight", weight)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=(hidden.dtype,), device=hidden.device)
    _check_of_tokens(hidden, targets, mask)
    return hidden, Head(weight, bias, *_scaling(head.temperature, head.softcap))


def check_hidden_loss(
    hidden: Any, head: Head, targets: Any, inputs: LossInputs, num_items: Any, config: Any, memory_budget: Any
) -> tuple[Tensor, Head, LossInputs, PolicyLossConfig]:
    """Returns hidden states (B, T, D) and head as `check_hidden` does, and what the loss takes beside them."""
    hidden, head = check_hidden(hidden, head, targets, None)
    check_tensor("hidden", hidden, shape=("B", "T", "D"), dtypes=(hidden.dtype,))
    inputs, config = check_inputs(inputs, num_items, config, targets.shape, hidden)
    if memory_budget is not None:
        if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
            raise TypeError(f"memory_budget: expected a number of bytes, an int, got {memory_budget!r}")
        if memory_budget < 1:
            raise ValueError(f"memory_budget: expected at least 1 byte, got {memory_budget}")
    return hidden, head, inputs, config


def check_dependency(
    hidden: Any, corrupted: Any, head: Head, weight_corrupted: Any, targets: Any, mask: Any, kind: Any
) -> tuple[Tensor, Tensor, Head, Tensor]:
    """Returns both hidden states, head and the weight of the other head, as `check_hidden` does."""
    check_choice("kind", kind, DEPENDENCIES)
    hidden, head = check_hidden(hidden, head, targets, mask)
    corrupted, other = as_autocast(corrupted, head.weight if weight_corrupted is None else weight_corrupted)
    check_tensor("hidden_corrupted", corrupted, shape=hidden.shape, dtypes=(hidden.dtype,), device=hidden.device)
    check_tensor("weight_corrupted", other, shape=head.weight.shape, dtypes=(hidden.dtype,), device=hidden.device)
    return hidden, corrupted, head, other


def check_logits(
    logits: Any, targets: Any, mask: Any, temperature: Any, softcap: Any, shape: tuple[str, ...] | None = None
) -> tuple[float, float | None]:
    """Checks logits (..., V), or of that shape, against targets and mask; returns temperature and soft-cap."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if logits.dim() < 2:
        raise ValueError(f"logits: expected shape (..., V) with at least two dimensions, got {tuple(logits.shape)}")
    check_tensor("logits", logits, shape=shape or ("...",) * logits.dim(), dtypes=FLOATING)
    check_not_empty("logits", logits)
    _check_of_tokens(logits, targets, mask)
    return _scaling(temperature, softcap)


def check_logits_loss(
    logits: Any,
    targets: Any,
    inputs: LossInputs,
    num_items: Any,
    config: Any,
    temperature: Any,
    softcap: Any,
    inplace: bool,
) -> tuple[LossInputs, PolicyLossConfig, float, float | None]:
    """Checks logits (B, T, V) and returns what the loss takes beside them."""
    scaling = check_logits(logits, targets, None, temperature, softcap, ("B", "T", "V"))
    inputs, config = check_inputs(inputs, num_items, config, targets.shape, logits)
    if inplace and logits.requires_grad and logits.is_leaf:
        raise ValueError("inplace: expected logits that a model has made, got a leaf tensor that requires a gradient")
    if inplace and logits.stride(-1) != 1:
        raise ValueError(f"inplace: expected logits with a last stride of 1, got strides {logits.stride()}")
    return inputs, config, *scaling


def valid_tokens(name: str, mask: Tensor | None, targets: Tensor, vocabulary: int, impl: str | None) -> Tensor | None:
    """Returns which tokens count, None: all, once mask and targets hold what they may; waits for a GPU.

    Gathering valid tokens waits for the GPU anyway, and a kernel could not raise.
    """
    if mask is not None and checks_values(impl, targets):
        check_mask_values(name, mask)
    valid = None if mask is None else mask != 0
    wrong = (targets < 0) | (targets >= vocabulary)
    wrong = wrong if valid is None else wrong & valid
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        at = f"position {place[0] if len(place) == 1 else place}"
        raise ValueError(f"targets: expected tokens in [0, {vocabulary}), got {targets[place].item()} at {at}")
    return valid


def _check_of_tokens(tokens: Tensor, targets: Any, mask: Any) -> None:
    """Checks targets and mask against hidden states or logits (..., last), one for each token."""
    shape = tokens.shape[:-1]
    check_tensor("targets", targets, shape=shape, dtypes=(torch.int64,), device=tokens.device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, dtypes=MASK, device=tokens.device)


def _scaling(temperature: Any, softcap: Any) -> tuple[float, float | None]:
    """Returns both as floats."""
    check_number("temperature", temperature, low=0.0, low_open=True)
    if softcap is None:
        return float(temperature), None
    check_number("softcap", softcap, low=0.0, low_open=True)
    return float(temperature), float(softcap)
