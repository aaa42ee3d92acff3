"""The loss on CPUs: csrc/policy_loss.h and csrc/logits.h."""

import functools
import math

import torch
from torch import Tensor

from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.reference import (
    linear_logprobs,
    logits_gradient,
    logits_kl,
    logits_logprobs,
    logits_loss,
    policy_loss,
    scale_,
)

__all__ = ["linear_logprobs", "logits_gradient", "logits_kl", "logits_logprobs", "logits_loss", "policy_loss", "scale_"]


@functools.lru_cache(maxsize=64)
def settings(config: PolicyLossConfig) -> Tensor:
    """Returns what csrc/terms.h reads of `config`: (7,) float64, not to be changed."""
    limits = (math.inf if limit is None else limit for limit in (config.kl_log_ratio_limit, config.kl_limit))
    values = (config.loss_type == "cispo", *config.log_bounds(), config.beta, *limits)
    return torch.tensor(values, dtype=torch.float64, device="cpu")
