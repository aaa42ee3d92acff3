"""What a block of keys holds and which queries see it, found once a call on the device."""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, tl, triton
from vgpo_kernels.attention.intervals import HIDDEN, VISUAL, KeyMask

# What a block of keys holds: ordinary keys only, visual keys only, both, or a hole in the interval of a query.
ORDINARY_BLOCK, VISUAL_BLOCK, MIXED_BLOCK, HOLE_BLOCK = (tl.constexpr(value) for value in range(4))
_HIDDEN, _VISUAL = tl.constexpr(HIDDEN), tl.constexpr(VISUAL)

# A step of the search for queries: 4k queries are four steps of four warps.
SEARCH = {"BLOCK_SEARCH": 1024, "BLOCK_Q": 32, "num_warps": 4}


class Keys(NamedTuple):
    """Keys of a batch, in blocks of `block`.

    Args:
        weight: (B, blocks * block) fp32, 1 for a visual key, 0 for an ordinary one, -1 for one that no query sees.
        kind: (B, blocks) int8, what a block holds.
        queries: (B, blocks, 4) int32: the smallest range of queries that holds all that see a key of the block, then
            a range of queries that see the block whole; empty ranges have start >= end.
        block: keys in a block.
    """

    weight: Tensor
    kind: Tensor
    queries: Tensor
    block: int


