"""Attention in plain torch: the specification, in blocks of scores that never grow to an attention map.

Arguments of every function: q (B, Hq, Lq, D); k, v (B, Hkv, Lk, D); lse (B, Hq, Lq); key_start, key_end (B, Lq)
int32; score = scale * q.k, then softcap * tanh(score / softcap). Sums are made in fp32, in float64 for float64.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels.attention.intervals import HIDDEN, VISUAL, KeyMask

SCORES = 1 << 21  # in a block: 8 MB in fp32
KEYS = 1024  # in a block, where keys are gathered


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
    """Returns (B, Hq, Lq, S): the sum of attention probabilities over the visible keys of each segment.

    Args:
        segment_ids: (B, Lk) int32, the segment of a key, or -1.
        num_segments: S.
    """
    B, Hq, Lq, _ = q.shape
    mass = q.new_zeros((B, Hq, Lq, num_segments), dtype=_wide(q))
    for row in range(B):
        positions = (segment_ids[row] >= 0).nonzero().squeeze(1)
        blocks = _probabilities(q[row], k[row], lse[row], positions, key_start[row], key_end[row], scale, softcap)
        for queries, keys, probabilities in blocks:
            segments = segment_ids[row, positions[keys]].long()
            members = torch.nn.functional.one_hot(segments, num_segments).to(mass.dtype).T.contiguous()  # [S, n]
            mass[row, :, queries] += torch.nn.functional.linear(probabilities, members)
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
    """Returns (B, Hq, n): the attention that each key received from the queries that see any key.

    Args:
        positions: (B, n) int32, keys, or -1 for an empty slot, which gets 0.
        reduction: "sum", "mean" or "max" over the queries.
    """
    B, Hq = q.shape[:2]
    received = q.new_zeros((B, Hq, positions.shape[1]), dtype=_wide(q))
    for row in range(B):
        slots = (positions[row] >= 0).nonzero().squeeze(1)
        keys_of_slots = positions[row, slots].long()
        blocks = _probabilities(q[row], k[row], lse[row], keys_of_slots, key_start[row], key_end[row], scale, softcap)
        for _, keys, probabilities in blocks:
            if reduction == "max":
                largest = torch.maximum(received[row][:, slots[keys]], probabilities.amax(1))
                received[row].index_copy_(1, slots[keys], largest)
            else:
                received[row].index_add_(1, slots[keys], probabilities.sum(1))
    if reduction == "mean":
        see_any_key = (key_start < key_end)[:, None] & ~lse.isneginf()  # [B, Hq, Lq]
        received /= see_any_key.sum(2).clamp(min=1)[..., None]
    return received


def visual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the output (B, Hq, Lq, D), the attention on visual keys (B, Hq, Lq) and the LSE (B, Hq, Lq)."""
    wide = _wide(q)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    mass = q.new_zeros(q.shape[:3], dtype=wide)
    lse = q.new_full(q.shape[:3], float("-inf"), dtype=wide)
    for block in _blocks(q, k, mask):
        row, queries, keys = block.row, block.queries, block.keys
        scores = _scores(block.take(q), block.pick(k), scale, softcap).masked_fill_(~block.visible, float("-inf"))
        block_lse = scores.logsumexp(-1)  # [Hq, m]
        scores -= block_lse.masked_fill(block_lse.isneginf(), 0.0)[..., None]
        probabilities = scores.exp_()  # [Hq, m, n]
        out[row, :, queries] = _grouped(probabilities, block.pick(v)).to(out.dtype)
        mass[row, :, queries] = probabilities @ (mask.kinds[row, keys] == VISUAL).to(wide)
        lse[row, :, queries] = block_lse
    return out, mass, lse


