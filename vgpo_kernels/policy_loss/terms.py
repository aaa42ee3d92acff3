"""The policy loss, term by term, in plain torch: ratio, clip, KL, weights, reduction.

The one place where the loss is written. Each term returns its derivative, in closed form, beside its value: what
autograd makes of a clamp is 0 times what lies behind it, NaN where exp overflowed there. Shapes are (B, T) unless said
otherwise; at token level every term works on any shape, so a caller that holds a chunk of tokens at a time can use them
too. `valid` is the completion mask as bool; `clean` drops what lies at masked positions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.config import PolicyLossConfig

# What `reduce_rows` returns, in this order: means over the valid tokens, then one maximum.
MEANS = (
    "clip_fraction_low",
    "clip_fraction_high",
    "clip_fraction_dual",
    "approx_kl",
    "kl",
    "ratio_mean",
    "entropy_proxy",
)
METRICS = (*MEANS, "ratio_max")
# Columns of a row's partial results: weighted loss, number of tokens, a sum for each of MEANS, ratio_max.
ROW_COLUMNS = 2 + len(METRICS)


class Loss(NamedTuple):
    """The loss of each token with its derivative, before any average.

    Args:
        per_token: (B, T), 0 where masked.
        gradient: (B, T), d(sum of per_token) / d logps, exactly 0 where masked.
        log_ratio: (B, T), log of the importance ratio in use (constant along a row at sequence level).
        kl: (B, T), the KL to the reference as it enters the loss, before beta; 0 without reference log-probabilities.
    """

    per_token: Tensor
    gradient: Tensor
    log_ratio: Tensor
    kl: Tensor


def clean(values: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `values` in `dtype` with 0 at masked positions."""
    return torch.where(valid, values.to(dtype), 0.0)


