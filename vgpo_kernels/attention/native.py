"""Attention on CPUs: csrc/attention/."""

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.attention.reference import visual_attention_backward

__all__ = ["attention_column_sum", "attention_mass", "visual_attention", "visual_attention_backward"]
REDUCTIONS = {"sum": 0, "mean": 1, "max": 2}  # as csrc/attention/column_sum.h numbers them


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    num_segments: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Returns (B, Hq, Lq, S): the sum of attention probabilities over the visible keys of each segment."""
    mass = q.new_empty((*q.shape[:3], num_segments), dtype=torch.float32)
    _native.call(
        "attention_mass", mass, q, k, lse.float(), segment_ids, key_start, key_end, float(scale), softcap or 0.0
    )
    return mass


def attention_column_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    positions: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    reduction: str,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Returns (B, Hq, n): the attention that each key received from the queries that see any key."""
    received = q.new_empty((*q.shape[:2], positions.shape[1]), dtype=torch.float32)
    _native.call(
        "attention_column_sum", received, q, k, lse.float(), positions, key_start, key_end, REDUCTIONS[reduction],
        float(scale), softcap or 0.0,
    )  # fmt: skip
    return received


def visual_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyMask, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns what the reference returns, from one pass over keys and values."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    mass = q.new_empty(q.shape[:3], dtype=torch.float32)
    lse = torch.empty_like(mass)
    kinds = mask.kinds.to(torch.int8).view(torch.uint8)
    _native.call(
        "visual_attention", out, mass, lse, q, k, v, kinds, mask.start.int(), mask.end.int(), float(scale),
        softcap or 0.0,
    )  # fmt: skip
    return out, mass, lse
