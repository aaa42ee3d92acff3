"""The vocabulary pass in plain torch: log-probabilities, entropy and their gradient from blocks of logits.

Logits are (B, T, V), rows of V; a block is a few rows, small enough for a cache. Scaled logits z are what the softmax
is taken of: x soft-capped, softcap * tanh(x / softcap), then divided by the temperature. Everything is computed in
float32, or float64 where the logits are.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dtypes import compute_dtype
from vgpo_kernels.policy_loss import terms
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.reference import policy_loss
from vgpo_kernels.vocabulary.matmul import logits_of

__all__ = [
    "fused_logprobs",
    "logits_gradient",
    "logits_kl",
    "logits_logprobs",
    "logits_loss",
    "logits_of",
    "policy_loss",
    "scale_gradient_",
]

BLOCK = 1 << 18  # elements
# exp of it is 0 in float32 and float64: a logit of -inf may become it, so that 0 * log(0) is 0.
_LOWEST = -1e4


# No kernel goes from hidden states to log-probabilities without logits.
fused_logprobs = None


def logits_logprobs(
    logits: Tensor, targets: Tensor, valid: Tensor | None, temperature: float, softcap: float | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns logps, LSE and entropy (None unless asked for) of each row, (B, T) each, 0 in rows that are not valid.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64, in [0, V) where valid.
        valid: (B, T) bool; None: every row.
        temperature: divides the logits.
        softcap: bounds the logits before that, or None.
        entropy: compute the entropy, too.
    """
    shape, dtype = targets.shape, compute_dtype(logits.dtype)
    logps, lse, entropies = (torch.zeros(shape, dtype=dtype, device=logits.device) for _ in range(3))
    for block in _blocks(logits, valid):
        z, _ = _scaled(logits[block], temperature, softcap)
        highest = z.amax(-1, keepdim=True)
        z.sub_(highest)
        chosen = z.gather(-1, targets[block].unsqueeze(-1)).squeeze(-1)
        shifted = z.clamp(min=_LOWEST) if entropy else None
        total = z.exp_().sum(-1)
        log_total = total.log()
        # The distance to the largest logit first: close to a probability of 1 an LSE would cancel against the logit.
        logps[block] = chosen - log_total
        lse[block] = highest.squeeze(-1) + log_total
        if shifted is not None:
            entropies[block] = log_total - shifted.mul_(z).sum(-1) / total
    return logps, lse, entropies if entropy else None


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
    """Writes to `out` the gradient of sum(grad_logps * logps + grad_entropy * entropy + grad_lse * lse) by the logits.

    Args:
        logits: (B, T, V).
        targets: (B, T) int64.
        valid: (B, T) bool; None: every row.
        lse, entropy: (B, T), of `logits_logprobs`; the entropy is needed with `grad_entropy` only.
        grad_logps, grad_entropy, grad_lse: (B, T); None: 0.
        temperature, softcap: as in `logits_logprobs`.
        out: (B, T, V), any floating dtype; may be `logits` itself. Rows that are not valid become 0.
    """
    if valid is not None:
        out.masked_fill_(~valid.unsqueeze(-1), 0.0)
    for block in _blocks(logits, valid):
        z, slope = _scaled(logits[block], temperature, softcap)
        log_p = z.sub_(lse[block].unsqueeze(-1))
        factor = torch.zeros_like(lse[block]) if grad_lse is None else grad_lse[block]
        if grad_logps is not None:
            factor = factor - grad_logps[block]
        if grad_entropy is None or entropy is None:
            dz = log_p.exp_().mul_(factor.unsqueeze(-1))
        else:
            by_entropy = grad_entropy[block].unsqueeze(-1)
            bracket = factor.unsqueeze(-1) - by_entropy * (log_p.clamp(min=_LOWEST) + entropy[block].unsqueeze(-1))
            dz = log_p.exp_().mul_(bracket)
        if grad_logps is not None:
            dz.scatter_add_(-1, targets[block].unsqueeze(-1), grad_logps[block].to(dz.dtype).unsqueeze(-1))
        dz.div_(temperature)
        out[block] = (dz if slope is None else dz.mul_(slope)).to(out.dtype)


def logits_kl(logits_p: Tensor, logits_q: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Returns KL(softmax(p) || softmax(q)) of each row, (n,), of two (n, V) logits."""
    rows = max(1, BLOCK // logits_p.shape[-1])
    parts = []
    for block_p, block_q in zip(logits_p.split(rows), logits_q.split(rows), strict=True):
        log_p = _scaled(block_p, temperature, softcap)[0].log_softmax(-1)
        log_q = _scaled(block_q, temperature, softcap)[0].log_softmax(-1)
        p = log_p.exp()
        # Where p is 0 it contributes nothing, whatever the logarithms are.
        parts.append(torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(-1).clamp_(min=0.0))
    return torch.cat(parts) if parts else logits_p.new_zeros(0, dtype=compute_dtype(logits_p.dtype))


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
    new, weighted = (terms.clean(x, here, logps.dtype) for x in (logps, advantages))
    old, ref = (None if x is None else terms.clean(x, here, logps.dtype) for x in (old_logps, ref_logps))
    by_token = config.replace(importance_sampling_level="token")
    coefficients = terms.loss_with_gradient(new, old, weighted, ref, here, by_token).gradient
    if row_weights is not None:
        coefficients = coefficients * row_weights
    logits_gradient(logits, targets, valid, lse, None, coefficients, None, None, temperature, softcap, out)
    return logps, entropy  # type: ignore[return-value]  # asked for


def scale_gradient_(gradient: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient (B, T, V) by factor (), in place."""
    if factor != 1:
        gradient.mul_(factor)


def _blocks(logits: Tensor, valid: Tensor | None) -> Iterator[tuple[Any, Any]]:
    """Yields what indexes a few (valid) rows of (B, T, ...) tensors at a time."""
    batch, length, vocabulary = logits.shape
    rows = max(1, BLOCK // vocabulary)
    if valid is not None:
        row, position = valid.nonzero(as_tuple=True)
        yield from zip(row.split(rows), position.split(rows), strict=True)
        return
    for row_index in range(batch):
        for start in range(0, length, rows):
            yield row_index, slice(start, start + rows)


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Returns scaled logits, a copy, and the derivative of the soft-cap (None without one)."""
    z = logits.to(compute_dtype(logits.dtype), copy=True)
    if softcap is None:
        return z.div_(temperature), None
    tanh = z.div_(softcap).tanh_()
    slope = 1.0 - tanh.square()
    return tanh.mul_(softcap).div_(temperature), slope
