"""Attention toward visual tokens: mass, column sums, FlashAttention with mass, decode."""

from vgpo_kernels.attention.api import (
    VisualAttention,
    attention_backend,
    attention_column_sum,
    attention_mass,
    attention_with_lse,
    visual_attention,
    visual_attention_decode,
)

__all__ = [
    "VisualAttention",
    "attention_backend",
    "attention_column_sum",
    "attention_mass",
    "attention_with_lse",
    "visual_attention",
    "visual_attention_decode",
]
