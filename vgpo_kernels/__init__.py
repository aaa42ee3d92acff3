"""Visually-guided policy optimization: focus scores, weights and the policy loss, fused and exact."""

from vgpo_kernels.attention import (
    VisualAttention,
    attention_backend,
    attention_column_sum,
    attention_mass,
    attention_with_lse,
    visual_attention,
    visual_attention_decode,
)
from vgpo_kernels.focus import visual_focus_score
from vgpo_kernels.policy_loss import PolicyLossConfig, PolicyLossOutput, policy_loss
from vgpo_kernels.vocabulary import (
    LinearLogprobs,
    linear_logprobs,
    linear_policy_loss,
    linear_visual_dependency,
    logits_policy_loss,
    selective_logprobs,
)
from vgpo_kernels.weights import VGPOConfig, VGPOWeights, vgpo_weights

__version__ = "0.1.0"

__all__ = [
    "LinearLogprobs",
    "PolicyLossConfig",
    "PolicyLossOutput",
    "VGPOConfig",
    "VGPOWeights",
    "VisualAttention",
    "attention_backend",
    "attention_column_sum",
    "attention_mass",
    "attention_with_lse",
    "linear_logprobs",
    "linear_policy_loss",
    "linear_visual_dependency",
    "logits_policy_loss",
    "policy_loss",
    "selective_logprobs",
    "vgpo_weights",
    "visual_attention",
    "visual_attention_decode",
    "visual_focus_score",
]
