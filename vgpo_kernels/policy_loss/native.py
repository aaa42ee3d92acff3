"""The loss on CPUs: csrc/loss/."""

import functools
import math

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.backend import LossInputs, LossResults
from vgpo_kernels.policy_loss.config import PolicyLossConfig


@functools.lru_cache(maxsize=64)
def settings(config: PolicyLossConfig) -> Tensor:
    """Returns what csrc/loss/terms.h reads of `config`: (8,) float64, not to be changed."""
    limits = (math.inf if limit is None else limit for limit in (config.kl_log_ratio_limit, config.kl_limit))
    is_cispo, bounds = config.loss_type == "cispo", config.log_bounds()
    values = (is_cispo, *bounds, config.beta, *limits, config.kl_importance_weighted)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def policy_loss(logps: Tensor, inputs: LossInputs, config: PolicyLossConfig) -> LossResults:
    """Returns the loss of log-probabilities (B, T) and its gradient."""
    advantages = inputs.advantages[:, None].expand(logps.shape) if inputs.advantages.dim() == 1 else inputs.advantages
    per_token = torch.empty(logps.shape, dtype=torch.float32)
    gradient = torch.empty(logps.shape, dtype=torch.float32)
    rows = torch.empty((logps.shape[0], terms.ROW_COLUMNS), dtype=torch.float32)
    _native.call(
        "policy_loss",
        per_token,
        gradient,
        rows,
        logps,
        _floats(inputs.old_logps),
        _floats(advantages),
        _bytes(inputs.completion_mask),
        _floats(inputs.ref_logps),
        _floats(inputs.token_weights),
        _floats(inputs.trajectory_weights),
        settings(config),
        config.importance_sampling_level == "sequence",
        config.loss_type == "grpo",
    )
    loss, metrics, normalizer = terms.reduce_rows(rows, config, inputs.num_items)
    return LossResults(loss, per_token, metrics, gradient, normalizer)


def _floats(values: Tensor | None) -> Tensor | None:
    """Returns the values in a dtype that the CPU kernels take."""
    return values.float() if values is not None and values.dtype == torch.float64 else values


def _bytes(mask: Tensor) -> Tensor:
    """Returns the mask as bytes that are 0 where it is."""
    return mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
