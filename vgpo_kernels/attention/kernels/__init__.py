"""The room's Triton kernels, behind the function names that `reference` has."""

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.attention.kernels import (
    backward,
    column,
    decode,
    forward,
    hopper_forward,
    keys,
    mass,
    prologue,
    query_blocks,
    tiles,
)
from vgpo_kernels.attention.kernels.backward import visual_attention_backward
from vgpo_kernels.attention.kernels.column import attention_column_sum, columns
from vgpo_kernels.attention.kernels.forward import visual_attention
from vgpo_kernels.attention.kernels.mass import attention_mass
from vgpo_kernels.attention.kernels.prologue import make_mask

__all__ = [
    "attention_column_sum",
    "attention_mass",
    "columns",
    "compile_cases",
    "make_mask",
    "visual_attention",
    "visual_attention_backward",
]


def compile_cases() -> list[CompileCase]:
    """Returns the compile cases of every kernel of the room."""
    modules = (prologue, tiles, mass, query_blocks, column, keys, forward, hopper_forward, decode, backward)
    return [case for module in modules for case in module.compile_cases()]
