"""Inputs of the attention tests, and attention written down densely a second time."""

from typing import NamedTuple

import torch
from torch import Tensor


class Attention(NamedTuple):
    """What dense attention knows: (B, Hq, Lq, Lk) probabilities, (B, Hq, Lq) LSE, (B, Hq, Lq, D) output or None."""

    probabilities: Tensor
    lse: Tensor
    out: Tensor | None


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    key_start: Tensor,
    key_end: Tensor,
    *,
    key_kinds: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    lse: Tensor | None = None,
) -> Attention:
    """Returns attention as eager code computes it: scores in the inputs' dtype, their softmax in fp32 at least.

    Args:
        q, k, v: (B, Hq, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, D) or None; promote to float64 for the exact one.
        key_start, key_end: (B, Lq) intervals; what no interval covers may be NaN.
        key_kinds: (B, Lk), 0 hides a key from all queries.
        lse: the LSE to subtract in place of the one of these scores.
    """
    visible = visible_keys(key_start, key_end, k.shape[2], key_kinds)[:, None]  # [B, 1, Lq, Lk]
    q = q.masked_fill(~visible.any(3)[..., None], 0)
    unseen = ~visible.any(2)[..., None]  # [B, 1, Lk, 1]
    group = q.shape[1] // k.shape[1]
    k = k.masked_fill(unseen, 0).repeat_interleave(group, 1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = scores.to(wide).masked_fill(~visible, float("-inf"))
    if lse is None:
        lse = scores.logsumexp(-1)
    lse = lse.to(wide)
    probabilities = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    probabilities = probabilities.masked_fill(~visible, 0)
    out = None
    if v is not None:
        v = v.masked_fill(unseen, 0).repeat_interleave(group, 1)
        out = probabilities.to(q.dtype) @ v
    return Attention(probabilities, lse, out)


def visible_keys(key_start: Tensor, key_end: Tensor, Lk: int, key_kinds: Tensor | None = None) -> Tensor:
    """Returns (B, Lq, Lk) bool: which keys each query sees."""
    keys = torch.arange(Lk, device=key_start.device)
    visible = (keys >= key_start[..., None]) & (keys < key_end[..., None])
    return visible if key_kinds is None else visible & (key_kinds != 0)[:, None]


def segment_masses(probabilities: Tensor, segment_ids: Tensor, num_segments: int) -> Tensor:
    """Returns (B, Hq, Lq, S): probabilities summed over the keys of each segment."""
    members = segment_ids[:, None, :, None] == torch.arange(num_segments, device=segment_ids.device)
    return probabilities @ members.to(probabilities.dtype)


def column_sums(probabilities: Tensor, positions: Tensor, reduction: str) -> Tensor:
    """Returns (B, Hq, n): the sum, mean or max over queries at each position, 0 where it is -1."""
    index = positions.clamp(min=0).long()[:, None].expand(-1, probabilities.shape[1], -1)
    columns = probabilities.amax(2) if reduction == "max" else probabilities.sum(2)
    if reduction == "mean":
        columns = columns / (probabilities.sum(3) > 0).sum(2).clamp(min=1)[..., None]
    return columns.gather(2, index).masked_fill((positions < 0)[:, None], 0)


def intervals(kind: str, batch: int, Lq: int, Lk: int) -> tuple[Tensor, Tensor]:
    """Returns (B, Lq) int32 key_start and key_end; the last query stands at the last key, rows differ.

    Args:
        kind: "full", "causal", "left" or "right" padding of a causal mask, "packed" sequences, "window" that slides,
            "blocks" that see themselves in both directions, "empty" rows here and there, "blind" rows throughout, or
            "arbitrary" intervals in no order.
    """
    at = (torch.arange(Lq) + Lk - Lq).expand(batch, Lq)
    row = torch.arange(batch)[:, None]
    start, end = torch.zeros_like(at), at + 1
    if kind == "full":
        end = torch.full_like(at, Lk)
    elif kind == "left":
        start = torch.full_like(at, 5) + row
    elif kind == "right":
        length = Lk - 7 - 3 * row
        end = end.minimum(length)
        end = torch.where(at < length, end, 0)
    elif kind == "packed":
        start = at // (Lk // 3 + 1 + row) * (Lk // 3 + 1 + row)
    elif kind == "window":
        start = (at - 10 - row).clamp(min=0)
    elif kind == "blocks":
        # Image blocks of 24 keys from key 8 on: inside one, a query sees to its end.
        block = ((at - 8) // 24 + 1) * 24 + 8
        end = torch.where((at >= 8) & (at < Lk - 30), block.clamp(max=Lk), end)
    elif kind == "empty":
        end = torch.where((at + row) % 5 == 0, 0, end)
    elif kind == "blind":
        start = end.clone()
    elif kind == "arbitrary":
        generator = torch.Generator().manual_seed(3)
        ends = torch.randint(0, Lk + 1, (2, batch, Lq), generator=generator)
        start, end = ends[0], ends[1]
    elif kind != "causal":
        raise ValueError(f"kind: got {kind!r}")
    return start.int().contiguous(), end.int().contiguous()


def segments(kind: str, batch: int, Lk: int) -> tuple[Tensor, int]:
    """Returns (B, Lk) int32 segment ids and how many segments there are; rows differ.

    Args:
        kind: "image" (one, with keys before and after), "two" images of which the last row has none, "all" keys in
            one, "none" wanted, "complete" (four that cover every key), "images" (40 short ones), "scattered" keys.
    """
    ids = torch.full((batch, Lk), -1)
    if kind == "all":
        return torch.zeros_like(ids).int(), 1
    if kind == "none":
        return ids.int(), 2
    if kind == "complete":
        ids = torch.arange(Lk).expand(batch, Lk) * 4 // Lk
        return ids.int().contiguous(), 4
    if kind == "images":
        # 40 images of three keys with a key between them, around and around.
        ids = torch.arange(Lk).expand(batch, Lk) % 160
        return torch.where(ids % 4 == 3, -1, ids // 4).int().contiguous(), 40
    if kind == "scattered":
        generator = torch.Generator().manual_seed(4)
        return torch.randint(-1, 3, (batch, Lk), generator=generator).int(), 3
    for row in range(batch):
        ids[row, 3 + row : 2 * Lk // 3 + row] = 0
        if kind == "two":
            ids[row, Lk // 4 : Lk // 3] = -1
            ids[row, Lk // 3 : 2 * Lk // 3 + row] = 1
            if row == batch - 1 > 0:
                ids[row] = -1
    return ids.int(), 2 if kind == "two" else 1


def inputs(
    batch: int,
    heads: tuple[int, int],
    lengths: tuple[int, int],
    D: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k, v as models hand them over: transposes of (B, L, H, D)."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(batch, lengths[0], heads[0], D)] + [(batch, lengths[1], heads[1], D)] * 2
    tensors = [torch.randn(shape, generator=generator).to(dtype).to(device).transpose(1, 2) for shape in shapes]
    return tensors[0], tensors[1], tensors[2]
