"""Which blocks of queries a block of wanted keys visits, found in one launch together with the mask's intervals."""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.intervals import MaskRule
from vgpo_kernels.attention.triton.key_mask import (
    RULE_NUMBERS,
    as_loaded,
    key_edges,
    query_intervals,
    rule_arguments,
    rule_case,
)

# Blocks of queries and keys looked at together.
TILES = {"LISTED": 16, "SEARCH": 512, "EDGE": 2048, "num_warps": 8}


class QueryBlocks(NamedTuple):
    """What the column kernel walks.

    Args:
        positions: (B, n) int32, the wanted keys, -1 for none.
        slots: (B, Lk) int32, where among `positions` a key of a mask is, or -1; None without a mask.
        key_start, key_end: (B, Lq) int32.
        entries: (B * lists, 2, blocks) int32: for each block of positions the blocks of queries that an interval
            cuts, and those where every query sees every position.
        counts: (B * lists, 2) int32, how many of each.
    """

    positions: Tensor
    slots: Tensor | None
    key_start: Tensor
    key_end: Tensor
    entries: Tensor
    counts: Tensor


@triton.jit
def _wanted(
    keys_ptr,
    mask_ptr,
    made_positions_ptr,
    slots_ptr,
    row,
    first,
    n,
    Lk,
    stride_kb,
    stride_mb,
    IS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SEARCH: tl.constexpr,
):
    """Stores a block of positions; returns the smallest and the largest, 2147483647 and -1 if all are -1."""
    LARGEST: tl.constexpr = 2147483647
    o_n = first + tl.arange(0, BLOCK_N)  # [BN]
    if IS_MASK:
        low = tl.full([], LARGEST, tl.int32)
        high = tl.full([], -1, tl.int32)
        before = tl.full([], 0, tl.int32)
        for begin in range(0, Lk, SEARCH):
            o_k = begin + tl.arange(0, SEARCH)  # [S]
            m_wanted = tl.load(keys_ptr + row * stride_kb + o_k, mask=o_k < Lk, other=0) != 0
            if mask_ptr is not None:
                m_wanted = tl.load(mask_ptr + row * stride_mb + o_k, mask=m_wanted, other=0) != 0
            b_wanted = m_wanted.to(tl.int32)
            b_slot = before + tl.cumsum(b_wanted, axis=0) - b_wanted  # [S]
            m_own = m_wanted & (b_slot >= first) & (b_slot < first + BLOCK_N)
            tl.store(made_positions_ptr + row * n + b_slot, o_k, mask=m_own)
            low = tl.minimum(low, tl.min(tl.where(m_own, o_k, LARGEST), axis=0))
            high = tl.maximum(high, tl.max(tl.where(m_own, o_k, -1), axis=0))
            # As many slots as keys: each program stores those of its own share of the keys.
            m_share = (o_k >= first) & (o_k < first + BLOCK_N) & (o_k < Lk)
            tl.store(slots_ptr + row * Lk + o_k, tl.where(m_wanted, b_slot, -1), mask=m_share)
            before += tl.sum(b_wanted, axis=0)
        tl.store(made_positions_ptr + row * n + o_n, -1, mask=(o_n >= before) & (o_n < n))
    else:
        b_position = tl.load(keys_ptr + row * stride_kb + o_n, mask=o_n < n, other=-1).to(tl.int64)  # [BN]
        m_wanted = (b_position >= 0) & (b_position < Lk)
        if mask_ptr is not None:
            m_wanted = tl.load(mask_ptr + row * stride_mb + b_position, mask=m_wanted, other=0) != 0
        b_position = b_position.to(tl.int32)
        tl.store(made_positions_ptr + row * n + o_n, tl.where(m_wanted, b_position, -1), mask=o_n < n)
        low = tl.min(tl.where(m_wanted, b_position, LARGEST), axis=0)
        high = tl.max(tl.where(m_wanted, b_position, -1), axis=0)
    return low, high


