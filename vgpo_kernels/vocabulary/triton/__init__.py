"""The Triton kernels of the vocabulary pass, behind the names that `reference` has."""

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.policy_loss.triton import policy_loss
from vgpo_kernels.vocabulary.matmul import logits_of
from vgpo_kernels.vocabulary.triton import kl, logits, logprobs
from vgpo_kernels.vocabulary.triton.kl import logits_kl
from vgpo_kernels.vocabulary.triton.logits import logits_gradient, logits_logprobs, logits_loss, scale_gradient_
from vgpo_kernels.vocabulary.triton.logprobs import linear_logprobs as fused_logprobs

__all__ = [
    "compile_cases",
    "fused_logprobs",
    "logits_gradient",
    "logits_kl",
    "logits_logprobs",
    "logits_loss",
    "logits_of",
    "policy_loss",
    "scale_gradient_",
]


def compile_cases() -> list[CompileCase]:
    """Returns the compile cases of every kernel here."""
    return [case for module in (logprobs, logits, kl) for case in module.compile_cases()]
