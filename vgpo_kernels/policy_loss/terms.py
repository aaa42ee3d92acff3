"""The policy loss, term by term, in plain differentiable torch: ratio, clip, KL, weights, reduction.

The one place where the loss is written. Shapes are (B, T) unless said otherwise; at token level every term
works on any shape, so a caller that holds a chunk of tokens at a time can use them too. `valid` is the
completion mask as bool. Inputs must be finite where `valid` is True only: `clean` drops the rest.
"""

from typing import NamedTuple

import torch
from torch import Tensor

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
    """

    per_token: Tensor
    gradient: Tensor
    log_ratio: Tensor


def clean(values: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns `values` in `dtype` with 0 (and a gradient of exactly 0) at masked positions."""
    return torch.where(valid, values.to(dtype), 0.0)


def effective_advantages(
    advantages: Tensor,
    valid: Tensor,
    token_weights: Tensor | None,
    trajectory_weights: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Returns advantage x token weight x trajectory weight, (B, T); `advantages` is (B,) or (B, T)."""
    weighted = advantages.to(dtype)
    if weighted.dim() == 1:
        weighted = weighted[:, None]
    if token_weights is not None:
        weighted = weighted * token_weights.to(dtype)
    if trajectory_weights is not None:
        weighted = weighted * trajectory_weights.to(dtype)[:, None]
    return clean(weighted, valid, dtype)


def importance_log_ratio(logps: Tensor, old_logps: Tensor, valid: Tensor, level: str) -> Tensor:
    """Returns the log of the importance ratio; at sequence level the mean over the row's tokens."""
    log_ratio = logps - old_logps
    if level == "token":
        return log_ratio
    return (log_ratio.sum(-1, keepdim=True) * inverse_lengths(valid, log_ratio.dtype)).expand_as(log_ratio)


def surrogate(logps: Tensor, log_ratio: Tensor, advantages: Tensor, config: PolicyLossConfig) -> Tensor:
    """Returns the clipped policy-gradient loss of each token.

    Clipping, two-sided clipping and dual clipping all bound the ratio, from below or above depending on the
    advantage's sign. The bound is set on the log-ratio: a ratio that would overflow is cut before exp, and
    its gradient is 0, not NaN.
    """
    low, high, high_negative = config.log_bounds()
    if config.loss_type == "cispo":
        return -log_ratio.clamp(max=high).exp().detach() * advantages * logps
    bounded = torch.where(advantages < 0, log_ratio.clamp(min=low, max=high_negative), log_ratio.clamp(max=high))
    return -bounded.exp() * advantages


def kl_to_reference(logps: Tensor, ref_logps: Tensor, config: PolicyLossConfig) -> Tensor:
    """Returns the k3 estimate of KL(policy || reference) of each token: exp(d) - d - 1, d = ref - new."""
    difference = ref_logps - logps
    if config.kl_log_ratio_limit is not None:
        difference = difference.clamp(-config.kl_log_ratio_limit, config.kl_log_ratio_limit)
    divergence = difference.exp() - difference - 1.0
    if config.kl_limit is not None:
        divergence = divergence.clamp(-config.kl_limit, config.kl_limit)
    return divergence


def per_token_loss(
    logps: Tensor,
    log_ratio: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    valid: Tensor,
    config: PolicyLossConfig,
) -> Tensor:
    """Returns surrogate + beta * KL of each token, 0 where masked."""
    loss = surrogate(logps, log_ratio, advantages, config)
    if config.beta != 0.0 and ref_logps is not None:
        loss = loss + config.beta * kl_to_reference(logps, ref_logps, config)
    return torch.where(valid, loss, 0.0)


def loss_with_gradient(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None,
    valid: Tensor,
    config: PolicyLossConfig,
) -> Loss:
    """Returns the loss of each token and its derivative, made here by autograd on a detached copy.

    All tensors cleaned (`clean`) and of one dtype; `old_logps` None stands for `logps` without gradient.
    """
    with torch.enable_grad():
        leaf = logps.detach().clone().requires_grad_()
        old = leaf.detach() if old_logps is None else old_logps
        log_ratio = importance_log_ratio(leaf, old, valid, config.importance_sampling_level)
        loss = per_token_loss(leaf, log_ratio, advantages, ref_logps, valid, config)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    # At sequence level the row mean sends its gradient to padding too; padding is no input.
    return Loss(loss.detach(), torch.where(valid, gradient, 0.0), log_ratio.detach())


def row_weights(valid: Tensor, config: PolicyLossConfig, dtype: torch.dtype) -> Tensor | None:
    """Returns what each token's loss is multiplied by because of its row, (B, T), or None where that is 1."""
    return inverse_lengths(valid, dtype).expand(valid.shape) if config.loss_type == "grpo" else None


def row_scale(valid: Tensor, config: PolicyLossConfig, dtype: torch.dtype) -> Tensor:
    """Returns the factor () that makes no row weight smaller than 1: half precision would lose small gradients."""
    if config.loss_type != "grpo":
        return torch.ones((), dtype=dtype, device=valid.device)
    return valid.sum(-1).amax().clamp(min=1).to(dtype)


def inverse_lengths(valid: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns 1 / (number of valid tokens) of each row, (B, 1); 1 for a row without any."""
    return 1.0 / valid.sum(-1, keepdim=True).clamp(min=1).to(dtype)


def row_results(
    loss: Tensor,
    logps: Tensor,
    old_logps: Tensor | None,
    log_ratio: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None,
    valid: Tensor,
    config: PolicyLossConfig,
) -> Tensor:
    """Returns each row's partial results, (B, ROW_COLUMNS); `loss` is already weighted by row."""
    low, high, high_negative = config.log_bounds()
    change = torch.zeros_like(logps) if old_logps is None else logps - old_logps
    ratio = clean(log_ratio.exp(), valid, logps.dtype)
    kl = torch.zeros_like(logps) if ref_logps is None else kl_to_reference(logps, ref_logps, config)
    summed = (
        loss,
        valid,
        (advantages < 0) & (log_ratio < low),
        (advantages > 0) & (log_ratio > high),
        (advantages < 0) & (log_ratio > high_negative),
        change.exp() - change - 1.0,
        kl,
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
    scale = normalizer(tokens, rows.shape[0], config, num_items)
    metrics = torch.cat([totals[2:-1] / tokens, rows[:, -1:].amax(0)])
    return totals[0] * scale, metrics, scale


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
