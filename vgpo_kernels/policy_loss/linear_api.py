"""The public functions that start at hidden states: log-probabilities, the loss, visual dependency. No logits."""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._operator import as_autocast
from vgpo_kernels._validate import check_choice, check_tensor
from vgpo_kernels.policy_loss import linear_ops
from vgpo_kernels.policy_loss.api import PolicyLossOutput, named_metrics
from vgpo_kernels.policy_loss.arguments import (
    check_by_token,
    check_config,
    check_head,
    check_of_tokens,
    check_scaling,
    constants,
    num_items_tensor,
)
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.logprob import compute_dtype

DEPENDENCIES = ("k3", "kl", "logratio")


class LinearLogprobs(NamedTuple):
    """What `linear_logprobs` and `selective_logprobs` return, each shaped as `targets`, fp32 (fp64 for fp64 input).

    Args:
        logps: log-probability of each target, 0 where masked.
        entropy: of each token's distribution, in nats, 0 where masked; None unless asked for.
        lse: natural-log sum of exponentials of the scaled logits, 0 where masked.
    """

    logps: Tensor
    entropy: Tensor | None
    lse: Tensor


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    entropy: bool = False,
    impl: str | None = None,
) -> LinearLogprobs:
    """Returns the log-probabilities of tokens straight from hidden states; the logits are never whole.

    The logits are hidden @ weight^T + bias in float32, bounded by `softcap` and divided by `temperature`. On a GPU they
    exist in registers only; elsewhere, and in the backward, which makes them once more, a few tokens' at a time.
    Differentiable in hidden, weight and bias through all three results; the gradient of the weight is summed in
    float32. Masked tokens cost nothing, may hold anything, and have a gradient of exactly 0. Under autocast hidden,
    weight and bias are cast as `torch.nn.functional.linear` casts them. The targets are checked, for which a GPU is
    waited for.

    Args:
        hidden: (..., D) floating, last-layer states after the final norm, each at the position BEFORE its target.
        weight: (V, D), the head's, in the dtype of `hidden`.
        targets: (...) int64, the sampled tokens.
        bias: (V,), the head's, or None.
        temperature: above 0; that of sampling.
        softcap: logits become softcap * tanh(logits / softcap); None: as they are.
        mask: (...) bool or 0/1, which tokens count; None: all.
        entropy: return the entropies, too.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        LinearLogprobs(logps, entropy, lse).

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: a shape or device does not fit, a target is no token of the vocabulary, a number is out of range.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> linear_logprobs(hidden, weight, torch.tensor([1, 2])).logps
        tensor([-0.5514, -0.5514])

    Source: log softmax(hidden @ weight^T)[target]; entropy = lse - sum softmax(z) z.
    """
    hidden, weight = as_autocast(hidden, weight)
    bias = None if bias is None else as_autocast(bias)[0]
    check_head(hidden, weight, bias)
    check_of_tokens(hidden, targets, mask)
    temperature, softcap = check_scaling(temperature, softcap)
    logps, lse, entropies = linear_ops.linear_logprobs(
        hidden, weight, bias, targets, *constants(mask), temperature, softcap, bool(entropy), impl
    )
    return LinearLogprobs(logps, entropies if entropy else None, lse)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    bias: Tensor | None = None,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    trajectory_weights: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    config: PolicyLossConfig | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    memory_budget: int | None = None,
    impl: str | None = None,
) -> PolicyLossOutput:
    """Returns `policy_loss` of hidden states and a head, with its gradients, in three matrix products and no logits.

    The loss, its metrics and every option are those of `policy_loss`. The gradients of hidden, weight and bias, where
    they are wanted, are made in the forward, a few tokens at a time; the backward only scales them, and has no
    derivative. With importance_sampling_level="sequence" the ratio of a row needs all of its log-probabilities first:
    one product more, a first pass. Without any gradient wanted there is one product. Masked tokens are left out before
    the first product. The targets are checked and the valid tokens gathered, for which a GPU is waited for.

    Args:
        hidden: (B, T, D) floating, last-layer states after the final norm, each at the position BEFORE its target.
        weight: (V, D), the head's, in the dtype of `hidden`. Its gradient is summed in float32.
        targets: (B, T) int64, the sampled tokens; anything where masked.
        old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights, config,
        num_items_in_batch:
            as in `policy_loss`.
        bias: (V,), the head's, or None.
        temperature: above 0; that of sampling.
        softcap: logits become softcap * tanh(logits / softcap) before; None: as they are.
        memory_budget: bytes of the buffers for logits and their gradient, at least one token's and some 4 MiB (12 MiB
            for half precision on a CPU); None: 108 MB on a CPU, 512 MB elsewhere.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        PolicyLossOutput(loss, per_token_loss, metrics, logps, entropy); the metrics have `entropy`, too.

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: as in `policy_loss`; a target is no token of the vocabulary; a budget that holds no token.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2)[None].requires_grad_(), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> targets, mask = torch.tensor([[1, 2]]), torch.tensor([[True, False]])
        >>> out = linear_policy_loss(hidden, weight, targets, None, torch.tensor([0.5]), mask)
        >>> out.loss.backward()
        >>> hidden.grad[0]
        tensor([[-0.2119,  0.1060],
                [ 0.0000,  0.0000]])

    Source: VGPO, arXiv 2604.09349; terms and averages as in TRL 1.16, `GRPOTrainer._compute_loss`.
    """
    config = check_config(config)
    hidden, weight = as_autocast(hidden, weight)
    bias = None if bias is None else as_autocast(bias)[0]
    check_head(hidden, weight, bias)
    check_tensor("hidden", hidden, shape=("B", "T", "D"), dtypes=(hidden.dtype,))
    check_of_tokens(hidden, targets, None)
    by_token = (old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights)
    check_by_token(targets.shape, hidden.device, *by_token, config)
    num_items = num_items_tensor(num_items_in_batch, config, hidden.device, compute_dtype(hidden))
    temperature, softcap = check_scaling(temperature, softcap)
    _check_budget(memory_budget)
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    loss, per_token, metrics, logps, entropy, *_ = linear_ops.linear_policy_loss(
        hidden,
        weight,
        bias,
        targets,
        *constants(*by_token, num_items),
        temperature,
        softcap,
        memory_budget,
        *wanted,
        *config.values(),
        impl,
    )
    return with_logps(loss, per_token, metrics, logps, entropy, completion_mask)


