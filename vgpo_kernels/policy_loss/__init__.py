"""From log-probabilities and weighted advantages to the policy loss and its gradient."""

from vgpo_kernels.policy_loss.api import PolicyLossOutput, policy_loss
from vgpo_kernels.policy_loss.config import PolicyLossConfig

__all__ = ["PolicyLossConfig", "PolicyLossOutput", "policy_loss"]