def effective_advantages(inputs: LossInputs, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns advantage x token weight x trajectory weight, (B, T)."""
    weighted = inputs.advantages.to(dtype)
    if weighted.dim() == 1:
        weighted = weighted[:, None]
    if inputs.token_weights is not None:
        weighted = weighted * inputs.token_weights.to(dtype)
    if inputs.trajectory_weights is not None:
        weighted = weighted * inputs.trajectory_weights.to(dtype)[:, None]
    return clean(weighted, valid, dtype)


def importance_log_ratio(logps: Tensor, old_logps: Tensor, valid: Tensor, level: str) -> Tensor:
    """Returns the log of the importance ratio; at sequence level the mean over the row's tokens."""
    log_ratio = logps - old_logps
    if level == "token":
        return log_ratio
    return (log_ratio.sum(-1, keepdim=True) * inverse_lengths(valid, log_ratio.dtype)).expand_as(log_ratio)


def k3(difference: Tensor) -> Tensor:
    """Returns exp(d) - d - 1, inf at d = inf too, where these terms are inf - inf."""
    return torch.where(difference == math.inf, difference, difference.exp() - difference - 1.0)


def surrogate(logps: Tensor, log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Tensor]:
    """Returns the clipped policy-gradient loss of each token and its derivative by the log-ratio, for "cispo" by logps.

    Clipping, two-sided clipping and dual clipping all bound the ratio, from below or above depending on the
    advantage's sign. The bound is set on the log-ratio: a ratio that would overflow is cut before exp, and
    its gradient is 0, not NaN.
    """
    low, high, high_negative = config.log_bounds()
    negative = advantages < 0
    bounded = torch.where(negative, log_ratio.clamp(min=low, max=high_negative), log_ratio.clamp(max=high))
    loss = -bounded.exp() * advantages
    if config.loss_type == "cispo":
        return loss * logps, loss
    outside = torch.where(negative, (log_ratio < low) | (log_ratio > high_negative), log_ratio > high)
    return loss, torch.where(outside, 0.0, loss)


def kl_to_reference(
    logps: Tensor, log_ratio: Tensor, ref_logps: Tensor, config: PolicyLossConfig
) -> tuple[Tensor, Tensor]:
    """Returns the KL of each token as it enters the loss and its derivative by the token's logps.

    The KL is k3 of d = ref - new, clamped, times the importance ratio where `kl_importance_weighted`. At sequence level
    the derivative holds the row's ratio constant.
    """
    difference = ref_logps - logps
    outside = torch.zeros_like(difference, dtype=torch.bool)
    if config.kl_log_ratio_limit is not None:
        outside = difference.abs() > config.kl_log_ratio_limit
        difference = difference.clamp(-config.kl_log_ratio_limit, config.kl_log_ratio_limit)
    kl, slope = k3(difference), 1.0 - difference.exp()
    if config.kl_limit is not None:
        outside = outside | (kl.abs() > config.kl_limit)
        kl = kl.clamp(-config.kl_limit, config.kl_limit)
    if not config.kl_importance_weighted:
        return kl, torch.where(outside, 0.0, slope)
    # Where exp(d) overflows alone, ratio * exp(d) need not.
    ratio, product = log_ratio.exp(), (log_ratio + difference).exp()
    weighted = torch.where((kl == math.inf) & (difference > 0), product, _times(ratio, kl))
    if config.importance_sampling_level == "sequence":
        return weighted, torch.where(outside, 0.0, torch.where(slope == -math.inf, -product, _times(ratio, slope)))
    # ratio * slope + ratio * kl, the second of which comes through the ratio: exp(d) cancels.
    return weighted, torch.where(outside, weighted, _times(ratio, -difference))


def _times(ratio: Tensor, values: Tensor) -> Tensor:
    """Returns the product, 0 where a value is, whatever the ratio overflowed to."""
    return torch.where(values == 0, 0.0, ratio * values)


def loss_with_gradient(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None,
    valid: Tensor,
    config: PolicyLossConfig,
) -> Loss:
    """Returns surrogate + beta * KL of each token, with its derivative.

    All tensors cleaned (`clean`) and of one dtype; `old_logps` None stands for `logps` without gradient.
    """
    sequence = config.importance_sampling_level == "sequence"
    old = logps if old_logps is None else old_logps
    log_ratio = importance_log_ratio(logps, old, valid, config.importance_sampling_level)
    loss, gradient = surrogate(logps, log_ratio, advantages, config)
    by_row_ratio = torch.zeros_like(loss)
    if sequence and config.loss_type != "cispo":
        by_row_ratio, gradient = gradient, by_row_ratio
    kl = torch.zeros_like(loss)
    if ref_logps is not None:
        kl, by_logps = kl_to_reference(logps, log_ratio, ref_logps, config)
        if config.beta != 0.0:
            loss = loss + config.beta * kl
            gradient = gradient + config.beta * by_logps
            if config.kl_importance_weighted:
                by_row_ratio = by_row_ratio + config.beta * kl
    if sequence:
        # The ratio is of the mean log-ratio: each of the row's tokens moves it by an equal share.
        total = torch.where(valid, by_row_ratio, 0.0).sum(-1, keepdim=True)
        gradient = gradient + total * inverse_lengths(valid, loss.dtype)
    return Loss(torch.where(valid, loss, 0.0), torch.where(valid, gradient, 0.0), log_ratio, kl)


def row_weights(valid: Tensor, config: PolicyLossConfig, dtype: torch.dtype) -> Tensor | None:
    """Returns what each token's loss is multiplied by because of its row, (B, T), or None where that is 1."""
    return inverse_lengths(valid, dtype).expand(valid.shape) if config.loss_type == "grpo" else None


def row_multiplier(valid: Tensor, config: PolicyLossConfig, dtype: torch.dtype) -> Tensor:
    """Returns the factor () that makes no row weight smaller than 1: half precision would lose small gradients."""
    if config.loss_type != "grpo":
        return torch.ones((), dtype=dtype, device=valid.device)
    return valid.sum(-1).amax().clamp(min=1).to(dtype)


def inverse_lengths(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 1 / (number of valid tokens) of each row, (B, 1); 1 for a row without any."""
    return 1.0 / valid.sum(-1, keepdim=True).clamp(min=1).to(dtype)


def row_results(
    loss: Loss,
    row_weights: Tensor,
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    valid: Tensor,
    config: PolicyLossConfig,
) -> Tensor:
    """Returns each row's partial results, (B, ROW_COLUMNS); `row_weights` () or (B, T) multiply the loss alone."""
    low, high, high_negative = config.log_bounds()
    change = torch.zeros_like(logps) if old_logps is None else logps - old_logps
    log_ratio = loss.log_ratio
    ratio = clean(log_ratio.exp(), valid, logps.dtype)
    summed = (
        loss.per_token * row_weights,
        valid,
        (advantages < 0) & (log_ratio < low),
        (advantages > 0) & (log_ratio > high),
        (advantages < 0) & (log_ratio > high_negative),
        k3(change),
        clean(loss.kl, valid, logps.dtype),
        ratio,
        -logps,
    )
    sums = [values.to(logps.dtype).sum(-1) for values in summed]
    return torch.stack([*sums, ratio.amax(-1)], dim=-1)


def reduce_rows(rows: Tensor, config: PolicyLossConfig, num_items: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns loss (), metrics (len(METRICS),) and the factor () between the sum over tokens and the loss.

    Args:
        rows: (B, ROW_COLUMNS), partial results of each row.
        config: settings of the loss.
        num_items: () number of tokens that "dapo" and "cispo" divide by; None: those of `rows`.
    """
    totals = rows.sum(0)
    tokens = totals[1].clamp(min=1.0)
    factor = normalizer(tokens, rows.shape[0], config, num_items)
    metrics = torch.cat([totals[2:-1] / tokens, rows[:, -1:].amax(0)])
    return totals[0] * factor, metrics, factor


def normalizer(tokens: Tensor, rows: int, config: PolicyLossConfig, num_items: Tensor | None) -> Tensor:
    """Returns the factor () between the sum over tokens, weighted by row, and the loss.

    Args:
        tokens: () floating, the number of valid tokens, at least 1.
        rows: of the batch.
        config: settings of the loss.
        num_items: () number of tokens that "dapo" and "cispo" divide by; None: `tokens`.
    """
    if config.loss_type == "grpo":
        return torch.full_like(tokens, 1.0 / rows)
    if config.loss_type == "dr_grpo" and config.max_completion_length is not None:
        return torch.full_like(tokens, 1.0 / (rows * config.max_completion_length))
    if config.divides_by_num_items and num_items is not None:
        return 1.0 / num_items.to(tokens.dtype).clamp(min=1.0)
    return 1.0 / tokens
