"""Visually-guided policy optimization: focus scores, weights and the policy loss, fused and exact."""

from vgpo_kernels.focus import visual_focus_score
from vgpo_kernels.policy_loss import PolicyLossConfig, PolicyLossOutput, policy_loss
from vgpo_kernels.weights import VGPOConfig, VGPOWeights, vgpo_weights

__version__ = "0.1.0"

__all__ = [
    "PolicyLossConfig",
    "PolicyLossOutput",
    "VGPOConfig",
    "VGPOWeights",
    "policy_loss",
    "vgpo_weights",
    "visual_focus_score",
]
