"""The vocabulary pass on CPUs: csrc/logits.h."""

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.native import policy_loss, settings
from vgpo_kernels.vocabulary.reference import fused_logprobs, scale_gradient_

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


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """Returns hidden (n, D) @ weight (V, D)^T + bias (V,), written to `out` (n, V) float32.

    torch's product is the faster one for float32; half-precision operands it would have to be given as float32 copies.
    """
    if hidden.dtype == torch.float32:
        torch.mm(hidden, weight.t(), out=out)
    else:
        _native.call("product", out, hidden, weight.t(), False)
    return out if bias is None else out.add_(bias)


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
