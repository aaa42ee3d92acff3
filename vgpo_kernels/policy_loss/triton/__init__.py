"""The Triton kernel of the loss, behind the function that `reference` has."""

from vgpo_kernels.policy_loss.triton.loss import compile_cases, policy_loss

__all__ = ["compile_cases", "policy_loss"]
