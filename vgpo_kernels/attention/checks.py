"""Checks of arguments, and what they become: scales, and the rule of a mask."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._validate import (
    BOOL,
    FLOATING,
    INTEGER,
    MASK,
    check_mask_values,
    check_not_empty,
    check_number,
    check_tensor,
    forbid,
)
from vgpo_kernels.attention.intervals import MaskRule

LSE = (torch.float32, torch.float64)
HEAD_DIM = 512  # the largest


def check_qk(q: Tensor, k: Tensor, scale: float | None, softcap: float | None, *, k_name: str = "k") -> float:
    """Returns the scale."""
    check_tensor("q", q, shape=("B", "Hq", "Lq", "D"), dtypes=FLOATING)
    check_not_empty("q", q)
    check_tensor(k_name, k, shape=(q.shape[0], "Hkv", "Lk", q.shape[3]), dtypes=(q.dtype,), device=q.device)
    check_not_empty(k_name, k)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k_name}: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}")
    if q.shape[3] > HEAD_DIM:
        raise ValueError(f"q: expected a head size of at most {HEAD_DIM}, got {q.shape[3]}")
    if softcap is not None:
        check_number("softcap", softcap, low=0.0, low_open=True)
    if scale is None:
        return float(q.shape[3]) ** -0.5
    check_number("scale", scale)
    return float(scale)


def check_values(q: Tensor, k: Tensor, v: Tensor, name: str = "v") -> None:
    check_tensor(name, v, shape=k.shape, dtypes=(q.dtype,), device=q.device)


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def check_max_seqlen(max_seqlen: int | None, cu_seqlens: Tensor | None) -> None:
    if max_seqlen is None:
        return
    check_count("max_seqlen", max_seqlen)
    if cu_seqlens is None:
        raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen}")
    if _reads(cu_seqlens) and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least {longest}, the longest sequence, got {max_seqlen}")


def check_cache_lengths(cache_lengths: Tensor, q: Tensor, k: Tensor) -> None:
    Lq, Lk = q.shape[2], k.shape[2]
    check_tensor("cache_lengths", cache_lengths, shape=q.shape[:1], dtypes=INTEGER, device=q.device)
    if _reads(cache_lengths):
        wrong = (cache_lengths < Lq) | (cache_lengths > Lk)
        forbid(wrong, "cache_lengths", f"from {Lq}, the number of queries, to {Lk}, the cache's length", cache_lengths)


def _check_bounds(cu_seqlens: Tensor, Lk: int) -> None:
    if not _reads(cu_seqlens):
        return
    forbid((cu_seqlens < 0) | (cu_seqlens > Lk), "cu_seqlens", f"bounds from 0 to {Lk}", cu_seqlens)
    if (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens: expected bounds that do not fall, got {cu_seqlens.tolist()}")


def _reads(x: Tensor) -> bool:
    """Whether the values of an argument are looked at: not while a graph is made, else as operators do."""
    return not torch.compiler.is_compiling() and checks_values(None, x)


def check_key_mask(key_mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """Raises unless the mask is (B, Lk) bool or, as models hand it over, 0 and 1."""
    if key_mask is not None:
        check_tensor("key_mask", key_mask, shape=(q.shape[0], k.shape[2]), dtypes=BOOL + INTEGER, device=q.device)
        if _reads(key_mask):
            check_mask_values("key_mask", key_mask)


def check_visual_mask(visual_mask: Tensor, q: Tensor, k: Tensor) -> None:
    check_tensor("visual_mask", visual_mask, shape=(q.shape[0], k.shape[2]), dtypes=MASK, device=q.device)


def mask_rule(
    q: Tensor,
    k: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    intervals: tuple[Tensor, Tensor] | None,
    cache_lengths: Tensor | None = None,
) -> MaskRule:
    """Returns the rule that the masks of a public function make; `key_mask` and `cache_lengths` are checked before."""
    if not isinstance(causal, bool):
        raise TypeError(f"causal: expected a bool, got {causal!r}")
    if window is not None:
        check_count("window", window)
    Lq, Lk = q.shape[2], k.shape[2]
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, shape=("n + 1",), dtypes=INTEGER, device=q.device)
        if q.shape[0] != 1 or Lq != Lk or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"cu_seqlens: expected at least 2 bounds of one packed row with Lq = Lk, got {cu_seqlens.shape[0]} "
                f"bounds, q {tuple(q.shape)}, k {tuple(k.shape)}"
            )
        _check_bounds(cu_seqlens, Lk)
    rule = MaskRule((Lq, Lk), Lk - Lq, causal, window, key_mask, cu_seqlens, cache_lengths)
    if intervals is None:
        return rule
    _check_intervals(intervals, (q.shape[0], Lq), q.device, cu_seqlens, window)
    return rule._replace(causal=False, key_start=intervals[0], key_end=intervals[1])


def _check_intervals(
    intervals: tuple[Tensor, Tensor],
    shape: tuple[int, int],
    device: torch.device,
    cu_seqlens: Tensor | None,
    window: int | None,
) -> None:
    if cu_seqlens is not None or window is not None:
        name = "window" if cu_seqlens is None else "cu_seqlens"
        raise ValueError(f"{name}: expected None beside intervals, which say the whole mask")
    if not isinstance(intervals, tuple | list) or len(intervals) != 2:
        raise TypeError(f"intervals: expected a pair (key_start, key_end), got {type(intervals).__name__}")
    for name, bound in zip(("key_start", "key_end"), intervals, strict=True):
        check_tensor(f"intervals {name}", bound, shape=shape, dtypes=INTEGER, device=device)


def within(
    q: Tensor, lse: Tensor, rule: MaskRule, query_range: tuple[int, int] | None
) -> tuple[Tensor, Tensor, MaskRule]:
    """Returns queries, LSE and rule of the query range."""
    check_tensor("lse", lse, shape=q.shape[:3], dtypes=LSE, device=q.device)
    if query_range is None:
        return q, lse, rule
    if not isinstance(query_range, tuple | list) or len(query_range) != 2:
        raise TypeError(f"query_range: expected a pair (start, stop), got {query_range!r}")
    start, stop = query_range
    if any(isinstance(bound, bool) or not isinstance(bound, int | torch.SymInt) for bound in query_range):
        raise TypeError(f"query_range: expected two ints, got {query_range!r}")
    if not 0 <= start < stop <= q.shape[2]:
        raise ValueError(f"query_range: expected 0 <= start < stop <= {q.shape[2]}, got {(start, stop)}")
    return q[:, :, start:stop], lse[:, :, start:stop], rule.of_queries(start, stop)
