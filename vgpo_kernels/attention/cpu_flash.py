"""Torch's flash attention for CPUs under any mask."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from vgpo_kernels.attention import reference
from vgpo_kernels.attention.intervals import KeyMask, MaskRule

RESULT_BYTES = 1 << 25  # of a call, before it is put in its place
MASK_ELEMENTS = 1 << 21  # in the mask of a block of queries: 8 MB in fp32


def run(
    q: Tensor, k: Tensor, v: Tensor, mask: KeyMask, _: MaskRule, scale: float, _softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Runs torch's flash attention for CPUs on blocks of queries and the keys they see.

    A row that is causal, or in which every query sees every key, takes no mask, and a call for some of its heads. Other
    blocks are long because each call lays K and V out anew; the mask of a block is all that is made of one.
    """
    Lq = q.shape[2]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:3], -math.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    size = max(1, MASK_ELEMENTS // k.shape[2])
    for row in range(len(q)):
        causal = _causality(mask, row)
        if causal is not None:
            for heads, kv_heads in _head_groups(q, k):
                out[row, heads], lse[row, heads] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    q[row, None, heads], k[row, None, kv_heads], v[row, None, kv_heads], 0.0, causal, scale=scale
                )
            continue
        for first in range(0, Lq, size):
            queries = slice(first, min(first + size, Lq))
            start, end = mask.start[row, queries], mask.end[row, queries]
            keys = reference.union(start, end)
            if keys is None:
                continue
            visible = reference.visible_keys(keys, start, end, mask.kinds[row, keys])  # [m, n]
            b_k, b_v, bias = k[row : row + 1, :, keys], v[row : row + 1, :, keys], None
            if not visible.all():
                unseen = ~visible.any(0)[:, None]
                if unseen.any():
                    b_k, b_v = b_k.masked_fill(unseen, 0.0), b_v.masked_fill(unseen, 0.0)
                bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -math.inf)[None, None]
            b_out, b_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q[row : row + 1, :, queries], b_k, b_v, 0.0, False, attn_mask=bias, scale=scale
            )
            empty = ~visible.any(1)
            out[row, :, queries] = b_out[0].masked_fill(empty[:, None], 0.0)
            lse[row, :, queries] = b_lse[0].masked_fill(empty, -math.inf)
    return out, lse


def _head_groups(q: Tensor, k: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yields query heads with their key heads, as many as their output of one row takes little memory."""
    count, group = k.shape[1], q.shape[1] // k.shape[1]
    step = max(1, count * RESULT_BYTES // max(1, q[:1].nbytes))
    for first in range(0, count, step):
        last = min(first + step, count)
        yield slice(first * group, last * group), slice(first, last)


def _causality(mask: KeyMask, row: int) -> bool | None:
    """Returns True where each query of a row sees the keys up to its own, False where it sees all, None otherwise."""
    start, end, kinds = mask.start[row], mask.end[row], mask.kinds[row]
    if not len(kinds) or start.any() or not kinds.all():
        return None
    if (end == len(kinds)).all():
        return False
    up_to_own = torch.arange(1, len(end) + 1, dtype=end.dtype, device=end.device)
    return True if len(end) == len(kinds) and torch.equal(end, up_to_own) else None
