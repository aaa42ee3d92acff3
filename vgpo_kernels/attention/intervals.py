"""The one mask of attention: each query sees the keys of one interval, but for hidden keys.

A query with start >= end sees nothing. Causal, padded, packed, windowed and bidirectional-block masks are all
intervals; keys hidden in the middle of a row are told apart by their kind. On GPUs
`triton/key_mask.py` follows the same rule.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._validate import forbid

HIDDEN, ORDINARY, VISUAL, MIXED = range(4)  # the kind of a key; MIXED is that of a block of ordinary and visual keys


class KeyMask(NamedTuple):
    """A mask as implementations take it.

    Args:
        start, end: (B, Lq) int32, the keys each query sees: inclusive starts, exclusive ends.
        kinds: (B, Lk) int8, HIDDEN, ORDINARY or VISUAL.
    """

    start: Tensor
    end: Tensor
    kinds: Tensor


class MaskRule(NamedTuple):
    """A mask as the arguments of a public function say it.

    Args:
        lengths: Lq and Lk.
        first_query: the key that the first query stands at, unless `cache_lengths` says it.
        causal: a query sees the keys up to its own position.
        window: keys a query sees on each side, its own included.
        key_mask: (B, Lk) bool or integers; what is hidden at the edges of a row shortens its intervals.
        cu_seqlens: (n + 1,) integers, where each packed sequence starts, then the end of the last; B is 1.
        cache_lengths: (B,) integers, the filled entries of each row's cache; the last query stands at the last one.
        key_start, key_end: (B, Lq) integers that take the place of `causal`, `window` and `cu_seqlens`.
        max_seqlen: of the packed sequences, for kernels that are not ours.
    """

    lengths: tuple[int, int]
    first_query: int
    causal: bool = False
    window: int | None = None
    key_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cache_lengths: Tensor | None = None
    key_start: Tensor | None = None
    key_end: Tensor | None = None
    max_seqlen: int | None = None

    def of_queries(self, start: int, stop: int) -> "MaskRule":
        """Returns the rule of the queries from `start` to `stop`."""
        bounds = [None if x is None else x[:, start:stop] for x in (self.key_start, self.key_end)]
        lengths = (stop - start, self.lengths[1])
        return self._replace(
            lengths=lengths, first_query=self.first_query + start, key_start=bounds[0], key_end=bounds[1]
        )


def build(rule: MaskRule, batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the starts and ends (B, Lq) that a rule comes to, not yet cut to the keys there are."""
    if rule.key_start is None or rule.key_end is None:
        start, end = (x.expand(batch, -1) for x in _built(rule, device))
    else:
        start, end = rule.key_start, rule.key_end
        if rule.cache_lengths is not None:
            end = torch.minimum(end, rule.cache_lengths[:, None].to(end.dtype))
    if rule.key_mask is not None:
        first, last = _edges(rule.key_mask != 0)
        start, end = torch.maximum(start, first), torch.minimum(end, last)
    return start, end


def key_kinds(visual_mask: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns (B, Lk) int8: HIDDEN where `key_mask` is 0, else VISUAL or ORDINARY."""
    kinds = (visual_mask != 0).to(torch.int8) + ORDINARY
    return kinds if key_mask is None else kinds * (key_mask != 0).to(torch.int8)


def segments(segment_ids: Tensor, key_mask: Tensor | None) -> Tensor:
    """Returns (B, Lk) the segments of keys, -1 where `key_mask` is 0."""
    return segment_ids if key_mask is None else torch.where(key_mask != 0, segment_ids, -1)


def positions(keys: Tensor, key_mask: Tensor | None, Lk: int) -> Tensor:
    """Returns (B, n) the positions of wanted keys, -1 for those that are hidden.

    Args:
        keys: (B, Lk) bool, whose positions come in order, then -1; or (B, n) integers, the positions.
        key_mask: (B, Lk).
        Lk: keys of a row; positions beyond it stay.
    """
    if keys.dtype == torch.bool:
        order = keys.byte().argsort(dim=1, descending=True, stable=True)
        keys = torch.where(keys.gather(1, order), order, -1)
    if key_mask is None:
        return keys
    hidden = (key_mask == 0).gather(1, keys.long().clamp(0, Lk - 1))
    return keys.masked_fill(hidden & (keys >= 0) & (keys < Lk), -1)


def check_values(key_start: Tensor, key_end: Tensor, Lk: int) -> None:
    """Raises where an interval with keys leaves [0, Lk]; reads the data."""
    seen = key_start < key_end
    forbid(seen & (key_start < 0), "intervals", "key_start of at least 0", key_start)
    forbid(seen & (key_end > Lk), "intervals", f"key_end of at most {Lk}", key_end)


def _built(rule: MaskRule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the starts and ends, (Lq,) of every row or (B, Lq) where caches differ."""
    Lq, Lk = rule.lengths
    position = torch.arange(Lq, device=device)  # [Lq]
    if rule.cache_lengths is None:
        position = position + rule.first_query
    else:
        position = position + (rule.cache_lengths[:, None].long() - Lq)  # [B, Lq]
    start, end = torch.zeros_like(position), torch.full_like(position, Lk)
    if rule.cu_seqlens is not None:
        bounds = rule.cu_seqlens.long()
        sequence = torch.searchsorted(bounds, position, right=True)  # 1 for the first, len(bounds) after the last
        padded = torch.cat([bounds, bounds[-1:]])
        start, end = bounds[sequence - 1], padded[sequence]
    if rule.window is not None:
        start, end = torch.maximum(start, position - rule.window + 1), torch.minimum(end, position + rule.window)
    if rule.causal:
        end = torch.minimum(end, position + 1)
    return start, end


def _edges(shown: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (B, 1) the first key that is not hidden and the one after the last; Lk and 0 where all are."""
    Lk = shown.shape[1]
    position = torch.arange(Lk, device=shown.device)
    first = torch.where(shown, position, Lk).amin(1, keepdim=True)
    last = torch.where(shown, position + 1, 0).amax(1, keepdim=True)
    return first, last
