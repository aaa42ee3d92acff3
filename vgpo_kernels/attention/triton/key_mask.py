"""The mask of a call in one launch: int32 intervals of queries, and segments or kinds of keys."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, tl, triton, with_unit_columns
from vgpo_kernels.attention.intervals import HIDDEN, ORDINARY, VISUAL, MaskRule

# Queries or keys of a program, and keys looked at together for the edges of a key mask.
BLOCKS = {"BLOCK": 1024, "EDGE": 2048, "num_warps": 4}
_HIDDEN, _ORDINARY, _VISUAL = tl.constexpr(HIDDEN), tl.constexpr(ORDINARY), tl.constexpr(VISUAL)

# The arguments of a rule that every kernel which reads one takes, as `rule_arguments` makes them.
RULE_POINTERS = ("mask_ptr", "start_ptr", "end_ptr", "bounds_ptr", "cache_ptr")
RULE_NUMBERS = ("stride_mb", "stride_sb", "stride_eb", "n_bounds", "largest_step", "first_query", "window", "Lq", "Lk")


@triton.jit
def key_edges(mask_ptr, row, stride_mb, Lk, EDGE: tl.constexpr):
    """The first key of a row that is not hidden and the one after the last; Lk and 0 where all are."""
    first_key = Lk * 0
    last_key = Lk
    if mask_ptr is not None:
        b_first = tl.full([EDGE], 2147483647, tl.int32)
        b_last = tl.zeros([EDGE], tl.int32)
        for begin in range(0, Lk, EDGE):
            o_k = begin + tl.arange(0, EDGE)  # [E]
            m_shown = tl.load(mask_ptr + row * stride_mb + o_k, mask=o_k < Lk, other=0) != 0
            b_first = tl.minimum(b_first, tl.where(m_shown, o_k, Lk))
            b_last = tl.maximum(b_last, tl.where(m_shown, o_k + 1, 0))
        first_key = tl.min(b_first, axis=0)
        last_key = tl.max(b_last, axis=0)
    return first_key, last_key


@triton.jit
def _inside(b_bound, Lk):
    """Bounds of any integer type as int32 from 0 to Lk."""
    return tl.minimum(tl.maximum(b_bound.to(tl.int64), 0), Lk).to(tl.int32)


@triton.jit
def query_intervals(
    o_q,  # int32 queries
    row,
    first_key,
    last_key,
    start_ptr,  # (B, Lq) integers or None
    end_ptr,
    bounds_ptr,  # (n_bounds,) integers or None
    cache_ptr,  # (B,) integers or None
    stride_sb,
    stride_eb,
    n_bounds,
    largest_step,
    first_query,
    window,
    Lq,
    Lk,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """The starts and ends of queries, int32 from 0 to Lk; beyond the last query they say nothing.

    first_key, last_key: the edges of the row's key mask.
    """
    m_q = o_q < Lq
    if start_ptr is not None:
        b_start = _inside(tl.load(start_ptr + row * stride_sb + o_q, mask=m_q, other=0), Lk)
        b_end = _inside(tl.load(end_ptr + row * stride_eb + o_q, mask=m_q, other=0), Lk)
        if cache_ptr is not None:
            b_end = tl.minimum(b_end, tl.load(cache_ptr + row).to(tl.int32))
    else:
        o_k = o_q + first_query  # the key that a query stands at
        if cache_ptr is not None:
            o_k = o_q + (tl.load(cache_ptr + row).to(tl.int32) - Lq)
        b_start = tl.zeros_like(o_q)
        b_end = b_start + Lk
        if bounds_ptr is not None:
            # How many bounds a position has reached, by bisection: 0 before the first sequence.
            b_sequence = tl.zeros_like(o_q)
            step = largest_step
            while step > 0:
                b_probe = b_sequence + step
                m_probe = b_probe <= n_bounds
                b_bound = tl.load(bounds_ptr + b_probe - 1, mask=m_probe, other=0)
                b_sequence = tl.where(m_probe & (b_bound <= o_k), b_probe, b_sequence)
                step = step // 2
            b_before = tl.where(b_sequence == 0, n_bounds, b_sequence) - 1
            b_start = _inside(tl.load(bounds_ptr + b_before), Lk)
            b_end = _inside(tl.load(bounds_ptr + tl.minimum(b_sequence, n_bounds - 1)), Lk)
        if WINDOW:
            b_start = tl.maximum(b_start, o_k - window + 1)
            b_end = tl.minimum(b_end, o_k + window)
        if CAUSAL:
            b_end = tl.minimum(b_end, o_k + 1)
    return _inside(tl.maximum(b_start, first_key), Lk), _inside(tl.minimum(b_end, last_key), Lk)


@triton.jit(do_not_specialize=["n_blocks", "stride_kb", *RULE_NUMBERS])
def key_mask_kernel(
    keys_ptr,  # (B, Lk): segments, or what is 0 unless a key is visual
    mask_ptr,  # (B, Lk) or None
    start_ptr,
    end_ptr,
    bounds_ptr,
    cache_ptr,
    made_keys_ptr,  # (B, Lk) int32 segments or int8 kinds, contiguous as are the next two
    made_start_ptr,  # (B, Lq) int32
    made_end_ptr,  # (B, Lq) int32
    n_blocks,
    stride_kb,
    stride_mb,
    stride_sb,
    stride_eb,
    n_bounds,
    largest_step,
    first_query,
    window,
    Lq,
    Lk,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SEGMENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A program makes a block of a row's queries or, after those, of its keys."""
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    block = tl.program_id(0) % n_blocks
    query_blocks = tl.cdiv(Lq, BLOCK)
    if block < query_blocks:
        o_q = block * BLOCK + tl.arange(0, BLOCK)  # [B]
        first_key, last_key = key_edges(mask_ptr, row, stride_mb, Lk, EDGE)
        b_start, b_end = query_intervals(
            o_q,
            row,
            first_key,
            last_key,
            start_ptr,
            end_ptr,
            bounds_ptr,
            cache_ptr,
            stride_sb,
            stride_eb,
            n_bounds,
            largest_step,
            first_query,
            window,
            Lq,
            Lk,
            CAUSAL,
            WINDOW,
        )
        tl.store(made_start_ptr + row * Lq + o_q, b_start, mask=o_q < Lq)
        tl.store(made_end_ptr + row * Lq + o_q, b_end, mask=o_q < Lq)
    else:
        o_k = (block - query_blocks) * BLOCK + tl.arange(0, BLOCK)  # [B]
        m_k = o_k < Lk
        b_key = tl.load(keys_ptr + row * stride_kb + o_k, mask=m_k, other=0)
        m_shown = m_k
        if mask_ptr is not None:
            m_shown = tl.load(mask_ptr + row * stride_mb + o_k, mask=m_k, other=0) != 0
        if SEGMENTS:
            # Too large for int32 is too large for every number of segments.
            b_made = tl.minimum(tl.maximum(b_key.to(tl.int64), -1), 2147483647).to(tl.int32)
            b_made = tl.where(m_shown, b_made, -1)
        else:
            b_made = tl.where(b_key != 0, _VISUAL, _ORDINARY)
            b_made = tl.where(m_shown, b_made, _HIDDEN).to(tl.int8)
        tl.store(made_keys_ptr + row * Lk + o_k, b_made, mask=m_k)


