"""The public function: arguments checked, then the operator."""

from typing import NamedTuple

from torch import Tensor

from vgpo_kernels.policy_loss import ops
from vgpo_kernels.policy_loss.backend import LossInputs
from vgpo_kernels.policy_loss.checks import check_policy_loss
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.terms import METRICS


class PolicyLossOutput(NamedTuple):
    """What `policy_loss`, `linear_policy_loss` and `logits_policy_loss` return.

    Args:
        loss: (), differentiable with respect to the log-probabilities, or to what they are made of.
        per_token_loss: (B, T), detached: each token's loss before any average, 0 where masked.
        metrics: detached () tensors, means over the valid tokens unless said otherwise (all 0 without any):
            clip_fraction_low, clip_fraction_high: tokens whose ratio is below its lower bound (negative
            advantage) or above its upper one (positive advantage); clip_fraction_dual: tokens with a negative
            advantage whose ratio is above its upper bound (`clip_ratio_dual`, `delta`, or "cispo"'s
            epsilon_high); approx_kl: k3 estimate of KL(old policy || policy), always per token; kl: the KL
            to the reference as it enters the loss, 0 without `ref_logps`; ratio_mean and ratio_max (a
            maximum): of the importance ratio before clipping, at sequence level a row's ratio counted once
            for each of its tokens; entropy_proxy: -logps; entropy: that of the distributions, where logits are made.
        logps, entropy: (B, T) fp32, detached, 0 where masked; None from `policy_loss`, which is given the one and
            cannot know the other.
    """

    loss: Tensor
    per_token_loss: Tensor
    metrics: dict[str, Tensor]
    logps: Tensor | None = None
    entropy: Tensor | None = None


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    completion_mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    token_weights: Tensor | None = None,
    trajectory_weights: Tensor | None = None,
    config: PolicyLossConfig | None = None,
    num_items_in_batch: int | float | Tensor | None = None,
    impl: str | None = None,
) -> PolicyLossOutput:
    """Returns the clipped policy-gradient loss with weighted advantages, and its metrics.

    The advantage of a token is advantages x token_weights x trajectory_weights. Only `logps` gets a gradient
    (first derivatives); every other tensor is a constant. Masked positions may hold anything, NaN included:
    they change nothing and their gradient is exactly 0. At valid tokens a log-probability that is
    NaN shows in loss and gradient; what a clip or a clamp cuts has a gradient of exactly 0, also if exp overflows
    behind it. A row without a valid token has a mean of 0, which still counts among the rows that "grpo" and
    "dr_grpo" average.

    Args:
        logps: (B, T) floating, log-probability of each completion token under the policy. Computed in
            float32; float64 stays float64 (reference only).
        old_logps: (B, T) floating, under the policy that sampled. None: `logps` without gradient (ratio 1).
        advantages: (B,) or (B, T) floating; told apart by the number of dimensions.
        completion_mask: (B, T) bool or 0/1, which tokens were generated.
        ref_logps: (B, T) floating, under the reference policy; needed where config.beta is not 0.
        token_weights: (B, T) floating, 1 + psi.
        trajectory_weights: (B,) floating, 1 + phi.
        config: settings; None: `PolicyLossConfig()`.
        num_items_in_batch: for "dapo" and "cispo" only, the number of tokens the sum is divided by (at least
            1 is used): loss = sum over this batch's tokens / num_items_in_batch. To accumulate gradients over
            micro-batches pass the tokens of the whole window to each; where gradients are averaged over
            processes, the tokens of all of them / number of processes. A () tensor on the device of `logps`,
            or a number (a float that changes recompiles under torch.compile). None: this batch's own tokens.
            The other loss types average over the batch itself; over equally weighted micro-batches divide
            their loss by the number of micro-batches.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        PolicyLossOutput(loss, per_token_loss, metrics).

    Raises:
        TypeError: an argument is no tensor, or has a dtype it must not have.
        ValueError: a shape or device does not fit, the batch is empty, `ref_logps` is missing,
            `num_items_in_batch` does not go with the loss type; on CPUs, on the reference and under VGPO_DEBUG=1 also
            a mask with values other than 0 and 1.
        RuntimeError: `impl` cannot run here.

    Example:
        >>> import torch
        >>> logps = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
        >>> mask = torch.tensor([[True, True, False]])
        >>> out = policy_loss(logps, None, torch.tensor([0.5]), mask)
        >>> out.loss.backward()
        >>> logps.grad
        tensor([[-0.2500, -0.2500,  0.0000]])

    Source: VGPO, arXiv 2604.09349; terms and averages as in TRL 1.16, `GRPOTrainer._compute_loss`.
    """
    inputs = LossInputs(old_logps, advantages, completion_mask, ref_logps, token_weights, trajectory_weights)
    inputs, config = check_policy_loss(logps, inputs, num_items_in_batch, config)
    loss, per_token, metrics, _, _ = ops.PolicyLoss.apply(logps, inputs, config, impl)
    return PolicyLossOutput(loss, per_token.detach(), named_metrics(metrics))


def named_metrics(metrics: Tensor) -> dict[str, Tensor]:
    """Returns the metrics of an operator, (len(METRICS),), under their names."""
    return dict(zip(METRICS, metrics.detach().unbind(), strict=True))
