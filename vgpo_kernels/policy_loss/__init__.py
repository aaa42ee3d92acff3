"""The policy loss and its gradient from (B, T) log-probabilities; `vocabulary` has it from logits and hidden states.

Public: what `__all__` names. `terms.py` holds the formulas; the clip of the ratio is `PolicyLossConfig.log_bounds`.
"""

from vgpo_kernels.policy_loss.api import PolicyLossOutput, policy_loss
from vgpo_kernels.policy_loss.config import PolicyLossConfig

__all__ = ["PolicyLossConfig", "PolicyLossOutput", "policy_loss"]
