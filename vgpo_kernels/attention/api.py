"""The public functions of attention: arguments checked, masks made intervals, then the operator.

Masks, the same in every function: `causal` (a query sees the keys up to its own position, the last query standing at
the last key), `window` (a query sees itself and the window - 1 keys before it, and as many after it when not causal),
`cu_seqlens` (packed rows), `key_mask` (padding, holes), or, in place of the first three, `intervals`: for each query
the first key it sees and the one after the last.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._validate import BOOL, INTEGER, check_choice, check_tensor
from vgpo_kernels.attention import ops
from vgpo_kernels.attention.checks import check_count, checked, within

REDUCTIONS = ("sum", "mean", "max")


class VisualAttention(NamedTuple):
    """What `visual_attention` returns.

    Args:
        out: (B, Hq, Lq, D), of q's dtype; 0 where a query sees nothing.
        visual_mass: (B, Hq, Lq) fp32 in [0, 1], the sum of the probabilities of visual keys.
        lse: (B, Hq, Lq) fp32, the natural log of the softmax's denominator; -inf where a query sees nothing.
    """

    out: Tensor
    visual_mass: Tensor
    lse: Tensor


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    num_segments: int,
    *,
    causal: bool = True,
    scale: float | None = None,
    query_range: tuple[int, int] | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    intervals: tuple[Tensor, Tensor] | None = None,
    reduce_heads: bool = False,
    impl: str | None = None,
) -> Tensor:
    """Sums each query's attention probabilities over the keys of each segment, from q, k and any kernel's LSE.

    mass[b, h, i, s] = sum over keys j of segment s that query i sees of exp(score_ij - lse_i), with score_ij =
    scale * q_i.k_j, soft-capped where asked. Values are not needed, keys outside every segment are never read, and no
    attention map is made. The masks must be those the LSE was made with.

    The masses are constants: no gradient flows through. `visual_attention` has one that does.

    Args:
        q: (B, Hq, Lq, D), D up to 512, any strides; float16, bfloat16 or float32, and float64 on the reference.
        k: (B, Hkv, Lk, D) of the same dtype; Hq is a multiple of Hkv, and neighbouring query heads share a key head.
        lse: (B, Hq, Lq) fp32 or fp64, natural log.
        segment_ids: (B, Lk) integers from 0 to num_segments - 1, or -1 for keys in no segment.
        num_segments: S.
        causal: a query sees the keys up to its own position; query Lq - 1 stands at key Lk - 1.
        scale: of the scores; None is D ** -0.5.
        query_range: (start, stop), the only queries asked for.
        key_mask: (B, Lk) bool, or integers 0 and 1; False for keys that no query sees: padding, or holes.
        cu_seqlens: (n + 1,) integers, where each sequence of a packed row starts, then its end; B is 1, Lq = Lk.
        window: keys a query sees, itself and those before it (and as many after it when not causal).
        softcap: c of score <- c * tanh(score / c).
        intervals: (key_start, key_end), each (B, Lq) integers, inclusive and exclusive: the whole mask but for
            `key_mask`; `causal` then says nothing.
        reduce_heads: return the mean over heads.
        impl: "triton", "native" or "reference"; None chooses by device.

    Returns:
        (B, Hq, Lq', S) fp32 (fp64 for fp64), Lq' the length of the query range; (B, Lq', S) with `reduce_heads`. 0
        where a query sees nothing. The masses of segments that hold every visible key sum to 1.

    Raises:
        TypeError: an argument is of another type or dtype.
        ValueError: shapes, devices or options do not fit; on CPUs, on the reference and under VGPO_DEBUG=1 also a
            segment or an interval out of range, a mask of other numbers, or an LSE that is not of these scores and
            masks.
        RuntimeError: `impl` cannot run on these tensors.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
        >>> from vgpo_kernels import attention_with_lse
        >>> _, lse = attention_with_lse(q, k, k)
        >>> attention_mass(q, k, lse, torch.tensor([[0, 0, 1, 1]]), 2)[0, 0, 3]
        tensor([0.5000, 0.5000])

    Source: the attention that VGPO (arXiv 2604.09349) finds fading; exp(score - LSE) is the softmax itself.
    """
    q, k, _, scale, rule = checked(
        q, k, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens, window=window, softcap=softcap,
        intervals=intervals,
    )  # fmt: skip
    check_tensor("segment_ids", segment_ids, shape=(q.shape[0], k.shape[2]), dtypes=INTEGER, device=q.device)
    check_count("num_segments", num_segments)
    q, lse, rule = within(q, lse, rule, query_range)
    start, end, segments = ops.key_mask(rule, segment_ids, True, q, impl)
    mass: Tensor = ops.attention_mass(
        q.detach(), k.detach(), lse.detach(), segments, start, end, num_segments, scale, softcap, impl
    )
    return mass.mean(1) if reduce_heads else mass


def attention_column_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor,
    *,
    query_range: tuple[int, int] | None = None,
    reduction: str = "sum",
    reduce_heads: bool = False,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    intervals: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> Tensor:
    """Sums the attention that each wanted key received from a range of queries, from q, k and any kernel's LSE.

    Only wanted keys are read and no attention map is made; the result is bit-identical from run to run. It is a
    constant: no gradient flows through.

    Args:
        q, k, lse: as in `attention_mass`.
        keys: (B, Lk) bool, which keys are wanted; or (B, n) integers, their positions in any order, -1 for none.
        query_range: (start, stop), the queries to sum over; None is all.
        reduction: "sum", "mean" (over those queries in the range that see any key) or "max".
        reduce_heads: return the mean over heads.
        causal, scale, key_mask, cu_seqlens, window, softcap, intervals, impl: as in `attention_mass`.

    Returns:
        fp32 (fp64 for fp64): (B, Hq, Lk) for a mask, 0 at keys that are not wanted; (B, Hq, n) for positions, 0 at -1.
        Without Hq with `reduce_heads`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `attention_mass`.

    Example:
        >>> import torch
        >>> q, k = torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8)
        >>> from vgpo_kernels import attention_with_lse
        >>> _, lse = attention_with_lse(q, k, k, causal=False)
        >>> attention_column_sum(q, k, lse, torch.tensor([[0, 3, -1]]), causal=False)
        tensor([[[1., 1., 0.]]])
    """
    q, k, _, scale, rule = checked(
        q, k, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens, window=window, softcap=softcap,
        intervals=intervals,
    )  # fmt: skip
    check_choice("reduction", reduction, REDUCTIONS)
    if not isinstance(keys, Tensor):
        raise TypeError(f"keys: expected a tensor, got {type(keys).__name__}")
    n = k.shape[2] if keys.dtype == torch.bool else "n"
    check_tensor("keys", keys, shape=(q.shape[0], n), dtypes=BOOL + INTEGER, device=q.device)
    q, lse, rule = within(q, lse, rule, query_range)
    received: Tensor = ops.attention_column_sum(
        q.detach(), k.detach(), lse.detach(), keys, rule.key_start, rule.key_end, reduction, scale, softcap, impl,
        rule.key_mask, rule.cu_seqlens, rule.causal, rule.window, rule.first_query,
    )  # fmt: skip
    return received.mean(1) if reduce_heads else received


def visual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visual_mask: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: int | None = None,
    softcap: float | None = None,
    intervals: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> VisualAttention:
    """Attends like FlashAttention and sums, in the same softmax loop, the probabilities of visual keys.

    Differentiable (once) in q, k and v through the output, through the visual mass and through the LSE, so that visual
    attention can stand in a loss; the gradient through the mass takes no matrix product of its own.

    Args:
        q, k: as in `attention_mass`.
        v: (B, Hkv, Lk, D), of q's dtype.
        visual_mask: (B, Lk), which keys are visual; bool, or numbers 0 and 1.
        max_seqlen: the longest packed sequence, as other packages ask for it; not needed here.
        causal, scale, key_mask, cu_seqlens, window, softcap, intervals, impl: as in `attention_mass`.

    Returns:
        VisualAttention(out, visual_mass, lse).

    Raises:
        TypeError, ValueError, RuntimeError: as in `attention_mass`.

    Example:
        >>> import torch
        >>> q = k = v = torch.zeros(1, 1, 4, 8)
        >>> visual_attention(q, k, v, torch.tensor([[1, 0, 0, 0]])).visual_mass
        tensor([[[1.0000, 0.5000, 0.3333, 0.2500]]])

    Source: FlashAttention-2 (arXiv 2307.08691) with one more accumulator; backward as in `docs/attention.md`.
    """
    q, k, v, scale, rule = checked(
        q, k, v, visual_mask, causal=causal, scale=scale, key_mask=key_mask, cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen, window=window, softcap=softcap, intervals=intervals,
    )  # fmt: skip
    start, end, kinds = ops.key_mask(rule, visual_mask, False, q, impl)
    return VisualAttention(*ops.visual_attention(q, k, v, kinds, start, end, scale, softcap, impl))


def visual_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    visual_mask: Tensor,
    cache_lengths: Tensor,
    *,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    intervals: tuple[Tensor, Tensor] | None = None,
    impl: str | None = None,
) -> VisualAttention:
    """Attends from the last token (or few) of each row to its KV cache, with the visual mass, split over keys.

    Args:
        q: (B, Hq, Lq, D), the last Lq tokens of each row, usually one.
        k_cache: (B, Hkv, Lk, D), with room for Lk tokens; what lies past a row's length is never read.
        v_cache: (B, Hkv, Lk, D).
        visual_mask: (B, Lk), which entries of the cache are visual; bool, or numbers 0 and 1.
        cache_lengths: (B,) integers, how many entries are filled, those of q's tokens included.
        key_mask, scale, window, softcap, impl: as in `attention_mass`; queries see the entries up to their own.
        intervals: as in `attention_mass`, in place of that; what reaches past a row's length is cut off.

    Returns:
        VisualAttention(out, visual_mass, lse), differentiable as that of `visual_attention`.

    Raises:
        TypeError, ValueError, RuntimeError: as in `attention_mass`.

    Example:
        >>> import torch
        >>> q, cache = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 16, 8)
        >>> visual = torch.arange(16)[None] < 2
        >>> visual_attention_decode(q, cache, cache, visual, torch.tensor([5])).visual_mass
        tensor([[[0.4000]]])
    """
    q, k, v, scale, rule = checked(
        q, k_cache, v_cache, visual_mask, causal=True, scale=scale, key_mask=key_mask, window=window, softcap=softcap,
        intervals=intervals, cache_lengths=cache_lengths,
    )  # fmt: skip
    start, end, kinds = ops.key_mask(rule, visual_mask, False, q, impl)
    return VisualAttention(*ops.visual_attention(q, k, v, kinds, start, end, scale, softcap, impl))