def rule_arguments(rule: MaskRule) -> dict[str, Any]:
    """Returns what kernels that read a rule are launched with."""
    (Lq, Lk), bounds = rule.lengths, rule.cu_seqlens
    mask, start, end = (None if x is None else as_loaded(x) for x in (rule.key_mask, rule.key_start, rule.key_end))
    n_bounds = 0 if bounds is None else bounds.shape[0]
    return {
        "mask_ptr": mask,
        "start_ptr": start,
        "end_ptr": end,
        "bounds_ptr": None if bounds is None else bounds.contiguous(),
        "cache_ptr": None if rule.cache_lengths is None else rule.cache_lengths.contiguous(),
        "stride_mb": 0 if mask is None else mask.stride(0),
        "stride_sb": 0 if start is None else start.stride(0),
        "stride_eb": 0 if end is None else end.stride(0),
        "n_bounds": n_bounds,
        "largest_step": 1 << n_bounds.bit_length() >> 1,  # the largest power of two among the numbers of bounds
        "first_query": rule.first_query,
        # A window that holds all keys from every query is as good as any larger one, and fits int32.
        "window": 0 if rule.window is None else min(rule.window, Lq + Lk),
        "Lq": Lq,
        "Lk": Lk,
        "CAUSAL": rule.causal,
        "WINDOW": rule.window is not None,
    }


