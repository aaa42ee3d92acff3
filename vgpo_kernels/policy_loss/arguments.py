"""Checks of the room's arguments, and what they become."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._validate import FLOATING, INTEGER, MASK, check_not_empty, check_number, check_tensor
from vgpo_kernels.policy_loss.config import PolicyLossConfig

INDEX = (torch.int64,)
DEFAULT = PolicyLossConfig()


def constants(*values: Tensor | None) -> list[Tensor | None]:
    """Returns the tensors without gradient."""
    return [None if value is None else value.detach() for value in values]


def check_config(config: Any) -> PolicyLossConfig:
    """Returns the configuration, or the default one for None."""
    config = DEFAULT if config is None else config
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config: expected a PolicyLossConfig, got {type(config).__name__}")
    return config


def check_by_token(
    shape: tuple[int, ...],
    device: torch.device,
    old_logps: Any,
    advantages: Any,
    completion_mask: Any,
    ref_logps: Any,
    token_weights: Any,
    trajectory_weights: Any,
    config: PolicyLossConfig,
) -> None:
    """Checks what the loss takes beside log-probabilities, each (B, T), which `shape` is, or (B,)."""
    rows, length = shape
    check_tensor("completion_mask", completion_mask, shape=(rows, length), dtypes=MASK, device=device)
    if isinstance(advantages, Tensor) and advantages.shape not in ((rows,), (rows, length)):
        raise ValueError(f"advantages: expected shape ({rows},) or ({rows}, {length}), got {tuple(advantages.shape)}")
    by_row = isinstance(advantages, Tensor) and advantages.dim() == 1
    shapes: dict[str, tuple[Any, tuple[int, ...]]] = {
        "advantages": (advantages, (rows,) if by_row else (rows, length)),
        "old_logps": (old_logps, (rows, length)),
        "ref_logps": (ref_logps, (rows, length)),
        "token_weights": (token_weights, (rows, length)),
        "trajectory_weights": (trajectory_weights, (rows,)),
    }
    for name, (value, shape) in shapes.items():
        if value is not None or name == "advantages":
            check_tensor(name, value, shape=shape, dtypes=FLOATING, device=device)
    if config.beta != 0.0 and ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor because config.beta is {config.beta}, got None")


def num_items_tensor(value: Any, config: PolicyLossConfig, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Returns `num_items_in_batch` as a () tensor, or None where it is."""
    if value is None:
        return None
    if not config.divides_by_num_items:
        raise ValueError(f"num_items_in_batch: expected None with loss_type {config.loss_type!r}, got {value!r}")
    if isinstance(value, Tensor):
        check_tensor("num_items_in_batch", value, shape=(), dtypes=INTEGER + FLOATING, device=device)
        return value
    check_number("num_items_in_batch", value, low=0.0)
    return torch.full((), value, dtype=dtype, device=device)


def check_scaling(temperature: Any, softcap: Any) -> tuple[float, float | None]:
    """Returns both as floats."""
    check_number("temperature", temperature, low=0.0, low_open=True)
    if softcap is None:
        return float(temperature), None
    check_number("softcap", softcap, low=0.0, low_open=True)
    return float(temperature), float(softcap)


def check_head(hidden: Any, weight: Any, bias: Any, *, name: str = "hidden", weight_name: str = "weight") -> None:
    """Checks hidden states (..., D) against a head's weight (V, D) and bias (V,), of one dtype."""
    if not isinstance(hidden, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(hidden).__name__}")
    if hidden.dim() < 2:
        raise ValueError(f"{name}: expected shape (..., D) with at least two dimensions, got {tuple(hidden.shape)}")
    check_tensor(name, hidden, shape=("...",) * hidden.dim(), dtypes=FLOATING)
    check_not_empty(name, hidden)
    check_tensor(weight_name, weight, shape=("V", hidden.shape[-1]), dtypes=(hidden.dtype,), device=hidden.device)
    check_not_empty(weight_name, weight)
    if bias is not None:
        check_tensor("bias", bias, shape=(weight.shape[0],), dtypes=(hidden.dtype,), device=hidden.device)


def check_of_tokens(tokens: Tensor, targets: Any, mask: Any) -> None:
    """Checks targets and mask against hidden states or logits (..., last), one for each token."""
    shape = tokens.shape[:-1]
    check_tensor("targets", targets, shape=shape, dtypes=INDEX, device=tokens.device)
    if mask is not None:
        check_tensor("mask", mask, shape=shape, dtypes=MASK, device=tokens.device)


def check_logits(logits: Any, shape: tuple[str, ...]) -> None:
    """Checks logits (..., V)."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"logits: expected a tensor, got {type(logits).__name__}")
    if logits.dim() < 2:
        raise ValueError(f"logits: expected shape (..., V) with at least two dimensions, got {tuple(logits.shape)}")
    check_tensor("logits", logits, shape=shape or ("...",) * logits.dim(), dtypes=FLOATING)
    check_not_empty("logits", logits)
