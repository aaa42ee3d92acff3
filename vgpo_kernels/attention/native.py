"""The room on CPUs: csrc/attention.h."""

from vgpo_kernels.attention.reference import (
    attention_column_sum,
    attention_mass,
    visual_attention,
    visual_attention_backward,
)

__all__ = ["attention_column_sum", "attention_mass", "visual_attention", "visual_attention_backward"]
