"""The policy loss in plain torch: the specification, on any device, in float32 or float64."""

import sys

import torch
from torch import Tensor

from vgpo_kernels.policy_loss import linear, terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.logprob import compute_dtype, logits_gradient, logits_kl, logits_logprobs, scale_
from vgpo_kernels.policy_loss.products import logits_of

__all__ = [
    "linear_logprobs",
    "logits_gradient",
    "logits_kl",
    "logits_logprobs",
    "logits_loss",
    "logits_of",
    "policy_loss",
    "scale_",
]


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
    valid = completion_mask != 0
    dtype = compute_dtype(logps)
    new = terms.clean(logps, valid, dtype)
    old = None if old_logps is None else terms.clean(old_logps, valid, dtype)
    ref = None if ref_logps is None else terms.clean(ref_logps, valid, dtype)
    weighted = terms.effective_advantages(advantages, valid, token_weights, trajectory_weights, dtype)

    loss = terms.loss_with_gradient(new, old, weighted, ref, valid, config)
    row_weights = terms.row_weights(valid, config, dtype)
    row_weights = new.new_ones(()) if row_weights is None else row_weights
    rows = terms.row_results(loss, row_weights, new, old, weighted, valid, config)
    total, metrics, scale = terms.reduce_rows(rows, config, num_items)
    return total, loss.per_token, metrics, loss.gradient * row_weights, scale


def linear_logprobs(
    hidden: Tensor,
    index: tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: float,
    softcap: float | None,
    entropy: bool,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns logps, LSE and entropy (None unless asked for), (m,) each, of hidden (..., D) at `index`."""
    head = linear.Head(weight, bias, temperature, softcap)
    return linear.logprobs(sys.modules[__name__], hidden, index, head, targets, entropy, memory_budget)


def logits_loss(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None,
    row_weights: Tensor | None,
    temperature: float,
    softcap: float | None,
    config: PolicyLossConfig,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns logps and entropy (B, T), and writes the gradient of the token-level loss by the logits to `out`.

    `advantages` are those of the loss, weights included; `row_weights` (B, T) multiply each token's loss, None being 1.
    """
    logps, lse, entropy = logits_logprobs(logits, targets, valid, temperature, softcap, True)
    here = torch.ones_like(targets, dtype=torch.bool) if valid is None else valid
    coefficients = _coefficients(logps, old_logps, advantages, ref_logps, here, config)
    if row_weights is not None:
        coefficients = coefficients * row_weights
    logits_gradient(logits, targets, valid, lse, None, coefficients, None, None, temperature, softcap, out)
    return logps, logps.new_zeros(()) if entropy is None else entropy


def _coefficients(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    ref_logps: Tensor | None,
    valid: Tensor,
    config: PolicyLossConfig,
) -> Tensor:
    """Returns the derivative of each token's loss by its log-probability."""
    new = terms.clean(logps, valid, logps.dtype)
    old, ref = (None if x is None else terms.clean(x, valid, logps.dtype) for x in (old_logps, ref_logps))
    weighted = terms.clean(advantages, valid, logps.dtype)
    return terms.loss_with_gradient(
        new, old, weighted, ref, valid, config.replace(importance_sampling_level="token")
    ).gradient