@triton.jit(do_not_specialize=["Lq", "Lk"])
def keys_kernel(
    kinds_ptr,  # (B, Lk) int8
    start_ptr,  # (B, Lq) int32
    end_ptr,  # (B, Lq) int32
    weight_ptr,  # (B, blocks * BLOCK_N) fp32
    kind_ptr,  # (B, blocks) int8
    queries_ptr,  # (B, blocks, 4) int32
    Lq,
    Lk,
    BLOCK_SEARCH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a block of keys of one row: what it holds, and which queries see it."""
    n_blocks = tl.cdiv(Lk, BLOCK_N)
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    first = (tl.program_id(0) % n_blocks) * BLOCK_N
    last = tl.minimum(first + BLOCK_N, Lk)
    p_start = start_ptr + row * Lq
    p_end = end_ptr + row * Lq

    meet_first = Lq
    meet_last = Lq * 0
    whole_first = Lq
    whole_last = Lq
    left = first  # keys of the block before it are seen by queries that see its first
    right = last  # and those from here on by queries that see its last
    inner_first = last  # first and last key that queries see that see neither
    inner_last = first
    for begin in range(0, Lq, BLOCK_SEARCH):
        o_q = begin + tl.arange(0, BLOCK_SEARCH)  # [BS]
        b_start = tl.load(p_start + o_q, mask=o_q < Lq, other=0)  # [BS]
        b_end = tl.load(p_end + o_q, mask=o_q < Lq, other=0)  # [BS]
        m_meet = (b_start < b_end) & (b_start < last) & (b_end > first)
        m_whole = m_meet & (b_start <= first) & (b_end >= last)
        meet_first = tl.minimum(meet_first, tl.min(tl.where(m_meet, o_q, Lq), axis=0))
        meet_last = tl.maximum(meet_last, tl.max(tl.where(m_meet, o_q + 1, 0), axis=0))
        whole_first = tl.minimum(whole_first, tl.min(tl.where(m_whole, o_q, Lq), axis=0))
        m_left = m_meet & (b_start <= first)
        m_right = m_meet & (b_end >= last)
        m_inner = m_meet & (b_start > first) & (b_end < last)
        left = tl.maximum(left, tl.max(tl.where(m_left, tl.minimum(b_end, last), first), axis=0))
        right = tl.minimum(right, tl.min(tl.where(m_right, tl.maximum(b_start, first), last), axis=0))
        inner_first = tl.minimum(inner_first, tl.min(tl.where(m_inner, b_start, last), axis=0))
        inner_last = tl.maximum(inner_last, tl.max(tl.where(m_inner, b_end, first), axis=0))
        # The run of queries that see the block whole ends with the first that does not.
        m_after = (o_q > whole_first) & (m_whole == 0)
        whole_last = tl.minimum(whole_last, tl.min(tl.where(m_after, o_q, Lq), axis=0))

    o_n = first + tl.arange(0, BLOCK_N)  # [BN]
    m_n = o_n < Lk
    b_seen = (m_n & ((o_n < left) | (o_n >= right))).to(tl.int32)  # [BN]
    if (left < right) & (inner_first < right) & (inner_last > left):
        # Intervals within the block lie in its gap, which those of a causal, padded row never do: look for each key.
        for begin in range(meet_first, meet_last, BLOCK_Q):
            o_q = begin + tl.arange(0, BLOCK_Q)  # [BQ]
            b_start = tl.load(p_start + o_q, mask=o_q < Lq, other=0)[:, None]  # [BQ, 1]
            b_end = tl.load(p_end + o_q, mask=o_q < Lq, other=0)[:, None]  # [BQ, 1]
            m_sees = (b_start <= o_n[None, :]) & (o_n[None, :] < b_end)  # [BQ, BN]
            b_seen = tl.maximum(b_seen, tl.max(m_sees.to(tl.int32), axis=0))

    b_kind = tl.load(kinds_ptr + row * Lk + o_n, mask=m_n, other=0)  # [BN]
    b_weight = tl.where(b_kind == _VISUAL, 1.0, 0.0)
    m_hole = (b_seen != 0) & (b_kind == _HIDDEN)
    p_weight = weight_ptr + row * n_blocks * BLOCK_N + o_n
    tl.store(p_weight, tl.where((b_seen == 0) | m_hole, -1.0, b_weight))
    visual = tl.sum(b_weight.to(tl.int32), axis=0)
    kind = tl.where(visual == 0, ORDINARY_BLOCK, tl.where(visual == BLOCK_N, VISUAL_BLOCK, MIXED_BLOCK))
    kind = tl.where(tl.max(m_hole.to(tl.int32), axis=0) != 0, HOLE_BLOCK, kind)
    tl.store(kind_ptr + tl.program_id(0), kind.to(tl.int8))
    p_queries = queries_ptr + tl.program_id(0).to(tl.int64) * 4
    tl.store(p_queries, meet_first)
    tl.store(p_queries + 1, meet_last)
    tl.store(p_queries + 2, whole_first)
    tl.store(p_queries + 3, whole_last)


def find_keys(mask: KeyMask, block: int) -> Keys:
    """Returns what the blocks of `block` keys hold; waits for nothing."""
    B, Lk = mask.kinds.shape
    blocks = triton.cdiv(Lk, block)
    keys = Keys(
        weight=mask.kinds.new_empty((B, blocks * block), dtype=torch.float32),
        kind=mask.kinds.new_empty((B, blocks)),
        queries=mask.kinds.new_empty((B, blocks, 4), dtype=torch.int32),
        block=block,
    )
    keys_kernel[(B * blocks,)](
        kinds_ptr=mask.kinds.contiguous(),
        start_ptr=mask.start.contiguous(),
        end_ptr=mask.end.contiguous(),
        weight_ptr=keys.weight,
        kind_ptr=keys.kind,
        queries_ptr=keys.queries,
        Lq=mask.start.shape[1],
        Lk=Lk,
        BLOCK_N=block,
        **SEARCH,
    )
    return keys


@triton.jit
def row_intervals(start_ptr, end_ptr, o_m, Lq):
    """Starts and ends [BM] of queries, 0 and 0 beyond the last."""
    m_m = o_m < Lq
    return tl.load(start_ptr + o_m, mask=m_m, other=0), tl.load(end_ptr + o_m, mask=m_m, other=0)


@triton.jit
def tile_ranges(first, last, whole_first, whole_last, BLOCK: tl.constexpr, CUT_BLOCK: tl.constexpr):
    """Cuts [first, last) at whole tiles of BLOCK within [whole_first, whole_last); the rest is tiles of CUT_BLOCK.

    Returns where the first tile begins, where those within begin and end, and where the last one ends.
    """
    end = tl.cdiv(tl.maximum(last, 0), CUT_BLOCK) * CUT_BLOCK
    begin = tl.minimum(first // CUT_BLOCK * CUT_BLOCK, end)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(whole_first, BLOCK) * BLOCK, begin), end)
    whole_end = tl.maximum(tl.minimum(whole_last // BLOCK * BLOCK, end), whole_begin)
    return begin, whole_begin, whole_end, end


@triton.jit
def key_ranges(b_start, b_end, p_kind, KEYS_BLOCK: tl.constexpr, BLOCK: tl.constexpr, CUT_BLOCK: tl.constexpr):
    """Ranges of keys that a block of queries sees, as `tile_ranges`; with a hole among them none counts as whole."""
    LARGEST: tl.constexpr = 2147483647
    BLOCK_HOLES: tl.constexpr = 128
    m_seen = b_start < b_end
    first = tl.min(tl.where(m_seen, b_start, LARGEST), axis=0)
    last = tl.max(tl.where(m_seen, b_end, 0), axis=0)
    whole_first = tl.max(tl.where(m_seen, b_start, 0), axis=0)
    whole_last = tl.min(tl.where(m_seen, b_end, LARGEST), axis=0)
    begin, whole_begin, whole_end, end = tile_ranges(first, last, whole_first, whole_last, BLOCK, CUT_BLOCK)
    holes = tl.zeros([BLOCK_HOLES], tl.int32)
    blocks_end = tl.cdiv(whole_end, KEYS_BLOCK)
    for block in range(whole_begin // KEYS_BLOCK, blocks_end, BLOCK_HOLES):
        o_b = block + tl.arange(0, BLOCK_HOLES)
        b_kind = tl.load(p_kind + o_b, mask=o_b < blocks_end, other=0)
        holes = tl.maximum(holes, (b_kind == HOLE_BLOCK).to(tl.int32))
    whole_end = tl.where(tl.max(holes, axis=0) != 0, whole_begin, whole_end)
    return begin, whole_begin, whole_end, end


@triton.jit
def whole_tile(step, whole_begin, BLOCK: tl.constexpr):
    """Where the tile of a step through the whole ones begins."""
    return tl.multiple_of(whole_begin + step * BLOCK, BLOCK)


@triton.jit
def cut_steps(begin, whole_begin, whole_end, end, CUT_BLOCK: tl.constexpr):
    """How many tiles of CUT_BLOCK lie before and after the whole ones."""
    return (end - begin - (whole_end - whole_begin)) // CUT_BLOCK


@triton.jit
def cut_tile(step, begin, whole_begin, whole_end, CUT_BLOCK: tl.constexpr):
    """Where the tile of a step through those before and after the whole ones begins."""
    first = begin + step * CUT_BLOCK
    return tl.multiple_of(tl.where(first < whole_begin, first, first + (whole_end - whole_begin)), CUT_BLOCK)


@triton.jit
def load_tile(p_tile, m_rows, m_columns, CUT_ROWS: tl.constexpr, CUT_COLUMNS: tl.constexpr):
    """Loads [R, C] with 0 outside the masks [R] and [C], each of which is looked at only where it cuts."""
    if CUT_ROWS and CUT_COLUMNS:
        return tl.load(p_tile, mask=m_rows[:, None] & m_columns[None, :], other=0.0)
    if CUT_ROWS:
        return tl.load(p_tile, mask=m_rows[:, None], other=0.0)
    if CUT_COLUMNS:
        return tl.load(p_tile, mask=m_columns[None, :], other=0.0)
    return tl.load(p_tile)


@triton.jit
def products(b_a, p_a, m_a, b_b, p_b, m_b, b_start, HEAD: tl.constexpr):
    """Products [M, N] of rows, onto `b_start`; rows of single precision are read anew from [M] and [N] pointers.

    Without tensor cores a product holds what it sums over in registers, so it is summed a few columns at a time.
    """
    CHUNK: tl.constexpr = 16
    if b_a.dtype != tl.float32:
        return tl.dot(b_a, tl.trans(b_b), b_start)
    for first in range(0, HEAD, CHUNK):
        o_d = first + tl.arange(0, CHUNK)  # [C]
        m_d = o_d < HEAD
        b_left = load_tile(p_a[:, None] + o_d[None, :], m_a, m_d, True, True)  # [M, C]
        b_right = load_tile(p_b[:, None] + o_d[None, :], m_b, m_d, True, True)  # [N, C]
        b_start = tl.dot(b_left, tl.trans(b_right), b_start, input_precision="ieee")
    return b_start


def compile_cases() -> list[CompileCase]:
    """Returns the kernel at both sizes of a block."""
    signature = dict.fromkeys(("start_ptr", "end_ptr", "queries_ptr"), "*i32")
    signature |= {"kinds_ptr": "*i8", "weight_ptr": "*fp32", "kind_ptr": "*i8", "Lq": "i32", "Lk": "i32"}
    tiles = {name: value for name, value in SEARCH.items() if name != "num_warps"}
    options = {"num_warps": SEARCH["num_warps"]}
    return [
        CompileCase(f"attention keys {block}", keys_kernel, signature, tiles | {"BLOCK_N": block}, options)
        for block in (32, 128)
    ]
