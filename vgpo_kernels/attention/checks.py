"""Checks of the arguments of attention, and what they become: tensors in autocast's dtype, a scale, a mask's rule."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._dispatch import checks_values
from vgpo_kernels._operator import as_autocast
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


class Inputs(NamedTuple):
    """What checked arguments come to; `v` is None if none was given."""

    q: Tensor
    k: Tensor
    v: Any
    scale: float
    rule: MaskRule


def checked(
    q: Tensor,
    k: Tensor,
    v: Any = None,
    visual_mask: Tensor | None = None,
    *,
    causal: bool,
    scale: float | None,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None,
    softcap: float | None,
    intervals: tuple[Tensor, Tensor] | None,
    cache_lengths: Tensor | None = None,
) -> Inputs:
    """Returns the arguments that public functions share, checked; the cache's names with `cache_lengths`."""
    q, k, v = as_autocast(q, k, v)
    suffix = "" if cache_lengths is None else "_cache"
    check_qk(q, k, softcap, k_name=f"k{suffix}")
    if scale is None:
        scale = float(q.shape[3]) ** -0.5
    check_number("scale", scale)
    B, Lk = q.shape[0], k.shape[2]
    if v is not None:
        _refuse_transforms(v)
        check_tensor(f"v{suffix}", v, shape=k.shape, dtypes=(q.dtype,), device=q.device)
    if visual_mask is not None:
        check_tensor("visual_mask", visual_mask, shape=(B, Lk), dtypes=MASK, device=q.device)
    if key_mask is not None:
        check_tensor("key_mask", key_mask, shape=(B, Lk), dtypes=BOOL + INTEGER, device=q.device)
        if _reads(key_mask):
            check_mask_values("key_mask", key_mask)
    if max_seqlen is not None:
        _check_max_seqlen(max_seqlen, cu_seqlens)
    if cache_lengths is not None:
        _check_cache_lengths(cache_lengths, q, k)
    rule = _mask_rule(q, k, causal, key_mask, cu_seqlens, window, intervals)
    return Inputs(q, k, v, float(scale), rule._replace(cache_lengths=cache_lengths, max_seqlen=max_seqlen))


def check_qk(q: Tensor, k: Tensor, softcap: float | None, *, k_name: str = "k") -> None:
    """Raises unless queries and keys fit together and the soft-cap is one."""
    check_tensor("q", q, shape=("B", "Hq", "Lq", "D"), dtypes=FLOATING)
    _refuse_transforms(q)
    check_not_empty("q", q)
    check_tensor(k_name, k, shape=(q.shape[0], "Hkv", "Lk", q.shape[3]), dtypes=(q.dtype,), device=q.device)
    _refuse_transforms(k)
    check_not_empty(k_name, k)
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{k_name}: expected a number of heads that divides q's {q.shape[1]}, got {k.shape[1]}")
    if q.shape[3] > HEAD_DIM:
        raise ValueError(f"q: expected a head size of at most {HEAD_DIM}, got {q.shape[3]}")
    if softcap is not None:
        check_number("softcap", softcap, low=0.0, low_open=True)


def _refuse_transforms(x: Tensor) -> None:
    if not torch.compiler.is_compiling() and torch.func.debug_unwrap(x, recurse=False) is not x:
        raise RuntimeError(
            "attention has no torch.func transforms (grad, vjp, vmap): use torch.autograd.grad, and the batch "
            "dimension in place of vmap"
        )


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")


def _check_max_seqlen(max_seqlen: int, cu_seqlens: Tensor | None) -> None:
    check_count("max_seqlen", max_seqlen)
    if cu_seqlens is None:
        raise ValueError(f"max_seqlen: expected None without cu_seqlens, got {max_seqlen}")
    if _reads(cu_seqlens) and (longest := int(cu_seqlens.diff().max())) > max_seqlen:
        raise ValueError(f"max_seqlen: expected at least {longest}, the longest sequence, got {max_seqlen}")


def _check_cache_lengths(cache_lengths: Tensor, q: Tensor, k: Tensor) -> None:
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


def _mask_rule(
    q: Tensor,
    k: Tensor,
    causal: bool,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    window: int | None,
    intervals: tuple[Tensor, Tensor] | None,
) -> MaskRule:
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
    rule = MaskRule((Lq, Lk), Lk - Lq, causal, window, key_mask, cu_seqlens)
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
