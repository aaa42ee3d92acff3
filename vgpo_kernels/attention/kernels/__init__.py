"""The room's Triton kernels, behind the function names that `reference` has."""

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.attention.kernels import column, mass
from vgpo_kernels.attention.kernels.column import attention_column_sum
from vgpo_kernels.attention.kernels.mass import attention_mass

__all__ = ["attention_column_sum", "attention_mass", "compile_cases"]


def compile_cases() -> list[CompileCase]:
    """Returns the compile cases of every kernel of the room."""
    return [*mass.compile_cases(), *column.compile_cases()]
