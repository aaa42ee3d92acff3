"""What the public functions return."""

from typing import NamedTuple

from torch import Tensor

from vgpo_kernels.policy_loss.api import PolicyLossOutput, named_metrics


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


def loss_output(
    loss: Tensor, per_token: Tensor, metrics: Tensor, logps: Tensor, entropy: Tensor, completion_mask: Tensor
) -> PolicyLossOutput:
    """Returns the output of a loss that knows the distributions."""
    entropy = entropy.detach()
    mean = entropy.sum() / (completion_mask != 0).sum().clamp(min=1)
    return PolicyLossOutput(
        loss, per_token.detach(), named_metrics(metrics) | {"entropy": mean}, logps.detach(), entropy
    )
