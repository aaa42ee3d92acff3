"""Attention toward visual tokens: mass, column sums, FlashAttention with mass, decode."""

from vgpo_kernels.attention.api import (
    VisualAttention,
    attention_column_sum,
    attention_mass,
    visual_attention,
    visual_attention_decode,
)
from vgpo_kernels.attention.with_lse import attention_backend, attention_with_lse

__all__ = [
    "VisualAttention",
    "attention_backend",
    "attention_column_sum",
    "attention_mass",
    "attention_with_lse",
    "visual_attention",
    "visual_attention_decode",
]