@triton.jit(do_not_specialize=["n", "stride_kb", *RULE_NUMBERS])
def query_blocks_kernel(
    keys_ptr,  # (B, n) positions, or a mask (B, Lk) with n = Lk
    mask_ptr,
    start_ptr,
    end_ptr,
    bounds_ptr,
    cache_ptr,
    made_positions_ptr,
    slots_ptr,
    made_start_ptr,
    made_end_ptr,
    entries_ptr,
    counts_ptr,
    n,
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
    SEARCH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """A program owns a block of positions of one row; the first of a row stores the row's intervals."""
    n_lists = tl.cdiv(n, BLOCK_N)
    n_blocks = tl.cdiv(Lq, BLOCK_M)
    row = (tl.program_id(0) // n_lists).to(tl.int64)
    block = tl.program_id(0) % n_lists
    low, high = _wanted(
        keys_ptr,
        mask_ptr,
        made_positions_ptr,
        slots_ptr,
        row,
        block * BLOCK_N,
        n,
        Lk,
        stride_kb,
        stride_mb,
        slots_ptr is not None,
        BLOCK_N,
        SEARCH,
    )
    first_key, last_key = key_edges(mask_ptr, row, stride_mb, Lk, EDGE)
    p_cut = entries_ptr + tl.program_id(0).to(tl.int64) * 2 * n_blocks
    p_full = p_cut + n_blocks
    n_cut = tl.full([], 0, tl.int32)
    n_full = tl.full([], 0, tl.int32)
    # No block is looked at if every slot is empty.
    for first in range(0, tl.where((high >= 0) | (block == 0), n_blocks, 0), LISTED):
        o_b = first + tl.arange(0, LISTED)  # [L]
        o_q = o_b[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [L, BM]
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
        m_q = o_q < Lq
        m_store = o_q < tl.where(block == 0, Lq, 0)
        tl.store(made_start_ptr + row * Lq + o_q, b_start, mask=m_store)
        tl.store(made_end_ptr + row * Lq + o_q, b_end, mask=m_store)
        m_seen = m_q & (b_start < b_end)
        b_first = tl.min(tl.where(m_seen, b_start, 2147483647), axis=1)  # [L]
        b_last = tl.max(tl.where(m_seen, b_end, 0), axis=1)  # [L]
        # A query that sees nothing, or lies beyond the last, leaves no position that the whole block sees.
        b_inner_first = tl.max(tl.where(m_seen, b_start, 2147483647), axis=1)  # [L]
        b_inner_last = tl.min(tl.where(m_seen, b_end, 0), axis=1)  # [L]
        m_full = (b_inner_first <= low) & (b_inner_last > tl.where(high < 0, 2147483647, high))  # [L]
        m_cut = (b_first <= high) & (b_last > low) & (m_full == 0)  # [L]
        b_full = m_full.to(tl.int32)
        b_cut = m_cut.to(tl.int32)
        tl.store(p_full + n_full + tl.cumsum(b_full, axis=0) - 1, o_b, mask=m_full)
        tl.store(p_cut + n_cut + tl.cumsum(b_cut, axis=0) - 1, o_b, mask=m_cut)
        n_full += tl.sum(b_full, axis=0)
        n_cut += tl.sum(b_cut, axis=0)
    tl.store(counts_ptr + tl.program_id(0) * 2, n_cut)
    tl.store(counts_ptr + tl.program_id(0) * 2 + 1, n_full)


def find_query_blocks(keys: Tensor, rule: MaskRule, BLOCK_M: int, BLOCK_N: int) -> QueryBlocks:
    """Returns what the column kernel walks with blocks of BLOCK_M queries and BLOCK_N positions.

    Args:
        keys: (B, Lk) bool, or (B, n) integers, positions in any order.
        rule: the mask; keys that it hides are not wanted.
        BLOCK_M, BLOCK_N: tiles of that kernel.
    """
    (B, n), (Lq, Lk) = keys.shape, rule.lengths
    n_lists, n_blocks = triton.cdiv(n, BLOCK_N), triton.cdiv(Lq, BLOCK_M)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=keys.device)

    blocks = QueryBlocks(
        positions=empty(B, n),
        slots=empty(B, Lk) if keys.dtype == torch.bool else None,
        key_start=empty(B, Lq),
        key_end=empty(B, Lq),
        entries=empty(B * n_lists, 2, n_blocks),
        counts=empty(B * n_lists, 2),
    )
    keys = as_loaded(keys)
    query_blocks_kernel[(B * n_lists,)](
        keys_ptr=keys,
        made_positions_ptr=blocks.positions,
        slots_ptr=blocks.slots,
        made_start_ptr=blocks.key_start,
        made_end_ptr=blocks.key_end,
        entries_ptr=blocks.entries,
        counts_ptr=blocks.counts,
        n=n,
        stride_kb=keys.stride(0),
        BLOCK_M=BLOCK_M,
        BLOCK_N=BLOCK_N,
        **tiles(target_of(keys)),
        **rule_arguments(rule),
    )
    return blocks


def tiles(target: str) -> dict[str, int]:
    """Returns the tiles; without `maxnreg` NVIDIA's compilers spill rather than take more than 64 registers."""
    return TILES if target == "gfx942" else TILES | {"maxnreg": 128}


def compile_cases() -> list[CompileCase]:
    """Returns the kernel for a mask of keys and for positions, with most of what masks are made of."""
    given = {"start_ptr": "*i64", "end_ptr": "*i64", "mask_ptr": "*u8"}
    return [
        _compile_case("mask of keys", "*u8", (64, 128), slots_ptr="*i32"),
        _compile_case("mask of keys, intervals", "*u8", (32, 64), slots_ptr="*i32", **given),
        _compile_case("positions, packed", "*i64", (64, 128), bounds_ptr="*i32"),
        _compile_case("positions, key mask", "*i32", (64, 64), mask_ptr="*u8"),
    ]


def _compile_case(name: str, keys: str, block: tuple[int, int], **given: str) -> CompileCase:
    signature, constexprs = rule_case(**given)
    made = ("made_positions_ptr", "made_start_ptr", "made_end_ptr", "entries_ptr", "counts_ptr")
    signature |= dict.fromkeys(made, "*i32") | {"keys_ptr": keys, "n": "i32", "stride_kb": "i32"}
    blocks = {"BLOCK_M": block[0], "BLOCK_N": block[1]}
    without = {} if "slots_ptr" in given else {"slots_ptr": None}
    name = f"attention query blocks of {name}"
    return CompileCase(name, query_blocks_kernel, signature, constexprs | blocks | without, tiles=tiles)
