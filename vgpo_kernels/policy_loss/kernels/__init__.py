"""The room's Triton kernels, behind the function names that `reference` has."""

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.policy_loss.kernels import divergence, linear, logits, loss, scale
from vgpo_kernels.policy_loss.kernels.divergence import logits_kl
from vgpo_kernels.policy_loss.kernels.linear import linear_logprobs
from vgpo_kernels.policy_loss.kernels.logits import logits_gradient, logits_logprobs, logits_loss
from vgpo_kernels.policy_loss.kernels.loss import policy_loss
from vgpo_kernels.policy_loss.kernels.scale import scale_
from vgpo_kernels.policy_loss.products import logits_of

__all__ = [
    "compile_cases",
    "linear_logprobs",
    "logits_gradient",
    "logits_kl",
    "logits_logprobs",
    "logits_loss",
    "logits_of",
    "policy_loss",
    "scale_",
]


def compile_cases() -> list[CompileCase]:
    """Returns the compile cases of every kernel of the room."""
    return [case for module in (loss, linear, logits, divergence, scale) for case in module.compile_cases()]
