"""The one mask of the room: each query sees the keys of one interval.

`key_start` (inclusive) and `key_end` (exclusive) are (B, Lq), int32 in kernels; a query with start >= end sees nothing.
Causal, padded, packed, windowed and bidirectional-block masks are all intervals; keys hidden in the middle of a row
are told apart by `key_kinds`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._validate import INTEGER, check_tensor, forbid

HIDDEN, ORDINARY, VISUAL = 0, 1, 2  # what `key_kinds` (B, Lk) int8 says of a key


class Intervals(NamedTuple):
    """The keys each query sees: (B, Lq) integers, inclusive starts and exclusive ends."""

    key_start: Tensor
    key_end: Tensor


def build(
    batch: int,
    lengths: tuple[int, int],
    device: torch.device,
    *,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    intervals: tuple[Tensor, Tensor] | None,
) -> Intervals:
    """Returns the intervals that the masks of a public function come to.

    Args:
        batch: B.
        lengths: Lq and Lk; the last query stands at the last key.
        device: where the intervals live.
        causal: a query sees the keys up to its own position.
        key_mask: (B, Lk) bool; what is hidden at the edges of a row shortens its intervals.
        cu_seqlens: (n + 1,) int, where each packed sequence starts, then the end of the last; B is 1.
        window: keys a query sees on each side, its own included.
        intervals: starts and ends that take the place of the three before.
    """
    Lq, _ = lengths
    if intervals is not None:
        start, end = _given(intervals, (batch, Lq), device, cu_seqlens, window)
    else:
        start, end = _built(lengths, device, causal, cu_seqlens, window)
        start, end = start.expand(batch, Lq), end.expand(batch, Lq)
    if key_mask is not None:
        first, last = _edges(key_mask)
        start, end = torch.maximum(start, first), torch.minimum(end, last)
    return Intervals(start, end)


def of_cache(
    cache_lengths: Tensor,
    lengths: tuple[int, int],
    *,
    key_mask: Tensor | None,
    window: int | None,
) -> Intervals:
    """Returns the causal intervals of the last Lq entries of each row's cache.

    Args:
        cache_lengths: (B,) int, entries of the cache that are filled, those of the queries included.
        lengths: Lq and the cache's length Lk.
        key_mask: (B, Lk) bool.
        window: keys a query sees, its own included.
    """
    Lq, _ = lengths
    batch, device = cache_lengths.shape[0], cache_lengths.device
    end = cache_lengths[:, None].long() - Lq + 1 + torch.arange(Lq, device=device)  # [B, Lq]
    start = torch.zeros_like(end) if window is None else (end - window).clamp(min=0)
    return build(
        batch,
        lengths,
        device,
        causal=False,
        key_mask=key_mask,
        cu_seqlens=None,
        window=None,
        intervals=(start, end),
    )


def key_kinds(visual_mask: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns (B, Lk) int8: HIDDEN where `key_mask` is False, else VISUAL or ORDINARY."""
    kinds = visual_mask.to(torch.int8) + ORDINARY
    return kinds if key_mask is None else kinds * key_mask.to(torch.int8)


def check_values(key_start: Tensor, key_end: Tensor, Lk: int) -> None:
    """Raises where an interval with keys leaves [0, Lk]; reads the data."""
    seen = key_start < key_end
    forbid(seen & (key_start < 0), "intervals", "key_start of at least 0", key_start)
    forbid(seen & (key_end > Lk), "intervals", f"key_end of at most {Lk}", key_end)


def _built(
    lengths: tuple[int, int], device: torch.device, causal: bool, cu_seqlens: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """Returns the starts and ends (Lq,) of one row."""
    Lq, Lk = lengths
    position = torch.arange(Lq, device=device) + (Lk - Lq)  # [Lq]
    start, end = torch.zeros_like(position), torch.full_like(position, Lk)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        sequence = torch.searchsorted(bounds, position, right=True)  # 1 for the first, len(bounds) after the last
        padded = torch.cat([bounds, bounds[-1:]])
        start, end = bounds[sequence - 1], padded[sequence]
    if window is not None:
        start, end = torch.maximum(start, position - window + 1), torch.minimum(end, position + window)
    if causal:
        end = torch.minimum(end, position + 1)
    return start, end


def _given(
    intervals: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    device: torch.device,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    if cu_seqlens is not None or window is not None:
        name = "window" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(f"{name}: expected None beside intervals, which say the whole mask")
    if not isinstance(intervals, tuple | list) or len(intervals) != 2:
        raise TypeError(f"intervals: expected a pair (key_start, key_end), got {type(intervals).__name__}")
    for name, bound in zip(("key_start", "key_end"), intervals, strict=True):
        check_tensor(f"intervals {name}", bound, shape=shape, dtypes=INTEGER, device=device)
    return intervals[0], intervals[1]


def _edges(key_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (B, 1) the first key that is not hidden and the one after the last; 0 and 0 where all are."""
    Lk = key_mask.shape[1]
    position = torch.arange(Lk, device=key_mask.device)
    first = torch.where(key_mask, position, Lk).amin(1, keepdim=True)
    last = torch.where(key_mask, position + 1, 0).amax(1, keepdim=True)
    return first, last