def with_logps(
    loss: Tensor, per_token: Tensor, metrics: Tensor, logps: Tensor, entropy: Tensor, completion_mask: Tensor
) -> PolicyLossOutput:
    """Returns the output of a loss that knows the distributions."""
    entropy = entropy.detach()
    mean = entropy.sum() / (completion_mask != 0).sum().clamp(min=1)
    return PolicyLossOutput(
        loss, per_token.detach(), named_metrics(metrics) | {"entropy": mean}, logps.detach(), entropy
    )


def linear_visual_dependency(
    hidden: Tensor,
    hidden_corrupted: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    kind: str = "k3",
    weight_corrupted: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> Tensor:
    """Returns how much each token depends on the image: how far it moves when the image is corrupted.

    p are the probabilities with the image (`hidden`), q those with a blank, masked or noisy one (`hidden_corrupted`),
    of the same tokens. A constant: no gradient flows into it. The logits of a few tokens exist at a time at most.

    Args:
        hidden: (..., D) floating, states that see the image, each at the position BEFORE its target.
        hidden_corrupted: (..., D), the same with a corrupted image.
        weight: (V, D), the head's, in the dtype of `hidden`.
        targets: (...) int64, the sampled tokens.
        kind: "logratio": log p - log q of the target; "k3": exp(d) - d - 1 with d = log q - log p of the target, which
            estimates KL(p || q) from one sample and is never negative; "kl": KL(p || q) over the whole vocabulary.
        weight_corrupted: (V, D), the head of the model that made `hidden_corrupted`; None: the same.
        bias, temperature, softcap, mask, impl: as in `linear_logprobs`.

    Returns:
        (...) fp32 (fp64 for fp64 input), 0 where masked.

    Raises:
        TypeError, ValueError, RuntimeError: as in `linear_logprobs`; `kind` is none of those above.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> linear_visual_dependency(hidden, 0 * hidden, weight, torch.tensor([1, 0]), kind="logratio")
        tensor([ 0.5472, -0.4528])

    Source: k3 is John Schulman's estimator of a KL divergence.
    """
    check_choice("kind", kind, DEPENDENCIES)
    hidden, hidden_corrupted, weight = as_autocast(hidden, hidden_corrupted, weight)
    bias = None if bias is None else as_autocast(bias)[0]
    other = weight if weight_corrupted is None else as_autocast(weight_corrupted)[0]
    check_head(hidden, weight, bias)
    check_of_tokens(hidden, targets, mask)
    check_tensor("hidden_corrupted", hidden_corrupted, shape=hidden.shape, dtypes=(hidden.dtype,), device=hidden.device)
    check_tensor("weight_corrupted", other, shape=weight.shape, dtypes=(hidden.dtype,), device=hidden.device)
    temperature, softcap = check_scaling(temperature, softcap)
    return linear_ops.linear_visual_dependency(
        *constants(hidden, hidden_corrupted, weight, other, bias, targets, mask), temperature, softcap, kind, impl
    )


def _check_budget(memory_budget: int | None) -> None:
    if memory_budget is None:
        return
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f"memory_budget: expected a number of bytes, an int, got {memory_budget!r}")
    if memory_budget < 1:
        raise ValueError(f"memory_budget: expected at least 1 byte, got {memory_budget}")
