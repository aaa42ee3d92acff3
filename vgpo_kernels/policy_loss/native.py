"""The loss on CPUs: csrc/policy_loss.h and csrc/logits.h."""

from vgpo_kernels.policy_loss.reference import (
    linear_logprobs,
    logits_gradient,
    logits_kl,
    logits_logprobs,
    logits_loss,
    policy_loss,
    scale_,
)

__all__ = ["linear_logprobs", "logits_gradient", "logits_kl", "logits_logprobs", "logits_loss", "policy_loss", "scale_"]
