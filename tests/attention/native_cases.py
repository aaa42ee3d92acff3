"""Inputs of the CPU kernels of attention, under every kind of mask."""

import torch
from dense_attention import dense_attention, inputs, intervals
from torch import Tensor

# No multiple of a tile of 8 or 4 queries, nor of panels of 48, 24 or 12 keys.
B, LENGTHS = 2, (45, 150)


def case(
    mask: str | tuple[Tensor, Tensor],
    heads: tuple[int, int] = (4, 2),
    lengths: tuple[int, int] = LENGTHS,
    D: int = 24,
    dtype: torch.dtype = torch.float32,
    softcap: float | None = None,
) -> dict:
    """Returns q, k, their LSE in fp32, and the intervals."""
    q, k, _ = inputs(B, heads, lengths, D, dtype)
    start, end = intervals(mask, B, *lengths) if isinstance(mask, str) else mask
    lse = dense_attention(q.double(), k.double(), None, start, end, softcap=softcap).lse.float()
    return {"q": q, "k": k, "lse": lse, "start": start, "end": end}


def scattered(Lk: int, n: int) -> Tensor:
    """Returns (2, n) int32 positions: in no order, with -1 in the middle and at the end, and duplicates."""
    positions = torch.randint(0, Lk, (2, n), generator=torch.Generator().manual_seed(5))
    positions[0, n // 8], positions[1, n // 4 : n // 3], positions[1, n // 2 :] = -1, -1, -1
    return positions.int()
