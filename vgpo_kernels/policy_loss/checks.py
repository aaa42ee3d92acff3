"""Checks of the loss's arguments, and what they become."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels._validate import FLOATING, INTEGER, MASK, check_not_empty, check_number, check_tensor
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.config import PolicyLossConfig

DEFAULT = PolicyLossConfig()


def check_policy_loss(
    logps: Any, inputs: LossInputs, num_items: Any, config: Any
) -> tuple[LossInputs, PolicyLossConfig]:
    """Returns what the loss takes beside `logps`."""
    check_tensor("logps", logps, shape=("B", "T"), dtypes=FLOATING)
    check_not_empty("logps", logps)
    return check_inputs(inputs, num_items, config, logps.shape, logps)


def check_inputs(
    inputs: LossInputs, num_items: Any, config: Any, shape: tuple[int, ...], values: Tensor
) -> tuple[LossInputs, PolicyLossConfig]:
    """Returns the inputs without gradient and the configuration, once they fit together.

    Args:
        inputs: as the caller gave them, without `num_items`.
        num_items: `num_items_in_batch` of the public function.
        config: None for the default one.
        shape: B and T.
        values: log-probabilities or what they are made of.
    """
    config = DEFAULT if config is None else config
    if not isinstance(config, PolicyLossConfig):
        raise TypeError(f"config: expected a PolicyLossConfig, got {type(config).__name__}")
    rows, length = shape
    advantages = inputs.advantages
    if isinstance(advantages, Tensor) and advantages.shape not in ((rows,), (rows, length)):
        raise ValueError(f"advantages: expected shape ({rows},) or ({rows}, {length}), got {tuple(advantages.shape)}")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(inputs._fields[:-1], (rows, length))
    shapes["trajectory_weights"] = (rows,)
    if isinstance(advantages, Tensor):
        shapes["advantages"] = advantages.shape
    for name, expected in shapes.items():
        value = getattr(inputs, name)
        if value is not None or name in ("advantages", "completion_mask"):
            dtypes = MASK if name == "completion_mask" else FLOATING
            check_tensor(name, value, shape=expected, dtypes=dtypes, device=values.device)
    if config.beta != 0.0 and inputs.ref_logps is None:
        raise ValueError(f"ref_logps: expected a tensor because config.beta is {config.beta}, got None")
    inputs = inputs._replace(num_items=_num_items(num_items, config, values))
    return LossInputs._make(None if x is None else x.detach() for x in inputs), config


def _num_items(value: Any, config: PolicyLossConfig, values: Tensor) -> Tensor | None:
    """Returns `num_items_in_batch` as a () tensor, or None where it is."""
    if value is None:
        return None
    if not config.divides_by_num_items:
        raise ValueError(f"num_items_in_batch: expected None with loss_type {config.loss_type!r}, got {value!r}")
    if isinstance(value, Tensor):
        check_tensor("num_items_in_batch", value, shape=(), dtypes=INTEGER + FLOATING, device=values.device)
        return value
    check_number("num_items_in_batch", value, low=0.0)
    return torch.full((), value, dtype=compute_dtype(values.dtype), device=values.device)
