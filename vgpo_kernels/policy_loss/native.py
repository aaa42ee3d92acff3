"""The loss on CPUs: csrc/policy_loss.h and csrc/logits.h."""

import functools
import math

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.reference import (
    linear_logprobs,
    logits_gradient,
    logits_kl,
    logits_logprobs,
    logits_loss,
    scale_,
)

__all__ = ["linear_logprobs", "logits_gradient", "logits_kl", "logits_logprobs", "logits_loss", "policy_loss", "scale_"]


@functools.lru_cache(maxsize=64)
def settings(config: PolicyLossConfig) -> Tensor:
    """Returns what csrc/terms.h reads of `config`: (7,) float64, not to be changed."""
    limits = (math.inf if limit is None else limit for limit in (config.kl_log_ratio_limit, config.kl_limit))
    values = (config.loss_type == "cispo", *config.log_bounds(), config.beta, *limits)
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    ref_logps: Tensor | None,
    token_weights: Tensor | None,
    trajectory_weights: Tensor | None,
    num_items: Tensor | None,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns loss (), per-token loss (B, T), metrics, unnormalised gradient (B, T) and its normaliser ()."""
    if advantages.dim() == 1:
        advantages = advantages[:, None].expand(logps.shape)
    per_token, gradient = (torch.empty(logps.shape, dtype=torch.float32) for _ in "lg")
    rows = torch.empty((logps.shape[0], terms.ROW_COLUMNS), dtype=torch.float32)
    _native.call(
        "policy_loss",
        per_token,
        gradient,
        rows,
        logps,
        _floats(old_logps),
        _floats(advantages),
        _bytes(completion_mask),
        _floats(ref_logps),
        _floats(token_weights),
        _floats(trajectory_weights),
        settings(config),
        config.importance_sampling_level == "sequence",
        config.loss_type == "grpo",
    )
    loss, metrics, scale = terms.reduce_rows(rows, config, num_items)
    return loss, per_token, metrics, gradient, scale


def _floats(values: Tensor | None) -> Tensor | None:
    """Returns the values in a dtype that the CPU kernels take."""
    return values.float() if values is not None and values.dtype == torch.float64 else values


def _bytes(mask: Tensor) -> Tensor:
    """Returns the mask as bytes that are 0 where it is."""
    return mask if mask.dtype in (torch.bool, torch.uint8) else mask != 0