def visual_attention_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask,
    out: Tensor,
    mass: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v.

    The mass needs no product of its own: dP_ij = dO_i.v_j + g_i vis_j, and the row's constant becomes
    delta_i = dO_i.O_i + g_i m_i - dlse_i, so that dS_ij = P_ij (dP_ij - delta_i).
    """
    wide = _wide(q)
    grad_q, grad_k, grad_v = (x.new_zeros(x.shape, dtype=wide) for x in (q, k, v))
    for block in _blocks(q, k, mask):
        row, queries, keys = block.row, block.queries, block.keys
        b_q, b_k, b_v, b_grad = block.take(q), block.pick(k), block.pick(v), block.take(grad_out)
        scores = _scores(b_q, b_k, scale, softcap)
        probabilities = (scores - lse[row, :, queries, None]).exp_().masked_fill_(~block.visible, 0.0)  # [Hq, m, n]
        delta = (b_grad * block.take(out)).sum(-1)  # [Hq, m]
        if grad_mass is not None and mass is not None:
            delta += grad_mass[row, :, queries] * mass[row, :, queries]
        if grad_lse is not None:
            delta -= grad_lse[row, :, queries]
        grad_p = _scores(b_grad, b_v, 1.0, None)
        if grad_mass is not None:
            grad_p += grad_mass[row, :, queries, None] * (mask.kinds[row, keys] == VISUAL)
        grad_s = probabilities * (grad_p - delta[..., None])
        # A query that sees nothing may hold anything, a NaN in its gradient, too.
        grad_s.masked_fill_(~block.visible, 0.0)
        if softcap is not None:
            grad_s *= 1.0 - (scores / softcap).square()
            grad_s.masked_fill_(~block.visible, 0.0)
        grad_q[row, :, queries] += scale * _grouped(grad_s, b_k)
        grad_k[row, :, keys] += scale * _grouped_transposed(grad_s, b_q, k.shape[1])
        grad_v[row, :, keys] += _grouped_transposed(probabilities, b_grad, k.shape[1])
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


class _Block(NamedTuple):
    """Some queries of one row with the keys that any of them sees."""

    row: int
    queries: slice
    keys: slice
    visible: Tensor  # [m, n] bool

    def take(self, x: Tensor) -> Tensor:
        """Returns [H, m, D] of a tensor of the queries, 0 where a query sees nothing."""
        tile = x[self.row, :, self.queries].to(_wide(x))
        return tile.masked_fill(~self.visible.any(1)[:, None], 0.0)

    def pick(self, x: Tensor) -> Tensor:
        """Returns [H, n, D] of a tensor of the keys, 0 where no query sees the key."""
        tile = x[self.row, :, self.keys].to(_wide(x))
        return tile.masked_fill(~self.visible.any(0)[:, None], 0.0)


def _blocks(q: Tensor, k: Tensor, mask: KeyMask) -> Iterator[_Block]:
    """Yields blocks of at most SCORES scores; queries that see nothing are in none, or in one with others."""
    B, Hq, Lq, _ = q.shape
    size = max(1, SCORES // (Hq * max(1, k.shape[2])))
    for row in range(B):
        for first in range(0, Lq, size):
            queries = slice(first, min(first + size, Lq))
            start, end = mask.start[row, queries], mask.end[row, queries]
            keys = union(start, end)
            if keys is None:
                continue
            yield _Block(row, queries, keys, visible_keys(keys, start, end, mask.kinds[row, keys]))


def visible_keys(keys: slice, start: Tensor, end: Tensor, kinds: Tensor) -> Tensor:
    """Returns [m, n] bool: which of the keys, of these kinds (n,), each query sees, from starts and ends (m,)."""
    position = torch.arange(keys.start, keys.stop, device=start.device)
    return (position >= start[:, None]) & (position < end[:, None]) & (kinds != HIDDEN)


def union(start: Tensor, end: Tensor) -> slice | None:
    """Returns the smallest range that holds every interval of (m,) starts and ends; None where all are empty."""
    seen = start < end
    if not seen.any():
        return None
    return slice(int(start[seen].min()), int(end[seen].max()))


def _probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    positions: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    scale: float,
    softcap: float | None,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields, for one row, blocks of queries, of entries of `positions`, and the probabilities [Hq, m, n] between them.

    Args:
        q: (Hq, Lq, D).
        k: (Hkv, Lk, D); only the keys at `positions` are read.
        lse: (Hq, Lq).
        positions: (n,) int64.
        key_start, key_end: (Lq,).
    """
    Hq, Lq, _ = q.shape
    wide = _wide(q)
    lse = lse.to(wide).masked_fill(lse.isneginf(), float("inf"))
    for first_key in range(0, len(positions), KEYS):
        keys = slice(first_key, min(first_key + KEYS, len(positions)))
        position = positions[keys]
        low, high = int(position.min()), int(position.max())
        b_k = k[:, position].to(wide)  # [Hkv, n, D]
        size = max(1, SCORES // (Hq * len(position)))
        for first in range(0, Lq, size):
            queries = slice(first, min(first + size, Lq))
            start, end = key_start[queries, None], key_end[queries, None]
            if not ((start <= high) & (end > low) & (start < end)).any():
                continue
            scores = _scores(q[:, queries].to(wide), b_k, scale, softcap)
            probabilities = scores.sub_(lse[:, queries, None]).exp_()
            visible = (position >= start) & (position < end)
            yield queries, keys, probabilities if visible.all() else probabilities.masked_fill_(~visible, 0.0)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Returns [Hq, m, n] of q [Hq, m, D] and k [Hkv, n, D]; heads of a group share a product."""
    heads, m, dim = q.shape
    scores = (q.reshape(len(k), -1, dim) @ k.mT).view(heads, m, -1)
    if scale != 1.0:
        scores *= scale
    return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)


def _grouped(probabilities: Tensor, v: Tensor) -> Tensor:
    """Returns [Hq, m, D]: probabilities [Hq, m, n] times v [Hkv, n, D]."""
    heads, m, n = probabilities.shape
    return (probabilities.view(len(v), -1, n) @ v).view(heads, m, -1)


def _grouped_transposed(probabilities: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """Returns [Hkv, n, D]: probabilities [Hq, m, n], transposed, times rows [Hq, m, D], summed over a group."""
    n, dim = probabilities.shape[-1], rows.shape[-1]
    return probabilities.view(kv_heads, -1, n).mT @ rows.reshape(kv_heads, -1, dim)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
