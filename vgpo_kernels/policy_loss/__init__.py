"""From log-probabilities and weighted advantages, logits, or hidden states to the policy loss and its gradient."""

from vgpo_kernels.policy_loss.api import PolicyLossOutput, policy_loss
from vgpo_kernels.policy_loss.config import PolicyLossConfig
from vgpo_kernels.policy_loss.linear_api import (
    LinearLogprobs,
    linear_logprobs,
    linear_policy_loss,
    linear_visual_dependency,
)
from vgpo_kernels.policy_loss.logits_api import logits_policy_loss, selective_logprobs

__all__ = [
    "LinearLogprobs",
    "PolicyLossConfig",
    "PolicyLossOutput",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_visual_dependency",
    "logits_policy_loss",
    "policy_loss",
    "selective_logprobs",
]
