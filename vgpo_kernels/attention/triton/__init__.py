"""Triton kernels, behind the function names that `reference` has."""

from vgpo_kernels._triton import CompileCase
from vgpo_kernels.attention.triton import (
    backward,
    block_lists,
    column,
    decode,
    forward,
    hopper_forward,
    key_blocks,
    key_mask,
    mass,
    query_blocks,
)
from vgpo_kernels.attention.triton.backward import visual_attention_backward
from vgpo_kernels.attention.triton.column import attention_column_sum, columns
from vgpo_kernels.attention.triton.forward import visual_attention
from vgpo_kernels.attention.triton.key_mask import make_mask
from vgpo_kernels.attention.triton.mass import attention_mass

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
    """Returns the compile cases of every kernel."""
    modules = (key_mask, block_lists, mass, query_blocks, column, key_blocks, forward, hopper_forward, decode, backward)
    return [case for module in modules for case in module.compile_cases()]