def as_loaded(x: Tensor) -> Tensor:
    """Returns (B, n) with elements side by side; bools as bytes, which they are."""
    x = with_unit_columns(x)
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def make_mask(rule: MaskRule, keys: Tensor, segments: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Returns segments (B, Lk) int32 or kinds (B, Lk) int8 of keys, and key_start and key_end (B, Lq) int32.

    Args:
        rule: the mask.
        keys: (B, Lk) integers, the segments; or what is not 0 where a key is visual.
        segments: whether keys are segments.
    """
    B, (Lq, Lk) = keys.shape[0], rule.lengths
    made = torch.empty((B, Lk), dtype=torch.int32 if segments else torch.int8, device=keys.device)
    start = torch.empty((B, Lq), dtype=torch.int32, device=keys.device)
    end = torch.empty_like(start)
    keys = as_loaded(keys)
    n_blocks = triton.cdiv(Lq, BLOCKS["BLOCK"]) + triton.cdiv(Lk, BLOCKS["BLOCK"])
    key_mask_kernel[(B * n_blocks,)](
        keys_ptr=keys,
        made_keys_ptr=made,
        made_start_ptr=start,
        made_end_ptr=end,
        n_blocks=n_blocks,
        stride_kb=keys.stride(0),
        SEGMENTS=segments,
        **rule_arguments(rule),
        **BLOCKS,
    )
    return made, start, end


def rule_case(**given: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the signature and the compile-time arguments of a rule with these pointers, else causal."""
    signature = dict.fromkeys(RULE_NUMBERS, "i32") | given
    constexprs: dict[str, Any] = {"CAUSAL": "start_ptr" not in given, "WINDOW": "bounds_ptr" in given}
    return signature, constexprs | {name: None for name in RULE_POINTERS if name not in given}


def compile_cases() -> list[CompileCase]:
    """Returns the kernel for what masks are made of, each once."""
    given = {"start_ptr": "*i64", "end_ptr": "*i64", "mask_ptr": "*u8"}
    return [
        _compile_case("causal", False, "*u8"),
        _compile_case("key mask", True, "*i64", mask_ptr="*u8"),
        _compile_case("packed", True, "*i32", bounds_ptr="*i32"),
        _compile_case("packed, key mask", False, "*fp32", bounds_ptr="*i64", mask_ptr="*i64"),
        _compile_case("intervals", False, "*u8", **given),
        _compile_case("cache", False, "*u8", cache_ptr="*i64"),
        _compile_case("cache, intervals", False, "*u8", cache_ptr="*i32", **given),
    ]


def _compile_case(name: str, segments: bool, keys: str, **given: str) -> CompileCase:
    signature, constexprs = rule_case(**given)
    signature |= {"keys_ptr": keys, "made_keys_ptr": "*i32" if segments else "*i8"}
    signature |= {"made_start_ptr": "*i32", "made_end_ptr": "*i32", "n_blocks": "i32", "stride_kb": "i32"}
    return CompileCase(
        f"attention mask {name}",
        key_mask_kernel,
        signature,
        constexprs | {"SEGMENTS": segments},
        tiles=lambda _: BLOCKS,
    )
