"""The loss on CPUs: csrc/loss/."""

import functools
import math
import sys

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.policy_loss import linear, products, terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.reference import scale_

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


@functools.lru_cache(maxsize=64)
def settings(config: PolicyLossConfig) -> Tensor:
    """Returns what csrc/loss/terms.h reads of `config`: (8,) float64, not to be changed."""
    limits = (math.inf if limit is None else limit for limit in (config.kl_log_ratio_limit, config.kl_limit))
    is_cispo, bounds = config.loss_type == "cispo", config.log_bounds()
    values = (is_cispo, *bounds, config.beta, *limits, config.kl_importance_weighted)
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


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Returns hidden (n, D) @ weight (V, D)^T + bias (V,), written to `out` (n, V) float32.

    torch's product is the faster one for float32; half-precision operands it would have to be given as float32 copies.
    """
    if hidden.dtype == torch.float32 or hidden.dtype != weight.dtype:
        return products.logits_of(hidden, weight, bias, out)
    _native.call("product", out, hidden, weight.t(), False)
    return out if bias is None else out.add_(bias)


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


def logits_logprobs(
    logits: Tensor, targets: Tensor, valid: Tensor | None, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns logps, LSE and entropy (None unless asked for) of each row, (B, T) each, 0 in rows that are not valid."""
    logps, lse, entropies = (_by_token(targets) for _ in range(3))
    found = entropies if entropy else None
    _native.call("logits_logprobs", logps, lse, found, logits, targets, valid, temperature, softcap or 0.0)
    return logps, lse, found


def logits_gradient(
    logits: Tensor,
    targets: Tensor,
    valid: Tensor | None,
    lse: Tensor,
    entropy: Tensor | None,
    grad_logps: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    temperature: float,
    softcap: float | None,
    out: Tensor,
) -> None:
    """Writes to `out` the gradient of sum(grad_logps * logps + grad_entropy * entropy + grad_lse * lse) by the logits,
    which `out` may be."""
    by_token = [_float(x) for x in (lse, entropy, grad_logps, grad_entropy, grad_lse)]
    _native.call("logits_gradient", out, logits, targets, valid, *by_token, temperature, softcap or 0.0)


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
    """Returns logps and entropy (B, T), and writes the gradient of the token-level loss by the logits to `out`."""
    logps, entropy = _by_token(targets), _by_token(targets)
    by_token = [_float(x) for x in (old_logps, advantages, ref_logps, row_weights)]
    of_logits = (logits, targets, valid)
    scaling = (temperature, softcap or 0.0)
    _native.call("logits_loss", out, logps, entropy, *of_logits, *by_token, *scaling, settings(config))
    return logps, entropy


def logits_kl(logits_p: Tensor, logits_q: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Returns KL(softmax(p) || softmax(q)) of each row, (n,), of two (n, V) logits."""
    divergence = logits_p.new_empty(logits_p.shape[0], dtype=torch.float32)
    _native.call("logits_kl", divergence, logits_p, logits_q, temperature, softcap or 0.0)
    return divergence


def _by_token(targets: Tensor) -> Tensor:
    return torch.empty(targets.shape, dtype=torch.float32)


def _float(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.float()
