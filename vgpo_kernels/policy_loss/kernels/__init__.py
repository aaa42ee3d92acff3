"""The room's Triton kernels, behind the function names that `reference` has."""

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.policy_loss.kernels import loss
from vgpo_kernels.policy_loss.kernels.loss import policy_loss

__all__ = ["compile_cases", "policy_loss"]


def compile_cases() -> list[CompileCase]:
    """Returns the compile cases of every kernel of the room."""
    return [case for module in (loss,) for case in module.compile_cases()]
